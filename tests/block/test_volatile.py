"""The volatile write cache: what is written is seen, what was not flushed is lost, as was asked for."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.faults import Faults
from homeloop.block.memory import Memory
from homeloop.block.volatile import Volatile
from homeloop.errors import BlockError, UsageError
from tests.block.answers import finish, turns
from tests.block.drivers import Least, refused
from tests.block.filters.waiting import Waiting

SIZE = 64 << 10


def made(**options: Any) -> tuple[Faults, Memory, Device]:
    faults = Faults(volatile=True, **options)
    memory = Memory(SIZE)
    return faults, memory, Device(faults.over(memory))


def blocks(device: Device, count: int) -> str:
    """The first byte of each block, or - for zero."""
    data: Any = device.read(0, count * 512)
    return "".join(chr(byte) if byte else "-" for byte in bytes(data)[::512])


def write(device: Device, letters: str) -> None:
    for number, letter in enumerate(letters):
        device.write(number * 512, letter.encode() * 512)


def test_written_is_seen_and_flushed_is_below() -> None:
    _, memory, device = made()
    device.write(0, b"a" * 1024)
    device.write(512, b"b" * 1024)
    device.write_zeroes(256, 512)
    assert device.read(0, 2048) == b"a" * 256 + bytes(512) + b"b" * 768 + bytes(512)
    assert device.extents(0, SIZE)[0][1:] == (False, False)          # type: ignore[index]
    assert memory.allocated_bytes == 0
    device.flush()
    assert memory.read(0, 2048) == device.read(0, 2048)


def test_a_crash_loses_what_was_not_flushed() -> None:
    faults, memory, device = made()
    write(device, "abc")
    device.flush()
    write(device, "ABCD")
    faults.crash()
    assert refused(device.read, 0, 512).errno == errno.EIO
    assert refused(device.flush).errno == errno.EIO
    faults.recover()
    assert blocks(device, 4) == "abc-"
    device.flush()
    assert blocks(Device(memory), 4) == "abc-"


def test_fua_is_stable_alone() -> None:
    faults, _, device = made()
    write(device, "aaaa")
    device.write(512, b"F" * 1024, fua=True)
    write(device, "b")
    assert blocks(device, 4) == "bFFa"
    faults.crash()
    faults.recover()
    assert blocks(device, 4) == "-FF-"


@pytest.mark.parametrize(("keep", "wanted"), [("none", "----"), (0, "----"), (2, "ab--"), (99, "abcd")])
def test_what_survives(keep: Any, wanted: str) -> None:
    faults, memory, device = made()
    write(device, "abcd")
    faults.crash(keep)
    faults.recover()
    assert blocks(device, 4) == wanted
    faults.crash()                              # what has survived once is on the medium
    faults.recover()
    assert blocks(device, 4) == wanted
    device.flush()
    assert blocks(Device(memory), 4) == wanted


@pytest.mark.parametrize("keep", ["random", "prefix"])
def test_chance_is_the_seeds(keep: Any) -> None:
    letters = "abcdefghijklmnopqrst"

    def run(seed: int) -> str:
        faults, _, device = made(seed=seed)
        write(device, letters)
        faults.crash(keep)
        faults.recover()
        return blocks(device, len(letters))

    found = [run(seed) for seed in range(8)]
    assert found == [run(seed) for seed in range(8)]
    assert len(set(found)) > 1
    for survived in found:
        assert all(a in ("-", b) for a, b in zip(survived, letters, strict=True))
        if keep == "prefix":
            assert survived.rstrip("-") == letters[: len(survived.rstrip("-"))]


def test_torn_and_crashed_leaves_the_first_sectors_and_nothing_that_was_not_flushed() -> None:
    faults, memory, device = made()
    write(device, "ab")
    faults.on("write", at=(4096, 8192)).torn(sectors=1, then="crash")
    assert refused(device.write, 4096, b"T" * 2048).errno == errno.EIO
    assert faults.is_crashed
    faults.recover()
    assert bytes(memory.read(4096, 1024)) == b"T" * 512 + bytes(512)
    assert blocks(device, 2) == "--"


def test_requests_in_flight_end_with_the_crash() -> None:
    async def main() -> None:
        faults = Faults(volatile=True)
        driver = Waiting(SIZE)
        device = Device(faults.over(driver))
        stall = faults.on("write").stall()
        driver.held.add("read")
        tasks = [asyncio.ensure_future(finish(answer)) for answer in (device.write(0, b"x"), device.read(512, 1))]
        await turns()
        faults.crash()
        faults.recover()                        # both before the requests go on: they do not come back to life
        stall.release()
        await driver.hold_no_more()
        for task in tasks:
            with pytest.raises(BlockError, match="has crashed"):
                await task
        assert await finish(device.read(0, 1)) == b"\0"
        await device.close()

    asyncio.run(main())


def test_a_flush_that_fails_keeps_the_changes() -> None:
    async def main() -> None:
        faults = Faults(volatile=True)
        driver = Waiting(SIZE)
        over = faults.over(driver)
        device = Device(over)
        await finish(device.write(0, b"abc"))
        driver.errors["write"] = [OSError(errno.EIO, "no")]
        with pytest.raises(BlockError):
            await finish(device.flush())
        assert over.unflushed == 1
        await finish(device.flush())
        assert over.unflushed == 0
        assert driver.memory.read(0, 3) == b"abc"

    asyncio.run(main())


def test_what_is_changed_during_a_flush_is_not_covered_by_it() -> None:
    async def main() -> None:
        faults = Faults(volatile=True)
        driver = Waiting(SIZE)
        over = faults.over(driver)
        device = Device(over)
        await finish(device.write(0, b"old"))
        driver.held.add("flush")
        flush = asyncio.ensure_future(finish(device.flush()))
        await turns()
        await finish(device.write(0, b"new"))
        await driver.hold_no_more()
        await flush
        assert over.unflushed == 1
        faults.crash()
        faults.recover()
        assert await finish(device.read(0, 3)) == b"old"

    asyncio.run(main())


def test_without_a_flush_there_is_nothing_to_lose() -> None:
    class Writes(Least):
        def write(self, offset: int, data: bytes) -> None: ...

    with pytest.raises(UsageError, match="which has no flush"):
        Faults(volatile=True).over(Writes())
    assert Device(Faults(volatile=True).over(Least())).read_only


def test_crash_without_a_cache_loses_nothing_and_a_rule_can_do_it() -> None:
    faults = Faults()
    memory = Memory(SIZE)
    device = Device(faults.over(memory))
    faults.on("flush", nth=2).crash()
    write(device, "ab")
    device.flush()
    assert refused(device.flush).errno == errno.EIO
    assert refused(device.read, 0, 1).errno == errno.EIO
    faults.clear()
    assert blocks(device, 2) == "ab"


def test_any_changes_are_a_bytearray(seed: int) -> None:
    """seen() and cut() against a model of the medium and of what is seen."""
    chance, volatile = random.Random(seed), Volatile()
    medium, seen = bytearray(4096), bytearray(4096)
    for _ in range(500):
        offset = chance.randrange(4096)
        length = chance.randint(1, min(300, 4096 - offset))
        data = chance.randbytes(length) if chance.random() < 0.7 else None
        at = slice(offset, offset + length)
        seen[at] = data if data is not None else bytes(length)
        if chance.random() < 0.2:
            medium[at] = seen[at]
            volatile.cut(offset, length)
        else:
            volatile.add(offset, length, data)
        assert bytes(volatile.seen(offset, medium[at])) == seen[at]
        assert volatile.touches(offset, length) or medium[at] == seen[at]
        if chance.random() < 0.02:
            for change in volatile.changes:
                medium[change.offset : change.end] = change.data or bytes(change.length)
            volatile.forget(volatile.changes)
            assert medium == seen
            assert (len(volatile), volatile.data_bytes) == (0, 0)
    assert bytes(volatile.seen(0, medium)) == seen


def test_what_no_rule_is_about_ends_with_the_crash_too() -> None:
    async def main() -> None:
        faults = Faults()
        driver = Waiting(SIZE)
        device = Device(faults.over(driver))
        driver.held.add("read")
        task = asyncio.ensure_future(finish(device.read(0, 1)))
        await turns()
        faults.crash()
        faults.recover()
        await driver.hold_no_more()
        with pytest.raises(BlockError, match="has crashed"):
            await task
        await device.close()

    asyncio.run(main())


def test_a_read_during_a_flush_sees_what_was_written_before_it() -> None:
    """What it did before:

    write   answered: in the cache
    read    takes the old bytes below, and is held up there
    flush                                       writes the new ones below; nothing is in the cache any more
    read    answers with the old bytes
    """

    async def main() -> None:
        driver = Waiting(SIZE)
        device = Device(Faults(volatile=True).over(driver))
        device.write(0, b"new")
        driver.held.add("read")
        reading = asyncio.ensure_future(finish(device.read(0, 4)))
        await turns(20)
        await finish(device.flush())
        assert bytes(driver.memory.read(0, 4)) == b"new\0"
        await driver.hold_no_more()
        assert bytes(await reading) == b"new\0"

    asyncio.run(main())
