"""What Faults and their filters share: which fate was decided on, and how often the devices have crashed."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from homeloop.block.fates import Crash, Drop, Fail, Fate, Keep, Torn

__all__ = ["Crashes", "Decided"]


@dataclass(frozen=True, slots=True)
class Decided:
    """A fate that meets a request."""

    rule: str
    fate: Fate
    chance: random.Random       # the rule's

    @property
    def ends(self) -> bool:
        """Does the request go no further?"""
        return isinstance(self.fate, Fail | Drop | Crash | Torn)


class Crashes:
    """The crashes so far. Any thread; the filters notice at their homes, with their next step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()           # a leaf
        # Under _lock when written.
        self._keeps: tuple[Keep, ...] = ()      # of each crash, what survives; kept: a filter may have slept through it
        self._crashed = False

    @property
    def is_crashed(self) -> bool:
        return self._crashed

    @property
    def count(self) -> int:
        return len(self._keeps)

    def keep_of(self, number: int) -> tuple[Keep, random.Random]:
        """What survives the crash of that number, from 0, and the chance that decides about it."""
        return self._keeps[number], random.Random(f"{self._seed}/crash/{number}")

    def crash(self, keep: Keep) -> None:
        """A device that is down already does not crash again."""
        with self._lock:
            if not self._crashed:
                self._crashed = True
                self._keeps = (*self._keeps, keep)

    def recover(self) -> None:
        with self._lock:
            self._crashed = False
