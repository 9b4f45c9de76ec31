"""Mutex: one owner, a coroutine or a thread; handed over in the order of arrival (QEMU's CoMutex)."""

from __future__ import annotations

import os
import sysconfig
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from homeloop.core.loop import current_task, running_loop
from homeloop.errors import WouldBlock, WouldDeadlock, WrongState
from homeloop.sync.waiting import NOBODY, LoopWaiter, Owned, Waiter, caller, name_of, plain_thread

__all__ = ["Mutex", "TokenInList"]

get_ident = threading.get_ident
allocate_lock = threading.Lock


class _Making:
    """The lock under which a Mutex makes its own, when somebody waits for the first time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()            # under it nothing is taken and nothing called

    def after_fork(self) -> None:
        """In the child: another thread may have had it."""
        self.lock = threading.Lock()


class TokenInList:
    """The token of a Mutex where there is no GIL: an item of a list, whose pop() and append() are atomic there too.

    Stands before the slot `_token`, which has the list then, so that Mutex has one text.
    """

    def __init__(self, slot: Any) -> None:
        self._slot = slot

    def __get__(self, mutex: Any, _kind: Any = None) -> bool:
        if not self._slot.__get__(mutex):
            raise AttributeError("taken")
        return True

    def __set__(self, mutex: Any, _value: bool) -> None:
        try:
            tokens = self._slot.__get__(mutex)
        except AttributeError:                  # a new mutex
            self._slot.__set__(mutex, [True])
        else:
            tokens.append(True)

    def __delete__(self, mutex: Any) -> None:
        try:
            self._slot.__get__(mutex).pop()
        except IndexError:
            raise AttributeError("taken") from None


_making = _Making()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_making.after_fork)


class Mutex(Owned):
    """A lock for coroutines of any context or asyncio loop, and for plain threads.

    `async with mutex` in a coroutine, `with mutex` in a thread without a loop; in a thread that serves one the
    latter raises WouldBlockLoop at once, free or not. Fair: a release hands it to who waits longest, nobody comes in
    between. The owner is the coroutine (or asyncio task) or the thread; only the owner may release. Not recursive:
    WouldDeadlock. A cancelled or timed-out waiter leaves the line; one that was handed the lock passes it on.
    What never waits is for any thread, but no signal handler.
    """

    # Uncontended it takes no lock: with the plain one, taken twice, `async with` cost 2.0x asyncio.Lock (3.12, 3.13),
    # without 1.1x. It has none either, until somebody has to wait: an idle one is as small as asyncio.Lock.
    #
    # The token is an attribute that is there while the mutex is free: to delete it is to take it, and of two who try
    # one gets AttributeError. That is the one place of homeloop.sync that leans on an atomicity which CPython has but
    # does not promise: with the GIL, `del` of a slot is one step. Without a GIL a list has the token, see TokenInList.
    # Two sides that must not miss each other:
    #
    #     who waits (under _lock)             who releases
    #     stand in _line                      _token = True
    #     del _token? then it is mine         somebody in _line? then grant, under _lock
    #
    # Who looks at _line and then takes came before whoever joins the line in between: no barging.

    __slots__ = ("_owner", "_plain_lock", "_token")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._line = NOBODY
        self._plain_lock: Any = None            # Waitable's lock, made when it is needed
        self._token = True                      # see above
        self._owner: Any = None                 # written by who has the token; None for a moment behind that

    @property
    def _lock(self) -> Any:                     # type: ignore[override]
        lock = self._plain_lock
        if lock is None:
            with _making.lock:
                if self._plain_lock is None:
                    self._plain_lock = allocate_lock()
                lock = self._plain_lock
        return lock

    def locked(self) -> bool:
        """Is it taken? Any thread."""
        return not hasattr(self, "_token")

    @property
    def owner(self) -> Any:
        """The coroutine, task or thread ident that has it; None if it is free. Any thread."""
        return self._owner

    def held(self) -> bool:
        """Has the caller got it?"""
        owner = self._owner
        return owner is not None and owner == caller()

    def acquire(self, timeout: float | None = None) -> Any:
        """Take it. In a coroutine: `await mutex.acquire()`, True. In a thread: True, or False after `timeout` s."""
        return self._either(timeout, self._acquire, self._acquire_blocking)

    def acquire_nowait(self) -> None:
        """Take it if it is free and nobody waits; else WouldBlock. Any thread, in callbacks of a loop too."""
        if self._line or not self._take():
            raise WouldBlock(f"{self!r} is taken")
        self._owner = caller()

    def release(self) -> None:
        """Let go; who waits longest owns it now. WrongState if the caller is not the owner."""
        me = caller()
        if self._owner is None or self._owner != me:
            raise WrongState(f"release of {self!r} by {name_of(me)}, which does not own it")
        self._release()

    async def __aenter__(self) -> Mutex:
        me = current_task(running_loop())  # type: ignore[arg-type]     # a coroutine: a loop runs
        if not self._line:
            try:
                del self._token
            except AttributeError:          # taken
                pass
            else:
                self._owner = me
                return self
        await self._acquire_slowly(me)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        owner = self._owner
        # Does the owner run now? Asking which loop runs here would be exact, but costs a getpid() on 3.11 (0.1 us).
        try:
            mine = current_task(owner.get_loop()) is owner
        except AttributeError:                  # None, or a thread's ident
            mine = False
        if not mine:
            self.release()                      # says what is wrong
            return
        # What _release() does: a call more would be a tenth of a free `async with`.
        self._owner = None
        if self._line:
            self._hand_over()
        else:
            self._token = True
            if self._line:
                self._grant()

    def __enter__(self) -> Mutex:
        if running_loop() is not None:
            plain_thread(self, "with")
        if not self._line:
            try:
                del self._token
            except AttributeError:          # taken
                pass
            else:
                self._owner = get_ident()
                return self
        self._acquire_blocking(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owner != get_ident():
            self.release()                      # says what is wrong
            return
        self._release()

    def __repr__(self) -> str:
        owner = self._owner
        return self._describe(f"held by {name_of(owner)}" if self.locked() else "free")

    # -- inside -----------------------------------------------------------------------------------------

    async def _acquire(self) -> bool:
        me = caller()
        if not self._line and self._take():
            self._owner = me
        else:
            await self._acquire_slowly(me)
        return True

    async def _acquire_slowly(self, me: Any) -> None:
        self._check_not_mine(me)
        waiter = LoopWaiter(me, "acquire")
        if not self._line_up(waiter):
            await self._sleep(waiter)

    def _acquire_blocking(self, timeout: float | None) -> bool:
        waiter = self._thread_waiter("acquire")
        self._check_not_mine(waiter.owner)
        return self._line_up(waiter) or self._block(waiter, timeout)

    def _take(self) -> bool:
        """Take it if it is free. Any thread."""
        try:
            del self._token
        except AttributeError:
            return False
        return True

    def _owners_that_keep_out(self, waiter: Waiter) -> list[Any]:
        owner = self._owner
        return [] if owner is None else [owner]

    def _check_not_mine(self, me: Any) -> None:
        if self._owner is not None and self._owner == me:
            raise WouldDeadlock(f"{self!r} is not recursive: {name_of(me)} would wait for itself")

    def _release(self) -> None:
        self._owner = None
        if self._line:
            self._hand_over()
        else:
            self._token = True
            if self._line:
                self._grant()

    def _hand_over(self) -> None:
        with self._lock:
            woken = self._hand_over_locked()
        self._wake(woken)

    def _grant(self) -> None:
        with self._lock:
            woken = self._grant_locked()
        self._wake(woken)

    def _hand_over_locked(self) -> Sequence[Waiter]:
        """The token is taken and its owner is done with it."""
        if not self._line:
            self._owner = None
            self._token = True
            return ()
        waiter = self._pop_locked()
        self._owner = waiter.owner
        return (waiter,)

    def _grant_locked(self) -> Sequence[Waiter]:
        if self._line and self._take():
            return self._hand_over_locked()
        return ()

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        return self._hand_over_locked()


if sysconfig.get_config_var("Py_GIL_DISABLED"):
    Mutex._token = TokenInList(Mutex._token)    # type: ignore[misc, assignment]
