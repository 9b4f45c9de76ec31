"""Semaphore and SharedResource: so many units, dealt out in the order of arrival."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from homeloop.errors import UsageError, WouldBlock, WrongState
from homeloop.sync.waiting import LoopWaiter, Waitable, Waiter, caller, plain_thread

__all__ = ["Semaphore", "SharedResource"]

_TOO_MANY = object()                            # what a request gets that is larger than all there is


class _Units(Waitable):
    """Units that are free, and a line whose head is next: a large request is not starved by small ones."""

    __slots__ = ("_free", "_total")

    _refuses = False                            # requests that are larger than the total; else they wait

    def __init__(self, free: int, total: int | None, name: str) -> None:
        super().__init__(name)
        # Both under _lock; may be looked at without, for people. Less than 0 are free while more are taken than the
        # total is now.
        self._free = free
        self._total = total                     # None: no bound

    async def _acquire(self, units: int) -> bool:
        if not self._try(units):
            waiter = LoopWaiter(caller(), f"acquire({units})", units)
            if not self._line_up(waiter):
                await self._sleep(waiter)
            self._check_served(waiter)
        return True

    def _acquire_blocking(self, units: int, timeout: float | None) -> bool:
        plain_thread(self, "acquire")
        if self._try(units):
            return True
        waiter = self._thread_waiter(f"acquire({units})", units)
        if not self._line_up(waiter) and not self._block(waiter, timeout):
            return False
        self._check_served(waiter)
        return True

    def _check_served(self, waiter: Waiter) -> None:
        if waiter.value is _TOO_MANY:
            raise WrongState(f"{waiter.wants} units of {self!r}: it has become smaller than that")

    def _resize(self, total: int) -> None:
        with self._lock:
            if self._total is None:
                raise WrongState(f"{self!r} has no limit")
            self._free += total - self._total
            self._total = total
            woken = self._grant_locked()
        self._wake(woken)

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
        while self._line:
            wants = next(iter(self._line)).wants
            too_many = self._refuses and wants > self._total
            if wants > self._free and not too_many:
                break
            waiter = self._pop_locked()
            if too_many:                        # at the head: it would hold up everybody, for ever
                waiter.value = _TOO_MANY
            else:
                self._free -= wants
            woken.append(waiter)
        return woken

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        if waiter.value is _TOO_MANY:
            return ()
        self._free += waiter.wants
        return self._grant_locked()


class Semaphore(_Units):
    """A counter that acquire() takes one from and release() adds to; who is at 0 waits, first come first served.

    `async with` in coroutines, `with` in threads. It has no owner: any coroutine or thread may release.
    value: what it starts with. limit: release() above it is WrongState; None, no limit. With one it does what
    anyio.CapacityLimiter does: see resize(). What never waits is for any thread, but no signal handler.
    """

    __slots__ = ()

    def __init__(self, value: int = 1, *, limit: int | None = None, name: str = "") -> None:
        if value < 0 or (limit is not None and limit < value):
            raise UsageError(f"a semaphore starts with 0 or more, at most its limit: value={value}, limit={limit}")
        super().__init__(value, limit, name)

    @property
    def value(self) -> int:
        """What is free now; less than 0 while more are taken than a limit that became smaller. Any thread."""
        return self._free

    @property
    def limit(self) -> int | None:
        """The most there may be, None without a limit; `limit - value` are taken. Any thread."""
        return self._total

    def resize(self, limit: int) -> None:
        """Change the limit, and the value by as much. Any thread, never waits; WrongState if there was none.

        Larger: so many go who wait. Smaller: nobody who has one loses it; what comes back is kept until it fits. At 0
        everybody waits.
        """
        if limit < 0:
            raise UsageError(f"a semaphore's limit is 0 or more, not {limit}")
        self._resize(limit)

    def locked(self) -> bool:
        """Would acquire() wait? Any thread."""
        return self._free <= 0 or bool(self._line)

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
    Coroutines of any loop and plain threads; what never waits is for any thread, but no signal handler.
    """

    __slots__ = ()

    _refuses = True

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
        """The units that are free now; less than 0 while more are taken than there are since resize(). Any thread."""
        return self._free

    def resize(self, total: int) -> None:
        """Change how many units there are, 1 or more. Any thread, never waits.

        Larger: those go who can. Smaller: nobody loses what he has; what comes back is kept until it fits, and who
        waits for more units than there are now gets WrongState when it would be his turn.
        """
        if total < 1:
            raise UsageError(f"a shared resource has 1 unit or more, not {total}")
        self._resize(total)

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
        if units < 1:
            raise UsageError(f"release({units}) of {self!r}: 1 or more")
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
