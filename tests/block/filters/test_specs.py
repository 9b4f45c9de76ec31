"""What a person types becomes filters, in that order; what makes no sense is quoted."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.specs import apply_filters, parse_filter
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from tests.block.answers import finish
from tests.block.drivers import refused
from tests.block.filters.test_partition import disk, mbr

MIB = 1 << 20


@pytest.mark.parametrize(("text", "options"), [
    ("readonly", {}),
    ("delay:read=5ms,write=250us,fixed=1.5,jitter=2m,seed=7",
     {"read": 0.005, "write": 0.00025, "fixed": 1.5, "jitter": 120, "seed": 7}),
    ("rate:bytes=10M,requests=2.5,burst=1s", {"bytes_per_s": 10 * MIB, "requests_per_s": 2.5, "burst_s": 1}),
    ("cache:size=1M,block=4k,write-back=on", {"size": MIB, "block": 4096, "write_back": True}),
    ("error:errno=ENOSPC,kinds=write+trim,at=0-64k,share=0.1",
     {"errno": errno.ENOSPC, "kinds": frozenset({"write", "trim"}), "at": (0, 65536), "share": 0.1}),
    ("retry:times=3,delay=1s,delay-max=4s,errnos=EIO+5",
     {"times": 3, "delay_s": 1, "delay_max_s": 4, "errnos": [errno.EIO, 5]}),
    ("log:file=a\\,b=c,data=off", {"to": "a,b=c", "with_data": False}),
    ("cow:file=/x,cluster=128k", {"overlay": "/x", "cluster": 131072}),
    ("readahead:min=64k,max=1M", {"window_min": 65536, "window_max": MIB}),
    ("partition:number=2", {"number": 2}),
    ("offset:offset=1M,size=2M", {"offset": MIB, "size": 2 * MIB}),
])
def test_options(text: str, options: dict[str, object]) -> None:
    parsed = parse_filter(text)
    assert parsed.name == text.partition(":")[0]
    assert parsed.options == pytest.approx(options) if parsed.name == "delay" else parsed.options == options


@pytest.mark.parametrize(("text", "message"), [
    ("dealy:read=5ms", "there is no 'dealy', only cache, cow, delay"),
    ("", "there is no ''"),
    ("delay:", "'' is no option of delay; it has read=, write="),
    ("delay:reed=5ms", "'reed=5ms' is no option of delay"),
    ("delay:read", "'read' is no option of delay"),
    ("readonly:x=1", "is no option of readonly; it has none"),
    ("delay:read=5 ms", "read: '5 ms' is not a time"),
    ("delay:read=1,read=2", "read is given twice"),
    ("delay:seed=-1", "seed: '-1' is not a whole number"),
    ("log", "log needs file="),
    ("log:file=", "file: '' names no file"),
    ("partition", "partition needs number="),
    ("cache:write-back=perhaps", "neither on nor off"),
    ("cache:size=lots", "'lots' is not a size"),
    ("rate:requests=many", "'many' is not a number"),
    ("error:at=5", "'5' is not a range"),
    ("error:errno=EWHAT", "'EWHAT' is no errno"),
    ("error:kinds=reads", "there are no 'reads' requests"),
])
def test_what_makes_no_sense_is_quoted(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_filter(text)
    assert f"filter {text!r}" in str(caught.value)
    assert message in str(caught.value)


def test_the_first_is_next_to_the_device() -> None:
    memory = Memory(MIB)
    device = apply_filters(Device(memory, name="disk"), ["offset:offset=4k", "error:errno=EIO,kinds=write,at=0-512"])
    assert (device.name, device.size) == ("disk", MIB - 4096)
    assert refused(device.write, 0, b"x").errno == errno.EIO
    device.write(512, b"y")
    assert memory.read(4608, 1) == b"y"


def test_partition_reads_its_table_wherever_it_is_made() -> None:
    async def main() -> None:
        device = apply_filters(Device(disk({0: mbr((0x83, 8, 100))})), ["partition:number=1", "readonly"])
        assert device.size == 51200
        assert device.read_only

    asyncio.run(main())


def test_a_filter_that_does_not_fit_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="filter 'offset:offset=2M': a window of"):
        apply_filters(Device(Memory(MIB)), ["offset:offset=2M"])
    with pytest.raises(UsageError, match="filter 'partition:number=1': the device has no partition table"):
        apply_filters(Device(Memory(MIB)), ["partition:number=1"])


def test_all_at_once_over_a_log_in_a_file(tmp_path: Path) -> None:
    async def main() -> None:
        filters = [
            f"log:file={tmp_path}/log", "retry", "cache:block=4k", "readahead", "cow", "delay:fixed=1us",
            "rate:bytes=1G",
        ]
        device = apply_filters(Device(Memory(MIB)), filters)
        await finish(device.write(5, b"data"))
        assert bytes(await finish(device.read(4, 6))) == b"\0data\0"
        await device.close()
        assert '"kind": "read"' in (tmp_path / "log").read_text()

    asyncio.run(main())
