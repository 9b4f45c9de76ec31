"""The question what a range is made of: to the driver in its blocks, back for the bytes that were asked about.

Home thread, but for plain methods on a worker: there the driver's generator runs too.
"""

from __future__ import annotations

from typing import cast

from homeloop.block.answers import read_extents
from homeloop.block.calling import Method, Unrun, Way
from homeloop.block.extents import Extent
from homeloop.block.reshaping import Reshaper, cut_extents

__all__ = ["Questions"]


class Questions:
    """A driver's extents method, or none: then all is data."""

    def __init__(self, method: Method | None, reshaper: Reshaper, block: int, longest: int, label: str) -> None:
        self._method = method
        self._reshaper = reshaper
        self._block = block
        self._longest = longest
        self._label = f"{label}.extents"

    def now(self, offset: int, length: int, extents_max: int) -> list[Extent] | Unrun | None:
        """Ask without waiting. Unrun: for later(), which then waits for it; None: only later() can ask."""
        method = self._method
        if method is None:
            return [(length, False, False)]
        if method.way is not Way.INLINE and method.way is not Way.DIRECT:
            return None
        found = method.now(*self._around(offset, length))
        return found if type(found) is Unrun else self._read(found, offset, length, extents_max)

    async def later(self, offset: int, length: int, extents_max: int, begun: Unrun | None) -> list[Extent]:
        """Ask and wait for the answer."""
        method = self._method
        assert method is not None, "no method to wait for"
        if method.way is Way.WORKER:
            return cast("list[Extent]", await method.running(self._settled, method, offset, length, extents_max))
        found = await (method.later(*self._around(offset, length)) if begun is None else method.finish(begun))
        return self._read(found, offset, length, extents_max)

    def _settled(self, method: Method, offset: int, length: int, extents_max: int) -> list[Extent]:
        return self._read(method.now(*self._around(offset, length)), offset, length, extents_max)

    def _read(self, found: object, offset: int, length: int, extents_max: int) -> list[Extent]:
        start, around = self._around(offset, length)
        settled = read_extents(found, self._label, start, around, granule=self._block, extents_max=extents_max)
        return settled if around == length else cut_extents(settled, offset - start, length)

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """What the driver is asked about: whole blocks, no more than it takes."""
        start, end = self._reshaper.outer(offset, length)
        return start, min(end - start, self._longest)
