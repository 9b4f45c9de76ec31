"""Fairness under greed, counted in turns: nine of mixed kind want a lock again as soon as they have let go.

Turns, not seconds: on a busy machine a thread waits long for a processor, which is no fault of the lock. So whoever has
the lock keeps it until all the others stand in line; from there on only the lock decides. The last test shows that a
lock which lets in who comes first fails the same measurement.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from homeloop.sync import Mutex, RwLock, Semaphore, SharedResource
from homeloop.sync.waiting import LoopWaiter, Waitable, Waiter, caller
from tests.core.bounded import until
from tests.sync.parties import Parties, Script, iothread, stock, threads

PARTIES = 9             # two coroutines of each loop, a thread more
TURNS = 270
MIXED = (iothread, iothread, stock, threads)


class Turns:
    """Who had the lock how often, and for how many turns of others he had waited each time."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.had = [0] * PARTIES
        self.waits: list[int] = []
        self._asked = [0] * PARTIES

    def script(self, number: int) -> Script:
        while sum(self.had) < TURNS:
            self._asked[number] = sum(self.had)
            yield self._lock.acquire
            self.waits.append(sum(self.had) - self._asked[number])
            self.had[number] += 1
            until(lambda: len(self._lock.waiters()) == PARTIES - 1 or sum(self.had) > TURNS - PARTIES, self._lock)
            yield self._lock.release

    def jain(self) -> float:
        """1: all had the same; 1/n: one had everything."""
        return sum(self.had) ** 2 / (len(self.had) * sum(had * had for had in self.had))

    def check(self) -> None:
        assert sum(self.had) >= TURNS
        assert max(self.waits) <= 3 * statistics.median(self.waits), sorted(self.waits)
        assert self.jain() > 0.95, self.had


def compete(lock: Any, parties: Parties) -> Turns:
    """All are in line before the first has it."""
    turns = Turns(lock)
    lock.acquire()                      # this thread
    for number in range(PARTIES):
        parties.start(turns.script(number))
        until(lambda number=number: len(lock.waiters()) == number + 1, lock)
    lock.release()
    parties.results()
    return turns


@pytest.fixture
def mixed() -> Iterator[Parties]:
    with contextlib.ExitStack() as stack:
        yield Parties([stack.enter_context(kind()) for kind in MIXED])


class WriteSide:
    """Of an RwLock, with what is asked of a lock here."""

    def __init__(self) -> None:
        lock = RwLock()
        self.acquire, self.release, self.waiters = lock.write.acquire, lock.release, lock.waiters


@pytest.mark.parametrize("make", [Mutex, Semaphore, WriteSide, lambda: SharedResource(1)],
                         ids=["Mutex", "Semaphore", "RwLock", "SharedResource"])
def test_nine_greedy_ones_take_turns(make: Callable[[], Any], mixed: Parties) -> None:
    compete(make(), mixed).check()


class Barging(Waitable):
    """A lock that is free when it is let go: who waits longest is woken, and has it if nobody was faster."""

    __slots__ = ("_free", "_wanting")

    def __init__(self) -> None:
        super().__init__()
        self._free = True
        self._wanting: set[Any] = set()

    def waiters(self) -> tuple[str, ...]:
        """Also who was woken and has not run yet: it stands in no line, and is about to again."""
        return tuple(map(str, self._wanting))

    def acquire(self) -> Any:
        return self._either(None, self._acquire, self._acquire_blocking)

    async def _acquire(self) -> None:
        while not self._take():
            waiter = LoopWaiter(caller(), "acquire")
            if not self._line_up(waiter):
                await self._sleep(waiter)

    def _acquire_blocking(self, timeout: None) -> None:
        while not self._take():
            waiter = self._thread_waiter("acquire")
            if not self._line_up(waiter):
                self._block(waiter, timeout)

    def _take(self) -> bool:
        with self._lock:
            took, self._free = self._free, False
            (self._wanting.discard if took else self._wanting.add)(caller())
            return took

    def release(self) -> None:
        with self._lock:
            self._free = True
            woken = self._grant_locked()
        self._wake(woken)

    def _grant_locked(self) -> Sequence[Waiter]:
        return [self._pop_locked()] if self._free and self._line else ()

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        return self._grant_locked()


def test_a_barging_lock_fails(mixed: Parties) -> None:
    turns = compete(Barging(), mixed)
    with pytest.raises(AssertionError):
        turns.check()
    assert turns.jain() < 0.95          # and by this alone, too
    assert max(turns.waits) > 3 * statistics.median(turns.waits)
