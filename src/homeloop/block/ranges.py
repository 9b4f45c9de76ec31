"""Who may change which bytes just now: a change of whole blocks, or one that reads, modifies and writes back.

Two of whole blocks may overlap: which of them wins is open. One that writes back what it has read must not overlap
any other change, or that is lost. First come, first served; what does not overlap does not wait.
"""

from __future__ import annotations

import asyncio

__all__ = ["Range", "Ranges"]


class Range:
    """One change: [start, end), from its take() to its give()."""

    __slots__ = ("alone", "end", "given", "start")

    def __init__(self, start: int, end: int, alone: bool) -> None:
        self.start = start
        self.end = end
        self.alone = alone
        self.given: asyncio.Future[None] | None = None      # made by the first that waits for it


class Ranges:
    """The changes of one device that are under way or wait. Home thread only; as many as requests in flight."""

    def __init__(self) -> None:
        self._taken: list[Range] = []           # in the order of their coming

    def is_free(self, start: int, end: int, *, alone: bool = False) -> bool:
        """Would take() not wait?"""
        return not (self._taken and self._in_the_way(start, end, alone))

    async def take(self, start: int, end: int, *, alone: bool = False) -> Range:
        """Wait for all that came before and is in the way. Cancelled: nothing is taken."""
        before = self._in_the_way(start, end, alone)
        taken = Range(start, end, alone)
        self._taken.append(taken)
        try:
            for other in before:                # each came before us: no two wait for each other
                while other in self._taken:
                    if other.given is None or other.given.done():
                        other.given = asyncio.get_running_loop().create_future()
                    # Of several that wait one may be cancelled: the future is everybody's.
                    await asyncio.shield(other.given)
        except BaseException:
            self.give(taken)
            raise
        return taken

    def give(self, taken: Range) -> None:
        """Let those go on that wait for it. Once."""
        self._taken.remove(taken)
        if taken.given is not None and not taken.given.done():
            taken.given.set_result(None)

    def _in_the_way(self, start: int, end: int, alone: bool) -> list[Range]:
        return [
            other for other in self._taken
            if other.start < end and start < other.end and (alone or other.alone)
        ]
