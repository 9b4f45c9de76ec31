"""What a device counts."""

from __future__ import annotations

import asyncio

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from tests.block.answers import finish
from tests.block.drivers import Least, refused


def test_statistics() -> None:
    device = Device(Memory(4096))
    device.read(0, 100)
    device.read(0, 28)
    device.read(0, 0)
    device.write(0, b"abc")
    device.write(0, b"abc", fua=True)
    device.flush()
    device.trim(0, 7)
    device.write_zeroes(0, 9)
    refused(device.read, 4096, 1)
    s = device.statistics()
    assert (s.reads, s.read_bytes) == (2, 128)
    assert (s.writes, s.written_bytes) == (2, 6)
    assert (s.flushes, s.trims, s.trimmed_bytes) == (1, 1, 7)
    assert (s.write_zeroes, s.zeroed_bytes) == (1, 9)
    assert (s.errors, s.waited, s.in_flight, s.in_flight_max) == (1, 0, 0, 0)


def test_hints_and_extents_are_counted() -> None:
    device = Device(Memory(1 << 20))
    device.cache(0, 4096)
    device.write(65536, b"x")
    found = device.extents(0, 1 << 20)
    assert isinstance(found, list)
    assert len(found) == 3
    s = device.statistics()
    assert (s.caches, s.cached_bytes) == (1, 4096)
    assert (s.extents, s.extents_bytes) == (1, 1 << 20)
    assert (s.reads, s.writes) == (0, 1)


def test_extents_that_wait_are_counted() -> None:
    class Told(Least):
        async def extents(self, offset: int, length: int) -> list[tuple[int, bool, bool]]:
            return [(4096, True, True)]

    async def main() -> None:
        device = Device(Told())
        assert await finish(device.extents(0, 8192)) == [(4096, True, True)]
        assert device.statistics().extents_bytes == 4096

    asyncio.run(main())
