"""OneShot: one result, set from any thread, awaited in any context or waited for in a thread."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Generic, TypeVar

from homeloop.errors import WrongState
from homeloop.sync.waiting import LoopWaiter, Waitable, Waiter, caller, plain_thread

__all__ = ["OneShot"]

T = TypeVar("T")


class OneShot(Waitable, Generic[T]):
    """A result or an exception that comes once; any number may wait. Cancelling a waiter leaves it to the others.

    `await` it in a coroutine of any loop, result() in a plain thread; the rest: any thread, but no signal handler.
    """

    __slots__ = ("_done", "_exception", "_result")

    _result: T                                  # set before _done

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._done = False                      # under _lock; may be looked at without
        self._exception: BaseException | None = None        # set before _done

    def done(self) -> bool:
        """Has it come? Any thread."""
        return self._done

    def set_result(self, result: T) -> None:
        """Let it come. Any thread, never waits. WrongState if it has."""
        with self._lock:
            self._check_pending_locked()
            self._result = result
            self._done = True
            woken = self._grant_locked()
        self._wake(woken)

    def set_exception(self, exception: BaseException) -> None:
        """Let it come as an exception, which everybody who waits raises. Any thread, never waits."""
        with self._lock:
            self._check_pending_locked()
            self._exception = exception
            self._done = True
            woken = self._grant_locked()
        self._wake(woken)

    def __await__(self) -> Generator[Any, Any, T]:
        """Wait for it, in a coroutine of any context or asyncio loop."""
        if not self._done:
            yield from self._wait().__await__()
        return self._outcome()

    def result(self, timeout: float | None = None) -> T:
        """Wait for it, in a thread without a loop; TimeoutError after `timeout` seconds. Anywhere if it has come."""
        if not self._done:
            plain_thread(self, "result")
            waiter = self._thread_waiter("result")
            if not self._line_up(waiter) and not self._block(waiter, timeout):
                raise TimeoutError(f"{self!r} did not come within {timeout} s")
        return self._outcome()

    def __repr__(self) -> str:
        return self._describe("pending" if not self._done else "failed" if self._exception is not None else "done")

    async def _wait(self) -> None:
        waiter = LoopWaiter(caller(), "result")
        if not self._line_up(waiter):
            await self._sleep(waiter)

    def _outcome(self) -> T:
        if self._exception is not None:
            raise self._exception
        return self._result

    def _check_pending_locked(self) -> None:
        if self._done:
            raise WrongState(f"{self!r} has come already; it comes once")

    def _grant_locked(self) -> Sequence[Waiter]:
        return [self._pop_locked() for _ in range(len(self._line))] if self._done else ()

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        return ()                               # it was for everybody
