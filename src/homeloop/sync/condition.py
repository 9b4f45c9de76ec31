"""Condition: wait under a lock until somebody says that something has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Protocol

from homeloop.errors import UsageError, WouldDeadlock, WrongState
from homeloop.sync.mutex import Mutex
from homeloop.sync.waiting import LoopWaiter, ThreadWaiter, Waitable, Waiter, caller, name_of, plain_thread

__all__ = ["Condition"]


class _Lock(Protocol):
    """Mutex, or a side of an RwLock."""

    def held(self) -> bool: ...
    def release(self) -> None: ...
    def acquire_nowait(self) -> None: ...
    async def _acquire(self) -> bool: ...
    def _acquire_blocking(self, timeout: float | None) -> bool: ...


class Condition(Waitable):
    """A condition variable on a Mutex or a side of an RwLock (`Condition(rwlock.write)`); a Mutex of its own if None.

    `async with condition` in coroutines, `with condition` in threads, which takes the lock. A notified waiter who was
    cancelled passes the notification on. Waiting and notifying are for who has the lock, in any thread.
    """

    __slots__ = ("lock",)

    def __init__(self, lock: _Lock | None = None, name: str = "") -> None:
        super().__init__(name)
        self.lock: _Lock = Mutex(name) if lock is None else lock

    def acquire(self, timeout: float | None = None) -> Any:
        """As the lock's."""
        return self._either(timeout, self.lock._acquire, self.lock._acquire_blocking)

    def release(self) -> None:
        """As the lock's."""
        self.lock.release()

    def wait(self, timeout: float | None = None) -> Any:
        """Let the lock go, wait for a notification, take the lock again; the caller has it.

        In a coroutine: `await condition.wait()`, True; a cancelled one takes the lock again before CancelledError is
        raised. In a thread: True, or False if `timeout` seconds were over first; the lock is taken again then too.
        Somebody may have been faster: look at what you wait for again, or use wait_for().
        """
        return self._either(timeout, self._wait, self._wait_blocking)

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> Any:
        """wait() until predicate() is true; it is called with the lock held. Its value, in a thread after `timeout`
        seconds perhaps a false one."""
        if timeout is not None and timeout < 0:
            raise UsageError(f"a timeout of {timeout} s")
        return self._either(timeout, self._wait_for, self._wait_for_blocking, predicate)

    def notify(self, n: int = 1) -> None:
        """Wake the n who wait longest; they run once the lock is free. The caller has the lock, else WrongState."""
        self._check_held("notify")
        self._notify(n)

    def notify_all(self) -> None:
        """Wake everybody who waits now."""
        self._check_held("notify_all")
        self._notify(len(self._line))

    async def __aenter__(self) -> Condition:
        await self.lock._acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.lock.release()

    def __enter__(self) -> Condition:
        self.lock._acquire_blocking(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.lock.release()

    def __repr__(self) -> str:
        return self._describe(f"on {self.lock!r}")

    # -- inside -----------------------------------------------------------------------------------------

    def _check_held(self, what: str) -> None:
        if not self.lock.held():
            raise WrongState(f"{what} of {self!r} by {name_of(caller())}, which does not own its lock")

    def _stand_in_line(self, waiter: Waiter) -> None:
        """In line first, then let go: a notification in between is for us."""
        with self._lock:
            self._join_locked(waiter)
        self.lock.release()

    async def _wait(self) -> bool:
        self._check_held("wait")
        waiter = LoopWaiter(caller(), "wait")
        self._stand_in_line(waiter)
        try:
            await self._sleep(waiter)
        except GeneratorExit:                   # the coroutine is being closed: it may not wait for the lock
            raise
        except BaseException:
            await self._lock_again()
            raise
        error = await self._lock_again()
        if error is not None:
            self._notify(1)                     # ours: we will not act on it
            raise error
        return True

    async def _lock_again(self) -> BaseException | None:
        """Take the lock, cancelled as often as you like; the last cancellation, if there was one."""
        cancelled = None
        while True:
            try:
                await self.lock._acquire()
            except (GeneratorExit, WouldDeadlock):
                raise
            except BaseException as error:
                cancelled = error
            else:
                return cancelled

    def _wait_blocking(self, timeout: float | None) -> bool:
        plain_thread(self, "wait")
        self._check_held("wait")
        waiter: ThreadWaiter = self._thread_waiter("wait")
        self._stand_in_line(waiter)
        try:
            return self._block(waiter, timeout)
        finally:
            self.lock._acquire_blocking(None)

    async def _wait_for(self, predicate: Callable[[], object]) -> object:
        result = predicate()
        while not result:
            await self._wait()
            result = predicate()
        return result

    def _wait_for_blocking(self, predicate: Callable[[], object], timeout: float | None) -> object:
        plain_thread(self, "wait_for")
        end = None if timeout is None else monotonic() + timeout
        result = predicate()
        while not result:
            left = None if end is None else end - monotonic()
            if left is not None and left <= 0:
                break
            self._wait_blocking(left)
            result = predicate()
        return result

    def _notify(self, n: int) -> None:
        with self._lock:
            woken = [self._pop_locked() for _ in range(min(n, len(self._line)))]
        self._wake(woken)

    def _grant_locked(self) -> Sequence[Waiter]:
        return ()                               # only notify() lets anybody go

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        return [self._pop_locked()] if self._line else ()
