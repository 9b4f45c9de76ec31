"""Semaphore and SharedResource: so many units, dealt out in the order of arrival."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from homeloop.errors import UsageError, WouldBlock, WrongState
from homeloop.sync.waiting import LoopWaiter, Waitable, Waiter, caller, plain_thread

__all__ = ["Semaphore", "SharedResource"]


class _Units(Waitable):
    """Units that are free, and a line whose head is next: a large request is not starved by small ones."""

    __slots__ = ("_free", "_total")

    def __init__(self, free: int, total: int | None, name: str) -> None:
        super().__init__(name)
        self._free = free                       # under _lock; may be looked at without, for people
        self._total = total                     # None: no bound

    async def _acquire(self, units: int) -> bool:
        if not self._try(units):
            waiter = LoopWaiter(caller(), f"acquire({units})", units)
            if not self._line_up(waiter):
                await self._sleep(waiter)
        return True

    def _acquire_blocking(self, units: int, timeout: float | None) -> bool:
        plain_thread(self, "acquire")
        if self._try(units):
            return True
        waiter = self._thread_waiter(f"acquire({units})", units)
        return self._line_up(waiter) or self._block(waiter, timeout)

    def _try(self, units: int) -> bool:
        with self._lock:
            if self._line or self._free < units:
                return False
            self._free -= units
            return True

    def _take_nowait(self, units: int) -> None:
        if not self._try(units):
            raise WouldBlock(f"{self!r} has not {units} to give now")

    def _put(self, units: int) -> None:
        with self._lock:
            free = self._free + units
            if self._total is not None and free > self._total:
                raise WrongState(f"{self!r}: {units} given back, which makes {free} of {self._total}")
            self._free = free
            woken = self._grant_locked() if self._line else ()
        self._wake(woken)

    def _grant_locked(self) -> Sequence[Waiter]:
        woken = []
        while self._line and next(iter(self._line)).wants <= self._free:
            waiter = self._pop_locked()
            self._free -= waiter.wants
            woken.append(waiter)
        return woken

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        self._free += waiter.wants
        return self._grant_locked()


class Semaphore(_Units):
    """A counter that acquire() takes one from and release() adds to; who is at 0 waits, first come first served.

    `async with` in coroutines, `with` in threads. It has no owner: any coroutine or thread may release.
    value: what it starts with. limit: release() above it is WrongState; None, no limit.
    """

    __slots__ = ()

    def __init__(self, value: int = 1, *, limit: int | None = None, name: str = "") -> None:
        if value < 0 or (limit is not None and limit < value):
            raise UsageError(f"a semaphore starts with 0 or more, at most its limit: value={value}, limit={limit}")
        super().__init__(value, limit, name)

    @property
    def value(self) -> int:
        """What is free now. Any thread."""
        return self._free

    def locked(self) -> bool:
        """Would acquire() wait? Any thread."""
        return self._free == 0 or bool(self._line)

    def acquire(self, timeout: float | None = None) -> Any:
        """Take one. In a coroutine to be awaited, True. In a thread: True, or False after `timeout` seconds."""
        return self._either(timeout, self._acquire, self._acquire_blocking, 1)

    def acquire_nowait(self) -> None:
        """Take one if there is one and nobody waits; else WouldBlock. Any thread."""
        self._take_nowait(1)

    def release(self, n: int = 1) -> None:
        """Add n and let so many go who wait. Any thread, never waits."""
        if n < 1:
            raise UsageError(f"release({n}): 1 or more")
        self._put(n)

    async def __aenter__(self) -> Semaphore:
        await self._acquire(1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put(1)

    def __enter__(self) -> Semaphore:
        self._acquire_blocking(1, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put(1)

    def __repr__(self) -> str:
        return self._describe(f"value={self._free}")


class SharedResource(_Units):
    """n units of something, taken and given back in any amounts (QEMU's SharedResource, but fair).

    In the order of arrival: a request that is too large for now holds up those behind it, so that it is served.
    """

    __slots__ = ()

    def __init__(self, total: int, *, name: str = "") -> None:
        if total < 1:
            raise UsageError(f"a shared resource has 1 unit or more, not {total}")
        super().__init__(total, total, name)

    @property
    def total(self) -> int:
        """All units there are."""
        assert self._total is not None
        return self._total

    @property
    def available(self) -> int:
        """The units that are free now. Any thread."""
        return self._free

    def acquire(self, units: int = 1, timeout: float | None = None) -> Any:
        """Take units. In a coroutine: to be awaited, True. In a thread: True, or False after `timeout` seconds."""
        self._check(units)
        return self._either(timeout, self._acquire, self._acquire_blocking, units)

    def acquire_nowait(self, units: int = 1) -> None:
        """Take units if they are free and nobody waits; else WouldBlock. Any thread."""
        self._check(units)
        self._take_nowait(units)

    def release(self, units: int = 1) -> None:
        """Give units back. Any thread, never waits. WrongState if that makes more than there are."""
        self._check(units)
        self._put(units)

    def take(self, units: int = 1) -> _Taken:
        """`async with resource.take(n)` in a coroutine, `with resource.take(n)` in a thread."""
        self._check(units)
        return _Taken(self, units)

    def _check(self, units: int) -> None:
        if not 1 <= units <= self.total:
            raise UsageError(f"{units} units of {self!r}: 1 to {self.total}")

    def __repr__(self) -> str:
        return self._describe(f"{self._free} of {self._total} free")


class _Taken(contextlib.AbstractContextManager[None], contextlib.AbstractAsyncContextManager[None]):
    """SharedResource.take."""

    def __init__(self, resource: SharedResource, units: int) -> None:
        self._resource = resource
        self._units = units

    async def __aenter__(self) -> None:
        await self._resource._acquire(self._units)

    async def __aexit__(self, *_error: object) -> None:
        self._resource._put(self._units)

    def __enter__(self) -> None:
        self._resource._acquire_blocking(self._units, None)

    def __exit__(self, *_error: object) -> None:
        self._resource._put(self._units)
