"""A cache of blocks in memory, the least recently used of which make room.

Write-through (the default): a write is answered when the driver below has it, and what the cache has of it follows.
Write-back: a write is answered when the cache has it; the driver below gets it when its block must make room, on a
flush, and on close(). A block that could not be written stays, and the flush fails: so nothing that was flushed is
missing below, and nothing is given up in silence.

Requests that wait have their blocks for themselves (Claims): what is read from below is never older than what was
written meanwhile. Requests for blocks that are here wait for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from homeloop.block.device import Answer, Device
from homeloop.block.driver import BytesLike, Driver
from homeloop.block.extents import Extent
from homeloop.block.filters.passing import Filter
from homeloop.block.filters.steps import Claims, Steps, at_once
from homeloop.errors import BlockError, UsageError

__all__ = ["Cache"]


class _Block:
    __slots__ = ("data", "dirty")

    def __init__(self, data: bytearray, dirty: bool = False) -> None:
        self.data = data
        self.dirty = dirty          # newer than what is below


class Cache(Filter):
    """Keeps up to `size` bytes in blocks of `block` bytes; write_back: see the module's text.

    A driver without flush gets what was written back when blocks make room and on close(); the cache then has no flush
    either. Home thread.
    """

    def __init__(
        self, driver: Driver | Device, *, size: int = 64 << 20, block: int = 1 << 16, write_back: bool = False
    ) -> None:
        super().__init__(driver)
        if block <= 0 or block & (block - 1) or block < self.block_size_min or block > self.inner.block_size.maximum:
            raise UsageError(f"cache: a block of {block} bytes: it must be a power of two from {self.block_size_min} "
                             f"to {self.inner.block_size.maximum}")
        if size < block:
            raise UsageError(f"cache: {size} bytes are less than one block of {block}")
        self._block = block
        self._blocks_max = size // block
        # Home thread only, all of them.
        self._blocks: OrderedDict[int, _Block] = OrderedDict()      # by number; the least recently used first
        self._claims = Claims()                                     # of numbers of blocks
        self.hits = 0                                               # blocks that reads and writes found here
        self.misses = 0
        self._write_back = write_back and self.inner.can_write
        if self._write_back:
            setattr(self, "write_fua", None)    # noqa: B010 - write, then flush: the Device does that

    def read(self, offset: int, length: int) -> Answer[BytesLike]:
        first, stop = self._numbers(offset, length)
        if stop - first == 1:
            block = self._blocks.get(first)
            if block is not None:               # most reads, if a cache is of any use
                self._blocks.move_to_end(first)
                self.hits += 1
                start = offset - first * self._block
                return block.data[start : start + length]
        return at_once(self._reading(offset, length))

    def write(self, offset: int, data: BytesLike) -> Answer[None]:
        return at_once(self._writing_back(offset, data) if self._write_back else self._through(offset, data, False))

    def write_fua(self, offset: int, data: BytesLike) -> Answer[None]:
        return at_once(self._through(offset, data, True))

    def flush(self) -> Answer[None]:
        if not self._write_back:
            return self.inner.flush()
        return at_once(self._flushing())

    def trim(self, offset: int, length: int) -> Answer[None]:
        return at_once(self._dropping(offset, length, partial(self.inner.trim, offset, length)))

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Answer[None]:
        ask = partial(self.inner.write_zeroes, offset, length, may_trim=may_trim, fast=fast)
        return at_once(self._dropping(offset, length, ask))

    def extents(self, offset: int, length: int) -> Answer[list[Extent]]:
        return at_once(self._telling(offset, length))

    async def resize(self, size: int) -> None:
        """Write back what is dirty, resize what is below, and begin anew: the last block may be another."""
        answer = at_once(self._resized(size))
        assert answer is not None, "Device.resize() is a coroutine"
        await answer

    async def close(self) -> None:
        """Write back what is dirty, then close the driver below, also if that failed. Raises the first failure."""
        failed: BlockError | None = None
        if any(block.dirty for block in self._blocks.values()):
            answer = at_once(self._cleaning(0, self._numbers(0, self.size)[1]))
            try:
                if answer is not None:
                    await answer
            except BlockError as error:
                failed = error
        await self.inner.close()
        self._blocks.clear()
        if failed is not None:
            raise failed

    # Steps

    def _reading(self, offset: int, length: int) -> Steps[BytesLike]:
        first, stop = self._numbers(offset, length)
        claim = yield from self._claims.take(first, stop)
        try:
            pieces = []
            for number in range(first, stop):
                block = self._blocks.get(number)
                if block is None:
                    self.misses += 1
                    block = yield from self._read_in(number)
                else:
                    self.hits += 1
                    self._blocks.move_to_end(number)
                start = max(0, offset - number * self._block)
                pieces.append(block.data[start : offset + length - number * self._block])
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            self._claims.give(claim)

    def _through(self, offset: int, data: BytesLike, fua: bool) -> Steps[None]:
        first, stop = self._numbers(offset, len(data))
        claim = yield from self._claims.take(first, stop)
        try:
            yield self.inner.write(offset, data, fua=fua)
            for number, start, piece in self._pieces(offset, data):
                block = self._blocks.get(number)
                if block is not None:
                    block.data[start : start + len(piece)] = piece
        except BaseException:
            self._drop(first, stop)             # what is below now is open: it must be read again
            raise
        finally:
            self._claims.give(claim)

    def _writing_back(self, offset: int, data: BytesLike) -> Steps[None]:
        first, stop = self._numbers(offset, len(data))
        claim = yield from self._claims.take(first, stop)
        try:
            for number, start, piece in self._pieces(offset, data):
                block = self._blocks.get(number)
                if block is not None:
                    self.hits += 1
                    self._blocks.move_to_end(number)
                elif len(piece) == self._length_of(number):
                    block = _Block(bytearray(piece))
                    yield from self._keep(number, block)
                else:
                    self.misses += 1
                    block = yield from self._read_in(number)
                    if number not in self._blocks:      # no room could be made for what is only read
                        yield from self._keep(number, block)
                block.data[start : start + len(piece)] = piece
                block.dirty = True
        finally:
            self._claims.give(claim)

    def _flushing(self) -> Steps[None]:
        yield from self._cleaning(0, self._numbers(0, self.size)[1])
        yield self.inner.flush()

    def _resized(self, size: int) -> Steps[None]:
        everything = max(self._numbers(0, self.size)[1], self._numbers(0, size)[1])
        claim = yield from self._claims.take(0, everything)
        try:
            for number in sorted(self._blocks):
                yield from self._clean(number)
            yield super().resize(size)
            self._blocks.clear()
        finally:
            self._claims.give(claim)

    def _dropping(self, offset: int, length: int, ask: partial[Answer[None]]) -> Steps[None]:
        """A change whose data we do not have: what is dirty at its edges goes below first, then all is forgotten."""
        first, stop = self._numbers(offset, length)
        claim = yield from self._claims.take(first, stop)
        try:
            for number in {first, stop - 1}:
                yield from self._clean(number)
            try:
                yield ask()
            except BaseException:
                self._drop(first, stop, dirty_too=False)
                raise
            self._drop(first, stop)
        finally:
            self._claims.give(claim)

    def _telling(self, offset: int, length: int) -> Steps[list[Extent]]:
        """What is dirty is data, which the driver below does not know yet: it is told first."""
        first, stop = self._numbers(offset, length)
        yield from self._cleaning(first, stop)
        return (yield self.inner.extents(offset, length))        # type: ignore[no-any-return]

    def _cleaning(self, first: int, stop: int) -> Steps[None]:
        """Write back every dirty block of the range; all are tried, then the first failure is raised."""
        failed: BlockError | None = None
        dirty = sorted(n for n, block in self._blocks.items() if block.dirty and first <= n < stop)
        for number in dirty:
            claim = yield from self._claims.take(number, number + 1)
            try:
                yield from self._clean(number)
            except BlockError as error:
                failed = failed or error
            finally:
                self._claims.give(claim)
        if failed is not None:
            raise failed

    def _clean(self, number: int) -> Steps[None]:
        """Write one block back if it is dirty. It is claimed."""
        block = self._blocks.get(number)
        if block is not None and block.dirty:
            yield self.inner.write(number * self._block, block.data)
            block.dirty = False

    def _read_in(self, number: int) -> Steps[_Block]:
        """Read a block that is claimed, and keep it if there is room."""
        data = yield self.inner.read(number * self._block, self._length_of(number))
        block = _Block(bytearray(data))
        try:
            yield from self._keep(number, block)
        except BlockError:
            pass                                # the dirty one that would not go stays; this one is only read
        return block

    def _keep(self, number: int, block: _Block) -> Steps[None]:
        """Put a block in, and the least recently used one out that nobody has claimed."""
        while len(self._blocks) >= self._blocks_max:
            victim = next((n for n in self._blocks if self._claims.is_free(n, n + 1)), None)
            if victim is None:
                break                           # all are in use: one more for each request that is in flight
            if self._blocks[victim].dirty:
                claim = yield from self._claims.take(victim, victim + 1)    # it is free: this does not wait
                try:
                    yield from self._clean(victim)
                finally:
                    self._claims.give(claim)
            self._blocks.pop(victim, None)
        self._blocks[number] = block

    # Values

    def _numbers(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks that a range touches: first <= number < stop."""
        return offset // self._block, -(-(offset + length) // self._block)

    def _length_of(self, number: int) -> int:
        return min(self._block, self.size - number * self._block)

    def _pieces(self, offset: int, data: BytesLike) -> list[tuple[int, int, memoryview]]:
        """Cut a write into (number of the block, where in it, data)."""
        view = memoryview(data)
        pieces, done = [], 0
        while done < len(view):
            number, start = divmod(offset + done, self._block)
            piece = view[done : done + self._block - start]
            pieces.append((number, start, piece))
            done += len(piece)
        return pieces

    def _drop(self, first: int, stop: int, *, dirty_too: bool = True) -> None:
        if stop - first < len(self._blocks):
            numbers = [n for n in range(first, stop) if n in self._blocks]
        else:
            numbers = [n for n in self._blocks if first <= n < stop]
        for number in numbers:
            if dirty_too or not self._blocks[number].dirty:
                del self._blocks[number]
