"""Barrier: so many parties wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from homeloop.errors import BarrierBroken, UsageError
from homeloop.sync.waiting import LoopWaiter, Waitable, Waiter, caller, plain_thread

__all__ = ["Barrier"]

_BROKEN = -1


class Barrier(Waitable):
    """Coroutines and threads wait here until `parties` of them do; then all go on, and it starts again.

    Who is cancelled or times out leaves, and the others wait for one more (as with asyncio, not with threading).
    Coroutines of any loop and plain threads; what never waits is for any thread, but no signal handler.
    """

    __slots__ = ("_broken", "parties")

    def __init__(self, parties: int, *, name: str = "") -> None:
        if parties < 1:
            raise UsageError(f"a barrier has 1 party or more, not {parties}")
        super().__init__(name)
        self.parties = parties
        self._broken = False                    # under _lock

    @property
    def n_waiting(self) -> int:
        """How many wait now. Any thread."""
        return len(self._line)

    @property
    def broken(self) -> bool:
        """Was it given up? Any thread."""
        return self._broken

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the others; return a number from 0, another one for each party, in the order of arrival.

        In a coroutine to be awaited. BarrierBroken after abort(); TimeoutError in a thread after `timeout` seconds.
        """
        return self._either(timeout, self._wait, self._wait_blocking)

    def abort(self) -> None:
        """Give it up: who waits, now or later, gets BarrierBroken. Any thread, never waits."""
        self._break(True)

    def reset(self) -> None:
        """Start again: who waits gets BarrierBroken, who comes later waits. Any thread, never waits."""
        self._break(False)

    def __repr__(self) -> str:
        return self._describe(f"{'broken' if self._broken else 'open'} parties={self.parties}")

    async def _wait(self) -> int:
        waiter = LoopWaiter(caller(), "wait")
        if not self._line_up(waiter):
            await self._sleep(waiter)
        return self._outcome(waiter)

    def _wait_blocking(self, timeout: float | None) -> int:
        plain_thread(self, "wait")
        waiter = self._thread_waiter("wait")
        if not self._line_up(waiter) and not self._block(waiter, timeout):
            raise TimeoutError(f"{self!r}: not all parties came within {timeout} s")
        return self._outcome(waiter)

    def _outcome(self, waiter: Waiter) -> int:
        if waiter.value is _BROKEN:
            raise BarrierBroken(f"{self!r} was given up")
        number: int = waiter.value
        return number

    def _break(self, for_good: bool) -> None:
        with self._lock:
            self._broken = for_good
            woken = [self._pop_as_locked(_BROKEN) for _ in range(len(self._line))]
        self._wake(woken)

    def _pop_as_locked(self, value: int) -> Waiter:
        waiter = self._pop_locked()
        waiter.value = value
        return waiter

    def _grant_locked(self) -> Sequence[Waiter]:
        if self._broken:
            return [self._pop_as_locked(_BROKEN) for _ in range(len(self._line))]
        if len(self._line) < self.parties:
            return ()
        return [self._pop_as_locked(number) for number in range(self.parties)]

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        return ()                               # all have come: that cannot be taken back
