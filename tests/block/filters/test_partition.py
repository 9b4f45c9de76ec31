"""One partition of a disk as a device; tables come from anywhere, and wrong ones are named."""

from __future__ import annotations

import asyncio
import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.partition import Partition, partitions_of
from homeloop.block.filters.tables import Found, find_partitions
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from tests.block.answers import finish

SIZE = 64 << 20
SECTOR = 512


def mbr(*entries: tuple[int, int, int]) -> bytes:
    """A boot sector with (type, first sector, sectors) in its entries."""
    packed = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", first, count) for kind, first, count in entries)
    return bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa"


def gpt(*entries: tuple[int, int], size: int = SIZE, block: int = 512, **changed: object) -> dict[int, bytes]:
    """The blocks of a disk with (first, last) in its GPT; `changed` fields of the header, before its checksum."""
    kind = b"k" * 16
    table = b"".join(struct.pack("<16s16sQQQ72s", kind, b"u" * 16, first, last, 0, b"") for first, last in entries)
    table = table.ljust(128 * 128, b"\0")
    fields = {
        "magic": b"EFI PART", "revision": 0x10000, "bytes": 92, "own": 1, "other": size // block - 1, "first": 34,
        "last": size // block - 34, "at": 2, "count": 128, "entry": 128, "sum": zlib.crc32(table),
    } | changed
    def header(checksum: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII", fields["magic"], fields["revision"], fields["bytes"], checksum, 0, fields["own"],
            fields["other"], fields["first"], fields["last"], b"g" * 16, fields["at"], fields["count"], fields["entry"],
            fields["sum"],
        )
    return {0: mbr((0xEE, 1, 0xFFFFFFFF)), block: header(zlib.crc32(header(0))), 2 * block: table}


def backup(*entries: tuple[int, int], size: int = SIZE, block: int = 512, **changed: object) -> dict[int, bytes]:
    """The same GPT as its backup: the header in the last block, the entries before it."""
    last, at = size // block - 1, size // block - 1 - 128 * 128 // block
    parts = gpt(*entries, size=size, block=block, **({"own": last, "other": 1, "at": at} | changed))
    return {last * block: parts[block], at * block: parts[2 * block]}


def disk(sectors: dict[int, bytes], size: int = SIZE) -> Memory:
    memory = Memory(size)
    for offset, data in sectors.items():
        memory.write(offset, data)
    return memory


