"""Extents: which parts of a device are holes, or read as zeroes. What a driver says of that, made fit for a client.

A driver may answer in pieces of any length, neighbours alike, and reach beyond what was asked. settle() makes of it
what clients may rely on (NBD BS2 to BS4): from the offset on without gaps, not beyond the end of the request,
neighbours differ, and none begins or ends inside a granule: one that is partly data is data. Plain functions of
values; they run where the driver's method does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final, TypeAlias

from homeloop.errors import BlockError

__all__ = ["EXTENTS_MAX", "Extent", "settle"]

# length in bytes; hole: nothing is allocated here; zero: reads as zeroes
Extent: TypeAlias = tuple[int, bool, bool]

# Of one answer, and so of the time it takes: about 1 ms. Who wants to know more asks again from its end.
EXTENTS_MAX: Final = 1024

# NBD BS4: lengths are multiples of it.
_GRANULE_MIN: Final = 512


def settle(
    found: object, label: str, offset: int, length: int, *, granule: int = _GRANULE_MIN, extents_max: int = EXTENTS_MAX
) -> list[Extent]:
    """Return at least one extent of the range, at most `extents_max`; what comes behind them is not looked at.

    found: the driver's answer, an iterable of (length, hole, zero). Raises BlockError(EIO), naming `label`, for one
    that is wrong; what the iterable raises passes.
    """
    if not isinstance(found, Iterable):
        raise BlockError(errno.EIO, f"{label} returned {type(found).__name__}, not an iterable of extents")
    runs = _Runs(offset, max(granule, _GRANULE_MIN))
    end = offset + length
    for extent in found:
        try:
            piece, hole, zero = extent
        except (TypeError, ValueError):
            raise BlockError(errno.EIO, f"{label} gave {extent!r}, not (length, hole, zero)") from None
        if type(piece) is not int or piece <= 0:
            raise BlockError(errno.EIO, f"{label} gave an extent of length {piece!r} at {runs.end}")
        runs.add(min(piece, end - runs.end), bool(hole), bool(zero))
        if runs.end == end or len(runs.ended) > extents_max:
            break
    if runs.end == offset:
        raise BlockError(errno.EIO, f"{label} gave no extent of {length} bytes at {offset}")
    if runs.end < end:
        runs.fill(end)
    return runs.taken(extents_max)


class _Runs:
    """Extents so far, the last of them still growing."""

    def __init__(self, offset: int, granule: int) -> None:
        self.end = offset
        self.ended: list[list[int]] = []        # end, hole, zero of each run
        self._start = offset
        self._in_granule = granule - 1

    def add(self, length: int, hole: bool, zero: bool) -> None:
        """Append a piece; if it begins inside a granule, that granule is what both sides are."""
        inside = self.end & self._in_granule
        if inside and self.ended and self.ended[-1][1:] != [hole, zero]:
            _, last_hole, last_zero = self.ended[-1]
            first = self.end - inside
            self._split(max(first, self._start), bool(last_hole and hole), bool(last_zero and zero))
            taken = min(length, self._in_granule + 1 - inside)
            self._grow(taken)
            length -= taken
            if not length:
                return
        if self.ended and self.ended[-1][1:] == [hole, zero]:
            self._grow(length)
        else:
            self.end += length
            self.ended.append([self.end, hole, zero])

    def fill(self, limit: int) -> None:
        """The driver said no more: what is left of a granule that it began is data."""
        inside = self.end & self._in_granule
        if inside:
            self.add(min(self._in_granule + 1 - inside, limit - self.end), False, False)

    def taken(self, extents_max: int) -> list[Extent]:
        extents = []
        start = self._start
        for end, hole, zero in self.ended[:extents_max]:
            extents.append((end - start, bool(hole), bool(zero)))
            start = end
        return extents

    def _grow(self, length: int) -> None:
        self.end += length
        self.ended[-1][0] = self.end

    def _split(self, at: int, hole: bool, zero: bool) -> None:
        """Let the last run end at `at`; what it had behind that is of another kind."""
        if self.ended[-1][1:] == [hole, zero]:
            return
        end = self.ended[-1][0]
        begin = self.ended[-2][0] if len(self.ended) > 1 else self._start
        if at > begin:
            self.ended[-1][0] = at
        else:
            self.ended.pop()
        if self.ended and self.ended[-1][1:] == [hole, zero]:
            self.ended[-1][0] = end
        else:
            self.ended.append([end, hole, zero])
