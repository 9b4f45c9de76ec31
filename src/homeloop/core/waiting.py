"""Waiting from synchronous code: call(), result(), wait_while() and kick() (rules 9 and 11).

Who may wait for whom:

    a thread without a context                      for any; it sleeps
    the main context's home, who holds the big lock for any; the main loop is served meanwhile
    an IOThread                                     for its own, which it serves meanwhile

Anything else raises WouldDeadlock at once: a hang is never the answer where we can know.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from homeloop.core import driving, waitgraph
from homeloop.core.current import current_context, thread
from homeloop.core.interrupts import ctrl_c_cancels, ctrl_c_is_ours, ctrl_c_may_come
from homeloop.core.misuse import sites
from homeloop.errors import WouldDeadlock, WrongThread

if TYPE_CHECKING:
    from homeloop.core.biglock import BigLock
    from homeloop.core.context import AioContext
    from homeloop.core.coroutine import Coroutine
    from homeloop.core.loop import HomeLoop

__all__ = ["drive", "finish_call", "forget_all", "give_up_driven", "kick", "submit_call", "wait_done", "wait_while"]

T = TypeVar("T")


class _Gate:
    """What one thread sleeps on. open() is for any thread and sticks."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self, _cause: object = None) -> None:
        try:
            self._lock.release()
        except RuntimeError:        # open already; threading promises this error for an unlocked Lock
            pass

    def wait(self, timeout: float | None) -> bool:
        return self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout))


def drive(context: AioContext, gate: BigLock, co: Coroutine[Any], end: float | None) -> None:
    """Run a fresh coroutine of the main context in this thread, which has no context, as far as it goes.

    Returns when it has ended or waits for something that is not ready. A bare yield (`sleep(0)`) is
    ready: where nothing else is, and nobody waits for the lock, it goes on right here. TimeoutError, and it has
    not begun, if the lock is not to be had in time.
    """
    home = context.home
    assert home is not None
    if gate.held():
        suspended = context.suspend_running()       # we may be inside a coroutine that we entered
        try:
            _drive_held(context, home, co, end)
        finally:
            context.resume_running(suspended)
        return
    try:
        if not gate.enter_bare(None if end is None else max(0.0, end - time.monotonic())):
            co.abandon_unborn()
            raise TimeoutError(f"{co!r} did not begin in time: the big lock of {context.name} was held")
        _drive_held(context, home, co, end)
    finally:
        try:
            gate.leave_bare(home)
        except BaseException:           # Ctrl-C while we let go
            gate.leave_bare(home)
            raise


def _drive_held(context: AioContext, home: HomeLoop, co: Coroutine[Any], end: float | None) -> None:
    if context.closed:                  # it ended while we waited for the lock
        co.abandon_unborn()
        raise context.inbox.refusal()
    if home.driving is not None and home.driving.expected:
        _drive_expecting(context, home, co, end)
        return
    _run_driven(context, home, co, end)
    if co.done():
        context.counters.calls_driven += 1
        return
    co.become_known()
    if home.wish_to_drive():
        try:
            if not ctrl_c_may_come():       # else the next call() is expected to wait
                driving.drive(home, co, end)
        finally:
            driving.end_drive(home, True)
    _count_call(context, co)


def _run_driven(context: AioContext, home: HomeLoop, co: Coroutine[Any], end: float | None) -> None:
    """Run co until it ends or waits for something that is not ready."""
    outer, context.driven = context.driven, co      # known only to us: registering it can wait until we let go
    try:
        context.run_new(co)
        while not co.done() and (end is None or time.monotonic() < end) and home.take_if_alone(co):
            context.run_chain(co)
    finally:
        context.driven = outer


def _drive_expecting(context: AioContext, home: HomeLoop, co: Coroutine[Any], end: float | None) -> None:
    """The last call() came to wait. So be the driver before this one begins: what it waits for may come at once, and
    would wake the home."""
    if not ctrl_c_may_come():
        _run_as_driver(context, home, co, end)
    elif ctrl_c_is_ours():
        # An exception between two steps of the loop would lose what others have queued.
        with ctrl_c_cancels(co, raise_in_waits=False) as interrupts:
            _run_as_driver(context, home, co, end)
        if interrupts and (co.cancelled() or not co.done()):
            raise KeyboardInterrupt
    else:
        _run_driven(context, home, co, end)
        if not co.done():
            co.become_known()
        driving.end_drive(home, not co.done())
    _count_call(context, co)


