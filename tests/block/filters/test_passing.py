"""A filter passes everything on, offers no more than there is below, and waits only where that waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.file import File
from homeloop.block.filters.passing import Filter, Funnel
from homeloop.block.memory import Memory
from tests.block.answers import finish, is_inline
from tests.block.drivers import Least

MIB = 1 << 20
ABILITIES = ("can_write", "can_flush", "can_fua", "can_trim", "can_write_zeroes", "can_fast_zero", "can_cache",
             "can_multi_conn", "read_only", "size", "block_size")


class Writes(Least):
    """Neither flush nor trim nor anything."""

    block_size_min = 512
    block_size_preferred = 8192

    def write(self, offset: int, data: bytes) -> None: ...


class NeverFast(Memory):
    def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:    # type: ignore[override]
        super().write_zeroes(offset, length, may_trim=may_trim)


@pytest.mark.parametrize("kind", [Filter, Funnel])
@pytest.mark.parametrize("driver", [Least(), Writes(), Memory(MIB), NeverFast(MIB)], ids=lambda d: type(d).__name__)
def test_offers_what_there_is_below(driver: Any, kind: type[Filter]) -> None:
    below, above = Device(driver), Device(kind(kind(driver)))
    for name in ABILITIES:
        assert getattr(above, name) == getattr(below, name), name


@pytest.mark.parametrize("kind", [Filter, Funnel])
def test_over_memory_everything_is_inline(kind: type[Filter]) -> None:
    device = Device(kind(kind(Memory(MIB))))
    assert device.write(0, b"data", fua=True) is None
    assert device.read(0, 4) == b"data"
    for answer in (device.flush(), device.trim(0, 512), device.write_zeroes(0, 512, fast=True), device.cache(0, 1),
                   device.extents(0, MIB), device.read(MIB // 2, 100_000)):
        assert is_inline(answer)
    assert device.statistics().waited == 0


@pytest.mark.parametrize("kind", [Filter, Funnel])
def test_over_workers_it_waits_and_closes_below(kind: type[Filter], tmp_path: Any) -> None:
    async def main() -> None:
        file = File(tmp_path / "image", size=MIB, create=True)
        device = Device(kind(kind(file)))
        await finish(device.write(4096, b"data", fua=True))
        assert await finish(device.read(4096, 4)) == b"data"
        assert (await finish(device.extents(0, MIB)))[0][1:] == (True, True)
        await device.close()
        assert "closed" in repr(file)

    asyncio.run(main())
