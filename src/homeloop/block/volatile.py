"""A volatile write cache: changes that are seen and not yet on the medium, in the order in which they were answered.

Values only; who holds it does the reading and writing. One thread at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from homeloop.block.driver import BytesLike
from homeloop.block.fates import Keep

__all__ = ["Change", "Volatile"]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Bytes that were written, or zeroes if there is no data."""

    offset: int
    length: int
    data: bytes | None
    survives: bool = False          # it has outlived a crash: it is on the medium, whatever comes

    @property
    def end(self) -> int:
        return self.offset + self.length

    def part(self, start: int, end: int) -> Change:
        data = None if self.data is None else self.data[start - self.offset : end - self.offset]
        return Change(start, end - start, data, self.survives)


class Volatile:
    """The changes, oldest first. What holds them bounds their bytes: see data_bytes."""

    def __init__(self) -> None:
        self._changes: list[Change] = []
        self.data_bytes = 0             # that the changes take

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, offset: int, length: int, data: BytesLike | None) -> None:
        kept = None if data is None else bytes(data)
        self._set([*self._changes, Change(offset, length, kept)])

    def touches(self, offset: int, length: int) -> bool:
        return any(change.offset < offset + length and offset < change.end for change in self._changes)

    def seen(self, offset: int, below: BytesLike, before: tuple[Change, ...] = ()) -> BytesLike:
        """What a read of these bytes must answer, when `below` is what the medium has.

        before: the changes as they were when it began to be read; what has been flushed since may not be in `below`.
        """
        end, found = offset + len(below), None
        changes = self.changes
        for change in changes if before == changes else (*before, *changes):
            start, stop = max(offset, change.offset), min(end, change.end)
            if start < stop:
                found = bytearray(below) if found is None else found
                part = change.part(start, stop)
                found[start - offset : stop - offset] = bytes(stop - start) if part.data is None else part.data
        return below if found is None else found

    def cut(self, offset: int, length: int) -> None:
        """Forget what older changes say of these bytes: they are on the medium now."""
        end, left = offset + length, []
        for change in self._changes:
            if change.offset >= end or change.end <= offset:
                left.append(change)
                continue
            if change.offset < offset:
                left.append(change.part(change.offset, offset))
            if end < change.end:
                left.append(change.part(end, change.end))
        self._set(left)

    def forget(self, done: Iterable[Change]) -> None:
        """These are on the medium, and flushed."""
        gone = {id(change) for change in done}
        self._set([change for change in self._changes if id(change) not in gone])

    def crash(self, keep: Keep, chance: random.Random) -> None:
        """Lose all but what survives."""
        open_changes = [change for change in self._changes if not change.survives]
        if keep == "random":
            kept = [change for change in open_changes if chance.random() < 0.5]
        else:
            count = chance.randint(0, len(open_changes)) if keep == "prefix" else 0 if keep == "none" else keep
            assert isinstance(count, int)
            kept = open_changes[:count]
        old = [change for change in self._changes if change.survives]
        self._set(old + [Change(change.offset, change.length, change.data, True) for change in kept])

    def _set(self, changes: list[Change]) -> None:
        self._changes = changes
        self.data_bytes = sum(len(change.data) for change in changes if change.data is not None)
