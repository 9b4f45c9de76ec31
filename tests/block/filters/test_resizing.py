"""Resize passes through: what is kept of the old end is not seen at the new one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.faults import Faults
from homeloop.block.filters.cache import Cache
from homeloop.block.filters.cow import Cow
from homeloop.block.filters.log import Log
from homeloop.block.filters.offset import Offset
from homeloop.block.filters.passing import Filter
from homeloop.block.filters.readahead import Readahead
from homeloop.block.memory import Memory
from tests.block.answers import finish
from tests.block.filters.waiting import Waiting

OLD, SMALL, LARGE = 10_000, 5_000, 20_000

FILTERS: dict[str, Callable[[Any], Any]] = {
    "filter": Filter,
    "log": Log,
    "readahead": Readahead,
    "cache": lambda below: Cache(below, block=4096),
    "cache-back": lambda below: Cache(below, block=4096, write_back=True),
    "volatile": Faults(volatile=True).over,
    "stack": lambda below: Filter(Cache(Readahead(Log(below)), block=4096, write_back=True)),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("below", [Memory, Waiting])
def test_smaller_and_larger(name: str, below: type) -> None:
    async def main() -> None:
        device = Device(FILTERS[name](below(OLD)))
        await finish(device.write(0, b"x" * OLD))
        assert bytes(await finish(device.read(0, OLD))) == b"x" * OLD
        await device.resize(SMALL)
        assert bytes(await finish(device.read(0, SMALL))) == b"x" * SMALL
        await device.resize(LARGE)
        assert bytes(await finish(device.read(0, LARGE))) == b"x" * SMALL + bytes(LARGE - SMALL)
        await finish(device.write(LARGE - 3, b"end"))
        await finish(device.flush())
        assert bytes(await finish(device.read(LARGE - 4, 4))) == b"\0end"
        await device.close()

    asyncio.run(main())


def test_who_cannot_does_not_offer_it() -> None:
    for driver in (Cow(Memory(OLD)), Offset(Memory(OLD)), Filter(Offset(Memory(OLD)))):
        assert not Device(driver).can_resize
    assert Device(Filter(Memory(OLD))).can_resize
