"""The big lock of a runtime (QEMU's BQL): who holds it is the main context's home.

The main loop holds it whenever it runs code and gives it up in one place, around its sleep in select().
A thread without a context that takes it is in the main context until it lets go (rule 1).

It is fair (rule 8): a release hands the lock to who waits longest, nobody can barge. The lock is
therefore not a threading.Lock, whose order nobody promises, but a holder and a queue of waiters.

Lock order: the big lock is the outermost lock of a program. `_mutex`, which is the main context's inbox
lock, is a leaf.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from homeloop.core.current import thread
from homeloop.core.loop import HomeLoop, current_task, running_loop, set_running_loop
from homeloop.core.waitgraph import LockTurn, Sleep
from homeloop.core.waiting import kick
from homeloop.errors import WrongState, WrongThread

if TYPE_CHECKING:
    from homeloop.core.context import AioContext

__all__ = ["BigLock", "BigLockCondition"]

get_ident = threading.get_ident
allocate_lock = threading.Lock
get_asyncgen_hooks = sys.get_asyncgen_hooks
set_asyncgen_hooks = sys.set_asyncgen_hooks


class _Waiter:
    """One thread in the queue. `granted` is under the big lock's mutex."""

    __slots__ = ("gate", "granted", "ident")

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self.granted = False
        self.gate = allocate_lock()      # taken; the grant opens it
        self.gate.acquire()