def _run_as_driver(context: AioContext, home: HomeLoop, co: Coroutine[Any], end: float | None) -> None:
    waits = False
    try:
        driving.prepare_drive(home)
        _run_driven(context, home, co, end)
        waits = not co.done()
        if waits:
            co.become_known()
            driving.drive(home, co, end)
    finally:
        driving.end_drive(home, waits)


def _count_call(context: AioContext, co: Coroutine[Any]) -> None:
    if co.done():
        context.counters.calls_driven += 1
    else:
        context.counters.calls_handed_over += 1


def give_up_driven(co: Coroutine[Any]) -> None:
    """_give_up() after drive() was left by an exception."""
    if co.is_suspended():
        with contextlib.suppress(WouldDeadlock):        # what came out of drive() must come out
            _give_up(co)
    else:                   # a Ctrl-C between two steps of ours: it may be in no queue any more
        co.cancel()


def submit_call(co: Coroutine[T], timeout: float | None) -> T:
    """call() where the coroutine does not begin in the calling thread."""
    thread.waits += 1           # before it is on its way: a Ctrl-C from here on is meant for it, see interrupts
    try:
        co.context.schedule_new(co)
        return finish_call(co, timeout)
    finally:
        thread.waits -= 1


def finish_call(co: Coroutine[T], timeout: float | None) -> T:
    """The second half of call(): wait, and on time-out or Ctrl-C cancel and wait again."""
    try:
        in_time = co.done() or wait_done(co, timeout)
    except WouldDeadlock as refusal:
        co.cancel(str(refusal))         # what it awaits is cancelled too, and should know why
        raise
    except BaseException:
        with contextlib.suppress(WouldDeadlock):        # Ctrl-C is what must come out
            _give_up(co)
        raise
    if not in_time:
        _give_up(co)
        raise TimeoutError(f"{co!r} did not end within {timeout} s")
    return co.outcome()


def _give_up(co: Coroutine[Any]) -> None:
    """Cancel co and wait for it: it never goes on behind its caller's back."""
    co.cancel()
    wait_done(co, None, cancelled=True)


def wait_done(co: Coroutine[Any], timeout: float | None, *, cancelled: bool = False) -> bool:
    """Wait for the end of co; False if `timeout` seconds are over first.

    WouldDeadlock for a wait without a timeout that closes a cycle. cancelled: the caller has just cancelled co, which
    may not know yet; a cycle that it will leave by that is none.
    """
    if co.done():
        return True
    here = _check_may_wait(co.context)
    if here is co.context and co in (*thread.below, here.running):
        raise WouldDeadlock(f"{co!r} would wait for itself{sites(co.get_coro(), 'waited for')}")
    waiter = _Waiter()
    co.when_done(waiter.kick)
    link = waitgraph.CoroutineEnd(co, cancelled=cancelled) if timeout is None else None
    try:
        return waiter.wait(here or co.context, co.done, timeout, link)
    finally:
        if not co.done():
            co.forget_when_done(waiter.kick)


def wait_while(
    context: AioContext, predicate: Callable[[], object], timeout: float | None, link: waitgraph.Link | None = None,
) -> bool:
    """AioContext.wait_while. link: what makes the predicate false, if that is known."""
    here = _check_may_wait(context)
    return _Waiter().wait(here or context, lambda: not predicate(), timeout, link)


def kick() -> None:
    """Make every wait_while() look at its predicate again. Any thread, never waits.

    Call it after the change that a predicate looks at. Source: QEMU's aio_wait_kick; the barrier that it
    once lacked is `_waiters_lock`, which waiter and kicker both take.
    """
    with _waiters_lock:
        waiters = list(_waiters)
    for waiter in waiters:
        waiter.kick()