def found_on(memory: Memory) -> list[tuple[int, int, int]]:
    return [(p.number, p.offset // SECTOR, p.size // SECTOR) for p in asyncio.run(partitions_of(Device(memory)))]


def test_primary_and_logical_partitions() -> None:
    memory = disk({
        0: mbr((0x83, 2048, 4096), (0, 0, 0), (0x05, 10_000, 50_000), (0x83, 70_000, 100)),
        10_000 * SECTOR: mbr((0x83, 63, 1000), (0x05, 2000, 3000)),
        12_000 * SECTOR: mbr((0x82, 63, 2000)),
    })
    assert found_on(memory) == [(1, 2048, 4096), (4, 70_000, 100), (5, 10_063, 1000), (6, 12_063, 2000)]


@pytest.mark.parametrize("block", [512, 4096])
def test_gpt(block: int) -> None:
    memory = disk(gpt((40, 99), (100, 100), block=block))
    per = block // 512
    assert found_on(memory) == [(1, 40 * per, 60 * per), (2, 100 * per, per)]


def test_a_partition_is_a_window() -> None:
    async def main() -> None:
        memory = disk({0: mbr((0x83, 2048, 4096))})
        partition = await Partition.find(memory, 1)
        assert (partition.table, partition.number) == ("mbr", 1)
        device = Device(partition)
        assert device.size == 4096 * SECTOR
        await finish(device.write(0, b"first"))
        assert memory.read(2048 * SECTOR, 5) == b"first"
        with pytest.raises(UsageError, match="no partition 2, but 1"):
            await Partition.find(memory, 2)

    asyncio.run(main())


def test_blocks_of_the_driver_are_kept_to() -> None:
    class Blocks(Memory):
        block_size_min = 4096

        def read(self, offset: int, length: int) -> object:      # type: ignore[override]
            assert offset % 4096 == 0
            assert length % 4096 == 0
            return super().read(offset, length)

    memory = Blocks(SIZE)
    for offset, data in gpt((40, 47)).items():
        memory.write(offset, data)
    assert found_on(memory) == [(1, 40, 8)]


@pytest.mark.parametrize(("sectors", "text"), [
    ({}, "no partition table: no signature"),
    ({0: mbr((0x83, 2048, 1 << 30))}, "partition 1 has .* not inside"),
    ({0: mbr((0x83, 0, 10))}, "partition 1 has .* not inside"),
    ({0: mbr((0x05, 10, 10))}, "leads to sector 10, which has no signature"),
    ({0: mbr((0x05, 10, 100)), 5120: mbr((0x83, 1, 1), (0x05, 200, 1))}, "leads out of it, to sector 210"),
    ({0: mbr((0x05, 10, 100)), 5120: mbr((0, 0, 0), (0x05, 5, 1)), 15 * 512: mbr((0, 0, 0), (0x05, 5, 1))},
     "has no end: sector 15"),
    ({0: mbr((0xEE, 1, 1))}, "no header with EFI PART"),
    (gpt((40, 99), own=5), "says that it is in block 5"),
    (gpt((40, 99), bytes=91), "says that it has 91 bytes"),
    (gpt((40, 99), bytes=513), "says that it has 513 bytes"),
    (gpt((40, 99), count=100_000), "100000 entries"),
    (gpt((40, 99), entry=64), "entries of 64 bytes"),
    (gpt((40, 99), entry=1 << 31), "entries of 2147483648 bytes"),
    (gpt((40, 99), at=1 << 60), "are not inside the device"),
    (gpt((40, 99), at=0), "are not inside the device"),
    (gpt((40, 99), sum=1), "entries are damaged"),
    (gpt((99, 40)), "partition 1 has .* not inside"),
    (gpt((40, 1 << 50)), "partition 1 has .* not inside"),
    ({**gpt((40, 99)), 520: b"x"}, "header is damaged"),
])
def test_tables_that_are_wrong(sectors: dict[int, bytes], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        found_on(disk(sectors))


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize(("where", "text"), [
    (0, "no header with EFI PART in the second block"), (20, "header is damaged"), (None, "entries are damaged"),
])
def test_a_damaged_gpt_is_read_from_its_backup(
    block: int, where: int | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The backup's partition says that it was read: it is not the one of the primary table."""
    damage = 2 * block + 5 if where is None else block + where
    sectors = gpt((50, 99), block=block) | backup((40, 99), block=block)
    per = block // 512
    assert found_on(disk(sectors)) == [(1, 50 * per, 50 * per)]
    assert caplog.records == []
    assert found_on(disk({**sectors, damage: b"x"})) == [(1, 40 * per, 60 * per)]
    (record,) = caplog.records
    assert "the backup of its partition table is used: " in record.getMessage()
    assert text in record.getMessage()


@pytest.mark.parametrize(("sectors", "text"), [
    ({}, "header is damaged.*and there is no backup of it in the last block"),
    (backup((40, 99), own=1), f"is damaged.*no better: .* in block {SIZE // 512 - 1} says that it is in block 1"),
    (backup((40, 99), sum=1), "header is damaged.*no better: the GPT's entries are damaged"),
    (backup((40, 99), at=1 << 50), "header is damaged.*no better: .* are not inside the device"),
    (backup((40, 1 << 40)), "partition 1 has .* not inside"),
])
def test_both_gpts_are_damaged(sectors: dict[int, bytes], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        found_on(disk({**gpt((40, 99)), **sectors, 520: b"x"}))


def test_a_device_that_is_too_small() -> None:
    with pytest.raises(UsageError, match="511 bytes has no partition table"):
        found_on(Memory(511))
    with pytest.raises(UsageError, match="no header with EFI PART"):
        found_on(disk({0: mbr((0xEE, 1, 1))}, size=512))


def test_any_bytes_are_partitions_inside_the_disk_or_a_usage_error(seed: int) -> None:
    chance = random.Random(seed)
    logical = {0: mbr((0x83, 2048, 100), (0x05, 10, 100)), 5120: mbr((0x83, 1, 1), (0x05, 5, 9))}
    small = {"size": 1 << 18}
    good = [gpt((40, 99), (100, 200)), logical, gpt((40, 99), **small) | backup((40, 99), (100, 200), **small)]
    for _ in range(300):
        image = bytearray(1 << 18)
        for offset, data in chance.choice(good).items():
            image[offset : offset + len(data)] = data
        for _ in range(chance.randint(1, 4)):
            places = ((446, 600), (1024, 1100), (len(image) - 512, len(image) - 400))
            image[chance.randrange(*chance.choice(places))] = chance.randrange(256)
        try:
            found = _parsed(bytes(image))
        except UsageError:
            continue
        for partition in found:
            assert 0 < partition.offset < partition.offset + partition.size <= len(image)


def _parsed(image: bytes) -> list[Found]:
    reading = find_partitions(len(image))
    try:
        offset, length = next(reading)
        while True:
            assert offset >= 0
            assert offset + length <= len(image)
            offset, length = reading.send(image[offset : offset + length])
    except StopIteration as end:
        return end.value                    # type: ignore[no-any-return]


@pytest.mark.foreign("sfdisk")
@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_tables_that_sfdisk_made(tmp_path: Path, label: str) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(SIZE)
    script = f"label: {label}\n1: start=2048, size=4096\n2: start=6144, size=8192\n"
    if label == "dos":
        script += "3: start=16384, size=40960, type=5\n5: start=18432, size=2048\n"
    subprocess.run(["sfdisk", str(image)], input=script.encode(), check=True, capture_output=True, timeout=30)
    memory = Memory(SIZE)
    memory.write(0, image.read_bytes())
    wanted = [(1, 2048, 4096), (2, 6144, 8192)] + ([(5, 18432, 2048)] if label == "dos" else [])
    assert found_on(memory) == wanted
    if label == "gpt":
        memory.write(512, bytes(512))               # the backup that sfdisk wrote has to do
        assert found_on(memory) == wanted
