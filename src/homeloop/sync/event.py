"""Event: a flag to wait for, set from any thread, waited for by coroutines of any context and by threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from homeloop.sync.waiting import LoopWaiter, Waitable, Waiter, caller, plain_thread

__all__ = ["Event"]


class Event(Waitable):
    """A flag. set() lets everybody go who waits then, also if clear() follows at once.

    Coroutines of any loop and plain threads; what never waits is for any thread, but no signal handler.
    """

    __slots__ = ("_set",)

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._set = False                       # under _lock; may be looked at without

    def is_set(self) -> bool:
        """Is the flag up? Any thread."""
        return self._set

    def set(self) -> None:
        """Raise the flag and wake who waits. Any thread, never waits."""
        with self._lock:
            self._set = True
            woken = self._grant_locked()
        self._wake(woken)

    def clear(self) -> None:
        """Lower the flag. Any thread, never waits."""
        with self._lock:
            self._set = False

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the flag. In a coroutine: `await event.wait()`, True. In a thread: True, or False after `timeout`
        seconds; WouldBlockLoop if the thread serves a loop, also if the flag is up."""
        return self._either(timeout, self._wait, self._wait_blocking)

    def __repr__(self) -> str:
        return self._describe("set" if self._set else "unset")

    async def _wait(self) -> bool:
        if not self._set:
            waiter = LoopWaiter(caller(), "wait")
            if not self._line_up(waiter):
                await self._sleep(waiter)
        return True

    def _wait_blocking(self, timeout: float | None) -> bool:
        plain_thread(self, "wait")
        if self._set:
            return True
        waiter = self._thread_waiter("wait")
        return self._line_up(waiter) or self._block(waiter, timeout)

    def _grant_locked(self) -> Sequence[Waiter]:
        if not self._set:
            return ()
        return [self._pop_locked() for _ in range(len(self._line))]

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        return ()                               # the flag was for everybody