_waiters_lock = threading.RLock()           # a leaf; re-entrant for kick() in a signal handler
_waiters: set[_Waiter] = set()              # under _waiters_lock


def forget_all() -> None:
    """In a forked child: the parent's threads do not wait here."""
    global _waiters_lock
    waitgraph.forget_all()
    _waiters_lock = threading.RLock()
    _waiters.clear()


class _Waiter:
    """One wait of one thread."""

    def __init__(self) -> None:
        self._gate = _Gate()
        self._kicked = False                        # under _waiters_lock
        self._served: AioContext | None = None      # under _waiters_lock: what the thread serves while it waits

    def kick(self, _cause: object = None) -> None:
        """Make it look again. Any thread."""
        with _waiters_lock:
            self._kicked = True
            served = self._served
        if served is not None:
            served.try_post(_nothing)
        self._gate.open()

    def wait(
        self, context: AioContext, satisfied: Callable[[], object], timeout: float | None,
        link: waitgraph.Link | None = None,
    ) -> bool:
        """Wait until satisfied(), in the way that this thread may; False if `timeout` seconds are over first.

        context: the one that this thread is in, else the one that it waits for. link: what it waits for, if a cycle
        is to be refused.
        """
        sleep = None
        end = None if timeout is None else time.monotonic() + timeout
        with _waiters_lock:
            _waiters.add(self)              # before the first look: a kick after it is not missed
        thread.waits += 1
        try:
            while True:
                with _waiters_lock:
                    self._kicked = False    # before the look: a kick behind it must not be taken for seen
                if satisfied():
                    return True
                if end is not None and time.monotonic() >= end:
                    return False
                if link is not None:
                    asleep = _sleeps_in(context)
                    serves = context if not asleep or current_context() is context else None
                    if sleep is None:
                        sleep = waitgraph.Sleep(link)
                        sleep.begin(serves, asleep)
                    else:
                        sleep.serves, sleep.asleep = serves, asleep
                self._wait_once(context, None if end is None else end - time.monotonic())
        finally:
            if sleep is not None:
                sleep.end()
            thread.waits -= 1
            with _waiters_lock:
                _waiters.discard(self)

    def _wait_once(self, context: AioContext, left: float | None) -> None:
        """Sleep until a kick, or serve one iteration."""
        gate = context.gate
        if _sleeps_in(context):
            if gate is not None and gate.held():
                with gate.released():
                    self._gate.wait(left)
            else:
                self._gate.wait(left)
            return
        with _waiters_lock:
            if self._kicked:
                return
            self._served = context
        try:
            with context.stand_in():
                alarm = None if left is None else context.loop.call_later(left, _nothing)
                try:
                    context.poll(True)
                finally:
                    if alarm is not None:
                        alarm.cancel()
        except WrongThread:
            if not context.is_served():     # else another thread was faster to stand in: look again
                raise
        finally:
            with _waiters_lock:
                self._served = None


def _nothing() -> None:
    """Posted to end a sleep: unlike a bare notification it cannot come between a look and the sleep."""


def _check_may_wait(target: AioContext) -> AioContext | None:
    """Rule 11. Return the context that the calling thread is in."""
    if target.orphaned:
        raise target.inbox.refusal()
    here = current_context()
    if here is not None and here.home is None:
        make = type(here.loop).__module__
        raise WouldDeadlock(f"{here.name} runs a {make} loop: a wait for {target.name} in its thread would stop it for "
                            f"good, for nested polls need homeloop's own loop; use `await`")
    if here is None or here is target or here.is_main():
        return here
    raise WouldDeadlock(f"thread {threading.current_thread().name!r} is at home in {here.name} and would wait for "
                        f"{target.name}: an IOThread may wait only for itself; use `await` or `await context.run(...)`")


def _sleeps_in(context: AioContext) -> bool:
    """Does a wait in context sleep, rather than serve it?"""
    return context.home is None or _home_serves(context) or context.closed


def _home_serves(context: AioContext) -> bool:
    """Does another thread serve context, so that this one may sleep?"""
    home = context.home
    return thread.context is not context and home is not None and home.home_ident is not None and not context.home_away
