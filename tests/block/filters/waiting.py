"""A driver of coroutines over memory, whose requests can be held up, and fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from homeloop.block.memory import Memory


class Waiting:
    """Every request waits a turn of the loop, and as long as its kind is in `held`. `begun` has what was asked."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = Memory(size)
        self.begun: list[tuple[str, int, int]] = []
        self.held: set[str] = set()
        self.errors: dict[str, list[Exception]] = {}    # kind -> what its next requests raise
        self._changed = asyncio.Condition()

    async def hold_no_more(self) -> None:
        async with self._changed:
            self.held.clear()
            self._changed.notify_all()

    async def _pass(self, kind: str, offset: int, length: int) -> None:
        self.begun.append((kind, offset, length))
        await asyncio.sleep(0)
        async with self._changed:
            await self._changed.wait_for(lambda: kind not in self.held)
        if self.errors.get(kind):
            raise self.errors[kind].pop(0)

    async def read(self, offset: int, length: int) -> bytes:
        data = bytes(self.memory.read(offset, length))  # as it was when it was asked: the worst case for a cache
        await self._pass("read", offset, length)
        return data

    async def write(self, offset: int, data: bytes) -> None:
        await self._pass("write", offset, len(data))
        self.memory.write(offset, data)

    async def flush(self) -> None:
        await self._pass("flush", 0, 0)

    async def trim(self, offset: int, length: int) -> None:
        await self._pass("trim", offset, length)
        self.memory.trim(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        await self._pass("write_zeroes", offset, length)
        self.memory.write_zeroes(offset, length, may_trim=may_trim)

    async def resize(self, size: int) -> None:
        await self._pass("resize", 0, size)
        self.memory.resize(size)
        self.size = size

    async def extents(self, offset: int, length: int) -> Iterator[tuple[int, bool, bool]]:
        await self._pass("extents", offset, length)
        return self.memory.extents(offset, length)
