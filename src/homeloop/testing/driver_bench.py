"""Through what the checks of homeloop.testing.driver_checks ask a driver: it counts, compares, knows good ranges."""

from __future__ import annotations

import random
from asyncio import iscoroutine
from collections.abc import Callable, Iterator
from typing import Any, Final

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.block.filters.requests import Request, perform
from homeloop.errors import BlockError

__all__ = ["Bench", "Skipped"]

# Of the driver, what is looked at: so much from its start, and so much before its end.
_WINDOW: Final = 1 << 20
_LENGTHS: Final = (1, 511, 512, 513, 4096, 10_000, 65_536, 65_537, 200_000)


class Skipped(Exception):
    """The check is about something that this driver does not have."""


class Bench:
    """One driver behind a Device, and a bytearray that says what its windows must hold."""

    def __init__(
        self, driver: Driver, *, seed: int, moves: int, fail_next: Callable[[Any], object] | None = None,
        emulate_alignment: bool = False,
    ) -> None:
        self.driver = driver
        self.device = Device(driver, emulate_alignment=emulate_alignment)
        self.seed = seed
        self.chance = random.Random(seed)
        self.moves = moves
        self.fail_next = fail_next
        self.requests = 0
        self.granule = self.device.block_size.minimum
        size = self.device.size
        window = min(size, _WINDOW)
        window -= window % self.granule
        self.windows = sorted({(0, window), (size - window, size)})     # (start, end), perhaps overlapping
        if len(self.windows) == 2 and self.windows[1][0] < window:
            self.windows = [(0, size)]

    def needs(self, ability: bool, what: str) -> None:
        if not ability:
            raise Skipped(f"the driver has no {what}")

    def needs_room(self) -> None:
        if self.device.size < 4 * self.granule:
            raise Skipped(f"{self.device.size} bytes are too few")

    async def ask(self, request: Request) -> Any:
        """Ask and wait for the answer. AssertionError if it is an error: nothing that the checks ask is wrong."""
        self.requests += 1
        try:
            answer = perform(self.device, request)
            return await answer if iscoroutine(answer) else answer
        except BlockError as error:
            cause = error.__cause__ if error.__cause__ is not None else error
            raise AssertionError(f"{request} failed: {error}") from cause

    async def close(self) -> None:
        """Close the device. AssertionError if that fails; twice is fine."""
        try:
            await self.device.close()
        except BlockError as error:
            raise AssertionError(f"close failed: {error}") from error

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(await self.ask(Request("read", offset, length)))

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await self.ask(Request("write", offset, len(data), data, fua=fua))

    async def fill(self, start: int, end: int) -> bytearray:
        """Write random bytes; return them."""
        data = bytearray(self.chance.randbytes(end - start))
        for at in range(0, len(data), 1 << 18):
            await self.write(start + at, bytes(data[at : at + (1 << 18)]))
        return data

    async def contents(self, start: int, end: int) -> bytearray:
        """What a range holds: random bytes, if the driver can write."""
        if self.device.can_write:
            return await self.fill(start, end)
        return bytearray(await self.read(start, end - start))

    async def expect(self, offset: int, wanted: bytes | bytearray, after: str) -> None:
        """Read, and compare: the message says which byte is wrong."""
        found = await self.read(offset, len(wanted))
        if found != wanted:
            at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
            count = sum(a != b for a, b in zip(found, wanted, strict=True))
            raise AssertionError(
                f"{after}: {count} of {len(wanted)} bytes at {offset} are wrong, the first at {offset + at}: "
                f"{found[at]:#04x}, not {wanted[at]:#04x}"
            )

    def up(self, number: int) -> int:
        return -(-number // self.granule) * self.granule

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges with edges in odd places, at the start, the middle and the end of each window."""
        for start, end in self.windows:
            for length in _LENGTHS:
                length = self.up(length)
                middle = start + self.up((end - start) // 3)
                for offset in (start, middle, end - length):
                    if start <= offset and offset + length <= end:
                        yield offset, length

    def random_range(self, start: int, end: int) -> tuple[int, int]:
        granules = (end - start) // self.granule
        first = self.chance.randrange(granules)
        most = min(granules - first, max(1, self.chance.choice(_LENGTHS) // self.granule))
        return start + first * self.granule, self.chance.randint(1, most) * self.granule