class BigLock:
    """The lock that makes a thread the main context's home.

    `with big_lock:` is a guard (QEMU's BQL_LOCK_GUARD): it locks only if this thread does not hold the
    lock, and unlocks only what it locked. acquire() and release() are strict.

    Any thread may use it, but no signal handler. While a thread without a context holds it,
    `asyncio.get_running_loop()` is the main loop there and `current_context()` the main context.
    """

    def __init__(self, context: AioContext, *, enabled: bool) -> None:
        self.context = context                          # the main context
        self.enabled = enabled                          # False: nobody ever holds it (rule 6)
        self._mutex = context.lock                      # a leaf, held for a few lines; shared, see HomeSelector.sleep
        self._holder = 0                                # thread ident; set under _mutex
        self._waiters: deque[_Waiter] = deque()         # under _mutex, longest wait first
        # The main loop's: an async generator that a holder begins is the loop's to close.
        self.asyncgen_hooks: tuple[Any, Any] = (None, None) if context.home is None else context.home.asyncgen_hooks()
        # Holder's, who is not the home: what release() restores. Who gives way in between keeps his own.
        self._outer: Any = None
        self._waits = 0                                 # under _mutex: acquires that had to wait
        self._acquires = 0                              # holder's: acquires by other threads than the home

    # -- for users ---------------------------------------------------------------------------------

    def held(self) -> bool:
        """Does the calling thread hold the big lock? Any thread, never waits.

        Truthful also inside BigLockCondition.wait(): False while the lock is given up.
        """
        return self._holder == get_ident()

    def acquire(self, timeout: float | None = None) -> bool:
        """Take the lock, in the order of arrival; wait for it at most `timeout` seconds.

        Any thread. False if the time is over first; then nothing is held. Not recursive: RuntimeError
        (WrongState) if this thread holds it, or if the runtime has no big lock.
        """
        me = get_ident()
        if self._holder == me:
            raise WrongState("this thread holds the big lock already; `with big_lock:` is the form that may nest")
        if not self.enabled:
            raise WrongState(f"the runtime of {self.context.name} has no big lock (big_lock=False)")
        if not self.take(me, timeout, refuse=True):
            return False
        if self.context.closed:
            self.hand_over()
            raise self.context.inbox.refusal()
        self._entered()
        return True

    def release(self) -> None:
        """Let go, and hand the lock to who waits longest. WrongThread if this thread does not hold it."""
        if self._holder != get_ident():
            raise WrongThread(f"release of the big lock of {self.context.name} by a thread that does not hold it")
        self._leaving()
        self.hand_over()

    def __enter__(self) -> BigLock:
        if self._holder != get_ident():
            self.acquire()
            thread.guards.append([self, self._inside(), 1])
        elif thread.guards and thread.guards[-1][0] is self and thread.guards[-1][1] is self._inside():
            thread.guards[-1][2] += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Ours is the one that this coroutine (or, outside any, this thread) locked. A block inside a coroutine
        # that found the lock held left no guard: it may end on another thread than it began on.
        guards = thread.guards
        if not guards or guards[-1][0] is not self or guards[-1][1] is not self._inside():
            return
        guards[-1][2] -= 1
        if guards[-1][2]:
            return
        guards.pop()
        if self._holder != get_ident():
            raise WrongState("the big lock was released inside `with big_lock:`; use released() there")
        self.release()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Give the lock up for the block, then take it back: for a blocking call in a holder.

        Holder only. Other threads may run the main context's code meanwhile: what was read before must be
        read again. The waiting inside must not be for a coroutine of the main context.
        """
        self.release()
        try:
            yield
        finally:
            self._acquire_again()

    def condition(self) -> BigLockCondition:
        """A new condition variable on this lock (QEMU's qemu_cond_wait_bql)."""
        return BigLockCondition(self)

    def statistics(self) -> dict[str, int]:
        """Return counts: acquires by threads that are not the home, and acquires that waited."""
        return {"acquires": self._acquires, "waits": self._waits, "waiting": len(self._waiters)}

    def __repr__(self) -> str:
        state = "disabled" if not self.enabled else f"held by thread {self._holder}" if self._holder else "free"
        return f"<BigLock of {self.context.name} {state} waiting={len(self._waiters)}>"

    # -- for the loop and call(): the lock without what surrounds it ---------------------------------

    def take(self, me: int, timeout: float | None = None, *, refuse: bool = False) -> bool:
        """Become the holder. The caller does not hold it. refuse: WouldDeadlock, where a wait without a timeout would
        never end; the main loop, which takes back what is its own, has no choice."""
        waiter = sleep = None
        try:
            with self._mutex:
                if not self._holder:
                    self._holder = me
                    return True
                waiter = _Waiter(me)
                self._waiters.append(waiter)
                self._waits += 1
            if refuse and timeout is None:
                sleep = Sleep(LockTurn(self, me))
                sleep.begin()
            if waiter.gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
                return True
        except BaseException:
            # Ctrl-C, WouldDeadlock. A grant may have come with it; the lock must not stay with a thread that believes
            # it has none.
            if waiter is not None:
                self._withdraw(waiter)
            if self._holder == me:
                self.hand_over()
            raise
        finally:
            if sleep is not None:
                sleep.end()
        return not self._withdraw(waiter)

    def take_back(self, me: int) -> None:
        """Become the holder whatever happens: a Ctrl-C that arrives meanwhile is raised afterwards."""
        pending: BaseException | None = None
        while True:
            try:
                self.take(me)
                break
            except BaseException as exc:
                pending = exc
        if pending is not None:
            raise pending

    def hand_over(self) -> None:
        """Give the lock to who waits longest, else leave it free. Holder only."""
        with self._mutex:
            if not self._waiters:
                self._holder = 0
                return
            waiter = self._waiters[0]
            self._holder = waiter.ident
            waiter.granted = True           # from here on it is the holder, wherever a Ctrl-C stops us
            try:
                self._waiters.popleft()
            finally:
                # Under the mutex: the waiter may time out, withdraw and be gone right behind it.
                waiter.gate.release()

    def left_behind(self, name: str) -> None:
        """The thread that holds it ends without having let go, in its last act: hand it over, and say so.

        Whoever waits for it would wait for ever, and the next thread with the same ident would pass for the holder.
        """
        self.hand_over()
        self.context.try_post(self.context.report, {
            "message": f"thread {name!r} ended while it held the big lock of {self.context.name}; it was handed on"
        })

    def give_way(self, me: int) -> None:
        """Let those who wait now go first. Holder only."""
        outer = self._outer             # they use it, too
        self.hand_over()
        self.take_back(me)
        self._outer = outer

    def orphan(self) -> None:
        """In a forked child: nobody holds or waits."""
        self._mutex = self.context.lock
        self._holder = 0
        self._waiters.clear()

    def contended(self) -> bool:
        """Does somebody wait? A look without the mutex: the loop asks once per iteration, and one that
        arrives just behind the look is seen by the next."""
        return bool(self._waiters)

    def _inside(self) -> object:
        """The coroutine or asyncio task that runs on the holder's stack; None outside any."""
        return self.context.running or current_task(self.context.loop)

    def _acquire_again(self) -> None:
        """Take the lock back after released(); a Ctrl-C that arrives meanwhile is raised afterwards."""
        try:
            self.take_back(get_ident())
        finally:
            self._entered()

    def _withdraw(self, waiter: _Waiter) -> bool:
        """Leave the queue. False: too late, the lock is granted."""
        with self._mutex:
            if waiter.granted:
                return False
            with contextlib.suppress(ValueError):       # a Ctrl-C came before it was in the queue
                self._waiters.remove(waiter)
            return True

    def _entered(self) -> None:
        """Make this thread the main context's home (holder, just acquired)."""
        context = self.context
        mine = thread.context
        if mine is context:
            context.home_away = False
        else:
            self._acquires += 1
            self._outer = (thread.held, running_loop(), get_asyncgen_hooks())
            thread.held = self
            if mine is None:
                set_running_loop(context.loop)
                set_asyncgen_hooks(*self.asyncgen_hooks)
        if thread.suspended:
            suspended = thread.suspended.pop(self, None)
            if suspended is not None:
                context.resume_running(suspended)

    def _leaving(self) -> None:
        """Undo _entered, and tell a sleeping loop what was left for it (holder, about to release)."""
        context = self.context
        mine = thread.context
        if context.runs_something():
            # We are inside a coroutine. Whoever gets the lock must not find it running; we go on with it
            # when we have the lock again.
            thread.suspended[self] = context.suspend_running()
        if mine is context:
            context.home_away = True
            kick()                  # who slept because the home serves the loop must look for itself
            return
        if thread.held is not self:
            self._leave_out_of_order()
        else:
            thread.held, outer_loop, hooks = self._outer
            if mine is None:
                set_running_loop(outer_loop)
                set_asyncgen_hooks(*hooks)
        home = context.home
        if home is not None and home.has_work():
            context.inbox.notify()

    def _leave_out_of_order(self) -> None:
        """This thread took the big lock of another runtime behind ours and still holds it: that one now
        restores what we would have. Found nowhere: a Ctrl-C came before _outer was noted, nothing to restore."""
        newer = thread.held
        while newer is not None:
            if newer._outer[0] is self:
                newer._outer = self._outer
                return
            newer = newer._outer[0]

    # acquire() and release() for call(), in a thread that has no context and does not hold the lock: the same
    # steps in one function each. They are a third of what a call() costs: 1.5 us as methods, 0.8 like this.
    # A Ctrl-C may come between any two steps; leave_bare() then undoes as many as were done.

    def enter_bare(self, timeout: float | None = None) -> bool:
        """False: `timeout` seconds were over first."""
        me = get_ident()
        with self._mutex:
            free = not self._holder
            if free:
                self._holder = me
        if not free and not self.take(me, timeout, refuse=True):
            return False
        self._acquires += 1
        self._outer = (thread.held, running_loop(), get_asyncgen_hooks())
        thread.held = self
        set_running_loop(self.context.loop)
        set_asyncgen_hooks(*self.asyncgen_hooks)
        return True

    def leave_bare(self, home: HomeLoop) -> None:
        if self._holder != get_ident():
            return
        if thread.held is self:
            thread.held, outer_loop, hooks = self._outer
            set_running_loop(outer_loop)
            set_asyncgen_hooks(*hooks)
        else:
            self._leave_out_of_order()
        if home.has_work():
            home.inbox.notify()
        with self._mutex:
            if not self._waiters:
                self._holder = 0
                return
        self.hand_over()


class BigLockCondition:
    """A condition variable whose lock is the big lock. All methods: holder only.

    held() is False in a thread while it waits here, and so is `current_context()` (or the thread's own).
    """

    def __init__(self, lock: BigLock) -> None:
        self._lock = lock
        self._waiters: deque[threading.Lock] = deque()      # under the big lock

    def wait(self, timeout: float | None = None) -> bool:
        """Give the big lock up, sleep until notified, take it back. False: `timeout` seconds were over."""
        self._check()
        gate = allocate_lock()
        gate.acquire()
        self._waiters.append(gate)
        try:
            with self._lock.released():
                gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        except BaseException:
            if not self._leave(gate):
                self.notify()               # the notification was meant for somebody: hand it on
            raise
        return not self._leave(gate)

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> bool:
        """wait() until predicate() is true; return its truth. It is called with the big lock held."""
        end = None if timeout is None else time.monotonic() + timeout
        while not predicate():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return bool(predicate())
            self.wait(left)
        return True

    def notify(self, n: int = 1) -> None:
        """Wake up to `n` waiters, longest wait first."""
        self._check()
        for _ in range(min(n, len(self._waiters))):
            self._waiters.popleft().release()

    def notify_all(self) -> None:
        """Wake all that wait now."""
        self.notify(len(self._waiters))

    def _leave(self, gate: threading.Lock) -> bool:
        """Stop waiting. False: somebody had notified us already, perhaps after the time was over."""
        if gate not in self._waiters:
            return False
        self._waiters.remove(gate)
        return True

    def _check(self) -> None:
        if not self._lock.held():
            raise WrongThread("a condition of the big lock needs the big lock: use it inside `with big_lock:`")
