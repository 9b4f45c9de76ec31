"""Requests that a driver cannot take as they are: too long for it, or not in its blocks.

Too long ones are split. Of one that is not in whole blocks the blocks around it are read; a change reads the blocks at
its edges, modifies them and writes them back. That is one change: nothing that overlaps these blocks comes in
between (see homeloop.block.ranges). Home thread only.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from homeloop.block.answers import check_written
from homeloop.block.calling import Method, Way, plain_bytes
from homeloop.block.changes import Step
from homeloop.block.driver import BytesLike
from homeloop.block.extents import Extent
from homeloop.block.ranges import Ranges
from homeloop.errors import BlockError

__all__ = ["Reshaper", "Writing", "cut_extents", "pieces"]

_ZEROES: Final = bytes(1 << 16)         # the largest block


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """The driver's methods for writes."""

    write: Method | None
    write_fua: Method | None
    flush: Method | None


class Reshaper:
    """The driver's read and write, for requests of any length at any offset."""

    def __init__(self, block: int, longest: int, ranges: Ranges | None, read: Method, writing: Writing) -> None:
        self._block = block
        self._in_block = block - 1
        self._longest = longest             # of one call; a multiple of block
        self._ranges = ranges               # None: the blocks are not hidden, so nothing is read to be written back
        self._read = read
        self._writing = writing
        self.reads_inline = read.way is Way.INLINE
        self._writes_inline = self.reads_inline and all(
            method is None or method.way is Way.INLINE for method in (writing.write, writing.write_fua, writing.flush)
        )

    def outer(self, offset: int, length: int) -> tuple[int, int]:
        """Return start and end of the whole blocks around a range."""
        return offset & ~self._in_block, (offset + length + self._in_block) & ~self._in_block

    def inner(self, offset: int, length: int) -> tuple[int, int]:
        """Return start and end of the whole blocks inside a range; end <= start if there are none."""
        return (offset + self._in_block) & ~self._in_block, (offset + length) & ~self._in_block

    def can_write_now(self, offset: int, length: int) -> bool:
        """Would write() end without waiting?"""
        start, end = self.outer(offset, length)
        return self._writes_inline and (self._ranges is None or self._ranges.is_free(start, end, alone=True))

    async def read(self, offset: int, length: int) -> BytesLike:
        """Read the blocks around the range; return what was asked for."""
        start, end = self.outer(offset, length)
        data = await self._read_blocks(start, end)
        return data if end - start == length else memoryview(data)[offset - start : offset - start + length]

    async def write(self, offset: int, data: BytesLike, *, fua: bool) -> None:
        """Write the blocks around the range, with what the driver has at its edges; flush if it is to be stable."""
        start, end = self.outer(offset, len(data))
        if self.can_write_now(offset, len(data)) or self._ranges is None:
            await self._write_blocks(start, end, offset, data, fua)
            return
        taken = await self._ranges.take(start, end, alone=end - start != len(data))
        try:
            await self._write_blocks(start, end, offset, data, fua)
        finally:
            self._ranges.give(taken)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, fast: bool, whole: Callable[[int, int], Iterator[Step]]
    ) -> None:
        """Zero the whole blocks inside by the steps of whole(offset, length), then what is left at the edges."""
        start, end = self.inner(offset, length)
        if start >= end:
            if fast:
                raise BlockError(errno.ENOTSUP, f"{length} bytes at {offset} are no whole block: they must be written")
            await self.write(offset, _ZEROES[:length] if length <= len(_ZEROES) else bytes(length), fua=fua)
            return
        assert self._ranges is not None, "not in blocks, and none are hidden"
        taken = await self._ranges.take(start, end)
        try:
            for method, args, options in whole(start, end - start):
                await method.call(*args, **options)
        finally:
            self._ranges.give(taken)
        if offset != start:
            await self.write(offset, _ZEROES[: start - offset], fua=False)
        if offset + length != end:
            await self.write(end, _ZEROES[: offset + length - end], fua=False)
        if fua:
            assert self._writing.flush is not None, "fua without a flush method"
            await self._writing.flush.call()

    async def _write_blocks(self, start: int, end: int, offset: int, data: BytesLike, fua: bool) -> None:
        if end - start != len(data):
            data = await self._with_edges(start, end, offset, data)
        own = self._writing.write_fua if fua else None
        write = own or self._writing.write
        assert write is not None, "a write without a write method"
        view = memoryview(data)
        for at, length in pieces(start, end - start, self._longest):
            done = await write.call(at, view[at - start : at - start + length])
            check_written(done, write.label, at, length)
        if fua and own is None:
            assert self._writing.flush is not None, "fua without a flush method"
            await self._writing.flush.call()

    async def _with_edges(self, start: int, end: int, offset: int, data: BytesLike) -> bytearray:
        """Return data with what the driver has around it, up to whole blocks."""
        block = self._block
        whole = bytearray(end - start)
        if offset != start:
            whole[:block] = await self._read_blocks(start, start + block)
        if offset + len(data) != end and (offset == start or end - start > block):
            whole[-block:] = await self._read_blocks(end - block, end)
        whole[offset - start : offset - start + len(data)] = data
        return whole

    async def _read_blocks(self, start: int, end: int) -> BytesLike:
        found = [
            plain_bytes(await self._read.call(at, length), self._read.label, at, length)
            for at, length in pieces(start, end - start, self._longest)
        ]
        return found[0] if len(found) == 1 else b"".join(found)


def pieces(offset: int, length: int, longest: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of parts that are at most `longest`, in order."""
    end = offset + length
    while offset < end:
        piece = min(longest, end - offset)
        yield offset, piece
        offset += piece


def cut_extents(found: list[Extent], skip: int, length: int) -> list[Extent]:
    """Return what the extents say of `length` bytes from `skip` on; they may end early, and reach over the end."""
    cut: list[Extent] = []
    for piece, hole, zero in found:
        taken = min(piece - skip, length)
        skip = max(0, skip - piece)
        if taken > 0:
            cut.append((taken, hole, zero))
            length -= taken
    return cut
