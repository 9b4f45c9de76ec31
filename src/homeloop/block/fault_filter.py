"""The filter that lets requests meet what Faults say, and holds the volatile write cache if they want one."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from typing import Any, Final, Protocol

from homeloop.block.device import Answer, Device
from homeloop.block.driver import Driver
from homeloop.block.fates import Crash, Damage, Delayed, Drop, Fail, Stall, Torn
from homeloop.block.fault_state import Crashes, Decided
from homeloop.block.filters.passing import Funnel
from homeloop.block.filters.requests import CHANGES, Request, perform
from homeloop.block.filters.steps import Claims, Steps, at_once
from homeloop.block.volatile import Volatile
from homeloop.errors import BlockError, ConnectionDropped, UsageError

__all__ = ["FaultFilter", "Script"]

# What the volatile cache holds at most; then all of it goes to the medium, as it does in a disk when its cache is full.
_VOLATILE_BYTES_MAX: Final = 64 << 20
_CHANGES_MAX: Final = 10_000


class Script(Protocol):
    """What the filter needs of Faults."""

    volatile: bool

    @property
    def crashes(self) -> Crashes: ...

    def clear(self) -> None: ...

    def decide(self, request: Request) -> list[Decided]: ...


class FaultFilter(Funnel):
    """The driver below, with faults. Use faults.over(driver). Home thread, as all drivers; the faults are any thread's.

    UsageError for a volatile cache over a driver that can write but not flush: nothing could be made stable.
    """

    def __init__(self, driver: Driver | Device, faults: Script) -> None:
        super().__init__(driver)
        self.faults = faults
        self._crashes_seen = faults.crashes.count                       # home
        self._volatile: Volatile | None = None                          # home
        self._medium = Claims()                                         # who writes to the medium under the cache
        if faults.volatile and self.inner.can_write:
            if not self.inner.can_flush:
                raise UsageError(f"a volatile write cache over {self.inner!r}, which has no flush")
            self._volatile = Volatile()

    @property
    def unflushed(self) -> int:
        """How many changes a crash may lose. Any thread."""
        return 0 if self._volatile is None else len(self._volatile)

    def ask(self, request: Request) -> Answer[Any]:
        met = self.faults.decide(request)
        if not met and self._volatile is None and not self.faults.crashes.is_crashed:
            answer = perform(self.inner, request)
            return at_once(self._uncrashed(answer)) if asyncio.iscoroutine(answer) else answer
        return at_once(self._suffered(request, met))

    async def resize(self, size: int) -> None:
        before = self.size
        await super().resize(size)
        if self._volatile is not None and size < before:
            self._volatile.cut(size, before - size)

    def _uncrashed(self, answer: Any) -> Steps[Any]:
        """An answer that comes after a crash does not come."""
        crashes = self.faults.crashes.count
        result = yield answer
        self._check_up(crashes)
        return result

    def _suffered(self, request: Request, met: list[Decided]) -> Steps[Any]:
        self._notice_crashes()
        crashes = self._crashes_seen
        self._check_up(crashes)
        damages: list[Decided] = []
        for decided in met:
            fate = decided.fate
            if isinstance(fate, Delayed):
                yield asyncio.sleep(fate.seconds)
            elif isinstance(fate, Stall):
                yield fate.wait()
            elif isinstance(fate, Torn):
                return (yield from self._torn(request, fate))
            elif isinstance(fate, Damage):
                damages.append(decided)
            else:
                self._end(request, fate)
            self._check_up(crashes)
        if request.kind == "write" and damages:
            assert request.data is not None, "a write without data"
            data = request.data
            for decided in damages:
                assert isinstance(decided.fate, Damage)
                data = decided.fate.done_to(data, decided.chance)
            request = replace(request, data=data)
        answer = yield from self._done(request)
        self._check_up(crashes)
        if request.kind == "read":
            for decided in damages:
                assert isinstance(decided.fate, Damage)
                answer = decided.fate.done_to(answer, decided.chance)
        return answer

    def _end(self, request: Request, fate: Fail | Drop | Crash) -> None:
        """Let the request fail."""
        if isinstance(fate, Drop):
            raise ConnectionDropped(f"{request}: dropped connection")
        if isinstance(fate, Crash):
            self.faults.crashes.crash(fate.keep)
            self._notice_crashes()
            raise BlockError(errno.EIO, f"{request}: the device crashed")
        raise BlockError(fate.errno, fate.text or f"{request}: injected fault")

    def _torn(self, request: Request, fate: Torn) -> Steps[None]:
        sector = max(fate.sector_bytes, self.block_size_min)
        length = min(fate.sectors * sector, request.length)
        data = None if request.data is None else memoryview(request.data)[:length]
        part = replace(request, length=length, data=data)
        if fate.then != "crash":
            if length:
                yield from self._done(part)
            if fate.then == "error":
                raise BlockError(fate.errno, f"{request}: torn after {length} bytes")
            return
        if length:
            yield from self._to_medium(part)
        self._end(request, Crash(fate.keep))

    # The volatile cache; without one, all goes to the driver below

    def _done(self, request: Request) -> Steps[Any]:
        volatile = self._volatile
        if volatile is None:
            return (yield perform(self.inner, request))
        if request.kind == "read":
            changes = volatile.changes          # a flush may take them away while we read what is below
            below = yield perform(self.inner, request)
            return volatile.seen(request.offset, below, changes)
        if request.kind == "extents":
            if volatile.touches(request.offset, request.length):
                return [(request.length, False, False)]         # always a safe answer
            return (yield perform(self.inner, request))
        if request.kind == "flush":
            return (yield from self._flushed())
        if request.kind not in CHANGES:
            return (yield perform(self.inner, request))
        if request.fua:
            return (yield from self._to_medium(request))
        if volatile.data_bytes + request.length > _VOLATILE_BYTES_MAX or len(volatile) >= _CHANGES_MAX:
            yield from self._flushed()
        volatile.add(request.offset, request.length, request.data)
        return None

    def _to_medium(self, request: Request) -> Steps[None]:
        """Write through: this change alone is stable then, what lies under it in the cache is overtaken."""
        claim = yield from self._medium.take(0, 1)
        try:
            yield perform(self.inner, replace(request, fua=self.inner.can_fua and request.kind == "write"))
            if self._volatile is not None:
                self._volatile.cut(request.offset, request.length)
        finally:
            self._medium.give(claim)

    def _flushed(self) -> Steps[None]:
        """Bring what is in the cache to the medium, in order. What is changed meanwhile stays for the next flush."""
        volatile = self._volatile
        assert volatile is not None, "no cache to flush"
        claim = yield from self._medium.take(0, 1)
        try:
            crashes = self._crashes_seen
            changes = volatile.changes
            for change in changes:
                if change.data is None:
                    yield self.inner.write_zeroes(change.offset, change.length)
                else:
                    yield self.inner.write(change.offset, change.data)
                self._check_up(crashes)
            yield self.inner.flush()
            self._check_up(crashes)
            volatile.forget(changes)
        finally:
            self._medium.give(claim)

    # Crashes

    def _notice_crashes(self) -> None:
        """Lose what the crashes since the last look have lost."""
        crashes = self.faults.crashes
        while self._crashes_seen < crashes.count:
            keep, chance = crashes.keep_of(self._crashes_seen)
            self._crashes_seen += 1
            if self._volatile is not None:
                self._volatile.crash(keep, chance)

    def _check_up(self, crashes_before: int) -> None:
        """Raise EIO for a request that goes on in a device that is down, or was meanwhile."""
        crashes = self.faults.crashes
        if crashes.is_crashed or crashes.count != crashes_before:
            self._notice_crashes()
            raise BlockError(errno.EIO, "the device has crashed")
