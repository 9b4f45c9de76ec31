"""The asyncio event loop inside a context: the only module that touches asyncio's private parts.

What is used of them, and why:

  events._set_running_loop, _get_running_loop   a thread that takes the big lock is in the main loop (rule 8)
  tasks._enter_task, _leave_task                a Coroutine is asyncio.current_task() while it runs
  tasks._current_tasks                          the same, before 3.12
  tasks._register_task, _unregister_task        ... and asyncio.all_tasks() knows it while it waits
  Future._asyncio_future_blocking               how `await future` reaches who drives a coroutine
  BaseEventLoop._run_once, _ready, _scheduled,  one iteration, made re-entrant (rule 12); what a worker left
    _stopping, _timer_cancelled_count,          behind when it lets the big lock go (rule 8)
    _current_handle
  BaseEventLoop._default_executor,              the context's workers are the default executor (rule 16)
    _check_default_executor
  Handle._run, _cancelled, _scheduled, _when,   the same iteration, and entries that need no Handle;
    _context                                    a nested poll must not enter one twice
  BaseSelectorEventLoop._add_reader and the     ownership checks (rule 17): transports call these and not
    like, _check_callback, _check_closed        the public ones
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
import os
import select
import sys
import threading
from asyncio import base_events, events, tasks
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from homeloop.core.current import thread
from homeloop.core.driving import Driving
from homeloop.core.entries import NOTHING
from homeloop.core.futures import Future
from homeloop.core.inbox import Inbox
from homeloop.core.polling import AdaptivePolling
from homeloop.core.selector import IN, OUT, HomeSelector
from homeloop.core.statistics import PollingStatistics
from homeloop.errors import WrongThread

if TYPE_CHECKING:
    from homeloop.core.biglock import BigLock
    from homeloop.core.context import AioContext

__all__ = [
    "DIRECT",
    "HomeLoop",
    "current_task",
    "enter_task",
    "leave_if_current",
    "leave_task",
    "may_be_cancelled_soon",
    "register_task",
    "running_loop",
    "set_running_loop",
    "take_awaited",
    "unregister_task",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
get_ident = threading.get_ident

_tasks: Any = tasks
running_loop = events._get_running_loop
set_running_loop = events._set_running_loop
enter_task = tasks._enter_task
leave_task = tasks._leave_task
register_task = tasks._register_task
unregister_task = tasks._unregister_task
# Called with a loop, always. Before 3.12 it is Python, and its body is this one call: 130 ns less.
current_task: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = (
    tasks.current_task if sys.version_info >= (3, 12) else _tasks._current_tasks.get
)

# A future's callback that is registered with this contextvars.Context is an entry for the ready queue as
# it stands: it has _run() and _cancelled, and enters a Context of its own. Saves the Handle.
DIRECT = contextvars.Context()

KICK_COMES_WITHIN_S = 5.0           # from a thread that decided on it to its next line

_base: Any = base_events
_FAR = float("inf")
_NO_THREAD = -1         # no thread's ident
_CALLS = "use context.post(), context.spawn() or loop.call_soon_threadsafe() from other threads"


def leave_if_current(loop: asyncio.AbstractEventLoop, task: Any) -> None:
    """leave_task(), if task is the current one."""
    current: Any = current_task(loop)
    if current is task:
        leave_task(loop, task)


def may_be_cancelled_soon(task: Any) -> bool:
    """Has a Coroutine or task of any loop a cancellation to take, or a timer that knows it (asyncio.timeout(), a cancel
    scope, `call_later(..., task.cancel)`)? Any thread; for a loop that does not show its timers the answer is yes."""
    if task.cancelling():
        return True
    scheduled = getattr(task.get_loop(), "_scheduled", None)
    if scheduled is None:
        return True
    for handle in list(scheduled):
        owner = None if handle._cancelled else getattr(handle._callback, "__self__", None)
        if owner is task or any(value is task for value in list(getattr(owner, "__dict__", {}).values())):
            return True
    return False


def take_awaited(yielded: Any) -> bool | None:
    """What did a coroutine yield: True, a future that it awaits; False, a future it should not have
    yielded (`yield` instead of `yield from`); None, no future. A True answer takes the mark away."""
    blocking = getattr(yielded, "_asyncio_future_blocking", None)
    if blocking:
        yielded._asyncio_future_blocking = False
        return True
    return None if blocking is None else False


class HomeLoop(asyncio.SelectorEventLoop):
    """asyncio's selector loop with a home: ownership checks, an inbox, re-entrant iterations.

    Methods as in asyncio, for the home thread or who holds the big lock; WrongThread elsewhere.
    call_soon_threadsafe and what AioContext offers are for any thread.
    """

    # Slots: beside asyncio's own attributes these would be too many for CPython to find them fast.
    __slots__ = (
        "_careful", "_drive_s", "_iteration", "_kick_fd", "_polls", "context", "driving", "gate", "home_ident", "inbox",
        "sleeps_until", "turns",
    )

    # asyncio's own, see the module's text; all for the home, or who holds the big lock
    _ready: deque[Any]
    _scheduled: list[Any]
    _timer_cancelled_count: int
    _stopping: bool
    _closed: bool
    _debug: bool
    _clock_resolution: float
    _task_factory: Any
    _selector: HomeSelector
    _current_handle: Any
    _check_closed: Callable[[], None]
    _check_running: Callable[[], None]
    _check_callback: Callable[[Any, str], None]
    _write_to_self: Callable[[], None]
    _default_executor: Any
    _check_default_executor: Callable[[], None]
    _asyncgen_firstiter_hook: Callable[[Any], None]
    _asyncgen_finalizer_hook: Callable[[Any], None]

    def __init__(self, context: AioContext) -> None:
        self.context = context
        self.home_ident: int | None = None                      # thread that serves the loop; None: nobody does
        self.gate: BigLock | None = None                        # the big lock, in a main loop that has one
        self.sleeps_until = 0.0                                 # big lock: till when a sleep without it lasts
        self.turns = 0                                          # home: entries run, without those that do not count
        self._polls = 0                                         # home: poll()s on the stack
        self._careful = 0                                       # home: ... and drives
        self.driving: Driving | None = None                     # big lock: once somebody wished to drive
        self._drive_s: float | None = None                      # big lock: how long who drives may sleep
        self._iteration = 0                                     # home: iterations begun
        self._kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if hasattr(os, "eventfd") else -1
        self.inbox = Inbox(context.name, self._kick, self._settle)
        selector = HomeSelector()
        selector.loop = self
        super().__init__(selector)
        if self._kick_fd >= 0:
            selector.watch_kick(self._kick_fd)

    # -- ownership -----------------------------------------------------------------------------------

    def check_home(self, what: str) -> None:
        """Raise WrongThread unless the calling thread may run this loop's code, or nobody serves it."""
        if self.home_ident is None:
            return
        me = get_ident()
        if me == self.home_ident or (self.gate is not None and self.gate._holder == me):
            return
        name = threading.current_thread().name
        raise WrongThread(f"{what} of {self.context.name} called in thread {name!r}, not at home; {_CALLS}")

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> Any:
        if get_ident() != self.home_ident:
            self.check_home("loop.call_soon")
            if self.inbox.entries:
                self.inbox.take(self._ready)        # before the loop runs, in turn with call_soon_threadsafe
        if context is DIRECT:
            self._ready.append(callback)
            return callback
        if self._closed:
            self._check_closed()
        if self._debug:
            self._check_callback(callback, "call_soon")
        handle: Any = events.Handle(callback, args, self, context)
        if handle._source_traceback:
            del handle._source_traceback[-1]
        self._ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        if get_ident() != self.home_ident:
            self.check_home("loop.call_at")
        timer: Any = super().call_at(when, callback, *args, context=context)
        if timer._source_traceback:
            del timer._source_traceback[-1]
        return timer  # type: ignore[no-any-return]

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As in asyncio: any thread, signal handlers too."""
        self._check_closed()
        if self._debug:
            self._check_callback(callback, "call_soon_threadsafe")
        handle: Any = events.Handle(callback, args, self, context)
        if handle._source_traceback:
            del handle._source_traceback[-1]
        me, gate = get_ident(), self.gate
        if gate._holder == me if gate is not None else me == self.home_ident and not self.inbox.sleeping():
            # In turn with what call_soon queues. Asleep at home means: in a signal handler.
            self._ready.append(handle)
        else:
            self.inbox.put(handle)
        return handle  # type: ignore[no-any-return]

    def _check_thread(self) -> None:
        self.check_home("a method")     # asyncio's debug mode asks this; always-on checks come first

    def set_debug(self, enabled: bool) -> None:
        super().set_debug(enabled)
        self.context.debug = enabled

    def create_task(self, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        if get_ident() != self.home_ident:
            try:
                self.check_home("loop.create_task")
            except WrongThread:
                if hasattr(coro, "close"):
                    coro.close()
                raise
        if self._task_factory is not None:
            return super().create_task(coro, **kwargs)
        self._check_closed()
        task: Any = tasks.Task(coro, loop=self, **kwargs)
        if task._source_traceback:
            del task._source_traceback[-1]
        return task  # type: ignore[no-any-return]

    def create_future(self) -> Future:
        return Future(loop=self)

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """As in asyncio; the default executor is the context's worker pool, unless one was set (rule 16)."""
        if executor is not None or self._default_executor is not None:
            return super().run_in_executor(executor, func, *args)
        if get_ident() != self.home_ident:
            self.check_home("loop.run_in_executor")
        self._check_closed()
        if self._debug:
            self._check_callback(func, "run_in_executor")
        self._check_default_executor()
        return self.context.pool().submit(functools.partial(func, *args), detached=True)

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """As in asyncio: waits for the context's worker pool, too."""
        await super().shutdown_default_executor(*args, **kwargs)
        await self.context.stop_workers()

    def _add_reader(self, fd: Any, callback: Any, *args: Any) -> Any:
        if get_ident() != self.home_ident:
            self.check_home("loop.add_reader")
        return super()._add_reader(fd, callback, *args)  # type: ignore[misc]

    def _remove_reader(self, fd: Any) -> Any:
        if get_ident() != self.home_ident:
            self.check_home("loop.remove_reader")
        return super()._remove_reader(fd)  # type: ignore[misc]

    def _add_writer(self, fd: Any, callback: Any, *args: Any) -> Any:
        if get_ident() != self.home_ident:
            self.check_home("loop.add_writer")
        return super()._add_writer(fd, callback, *args)  # type: ignore[misc]

    def _remove_writer(self, fd: Any) -> Any:
        if get_ident() != self.home_ident:
            self.check_home("loop.remove_writer")
        return super()._remove_writer(fd)  # type: ignore[misc]

    def set_polling(self, polling: AdaptivePolling | None) -> None:
        """Look for work before each sleep, or do not. Any thread."""
        self._selector.polling = polling

    def polling_statistics(self) -> PollingStatistics | None:
        """Does it pay? Any thread."""
        polling = getattr(self._selector, "polling", None)      # a closed loop has no selector
        return None if polling is None else polling.statistics()

    def wish_to_drive(self) -> bool:                # big lock
        """Can another thread than the home serve the loop? Then `driving` is there from now on."""
        self.driving = self._selector.wish_to_drive()
        return self.driving is not None

    def orphan(self) -> None:
        """In a forked child: the home and who drove are threads of the parent."""
        self.home_ident = _NO_THREAD
        self._selector.orphan()

    # -- entries -------------------------------------------------------------------------------------

    def asyncgen_hooks(self) -> tuple[Any, Any]:
        """What sys.set_asyncgen_hooks() takes in a thread that runs this loop's code."""
        return self._asyncgen_firstiter_hook, self._asyncgen_finalizer_hook

    def queue(self, entry: Any) -> None:            # home or big lock
        """Run entry._run() in the next iteration, after what is ready."""
        self._ready.append(entry)

    def queue_first(self, entry: Any) -> None:      # home or big lock
        """Run entry._run() before anything else that is ready."""
        self._ready.appendleft(entry)

    def note_next_timer(self) -> None:              # big lock
        """For has_work(): till when the sleep that begins now lasts by itself. Not now + timeout: that is a little
        later than the timer that the sleep is for."""
        home = get_ident() == self.home_ident
        self.sleeps_until = self._scheduled[0]._when if self._scheduled and home else _FAR

    def ready_entries(self) -> list[Any]:           # home
        """What is ready and has not run."""
        return list(self._ready)

    def has_work(self) -> bool:                     # big lock
        """Would the loop, were it not asleep, do something now, or before it wakes by itself?"""
        if self._ready or self._stopping:
            return True
        scheduled = self._scheduled
        if scheduled and scheduled[0]._cancelled:
            self._drop_cancelled_heads()
        return bool(scheduled) and scheduled[0]._when < self.sleeps_until

    def take_if_alone(self, entry: Any) -> bool:    # big lock
        """Take entry out of the ready queue, if it is there and nothing and nobody else wants to run."""
        ready = self._ready
        if len(ready) != 1 or ready[0] is not entry or self.inbox.entries:
            return False
        if self.gate is not None and self.gate.contended():
            return False
        ready.clear()
        if self.has_work():             # a timer that the home does not know of yet
            ready.append(entry)
            return False
        return True

    def _kick(self) -> None:
        if self._kick_fd >= 0:
            os.eventfd_write(self._kick_fd, 1)
        else:
            self._write_to_self()

    def _settle(self) -> None:
        if self._kick_fd >= 0:
            os.eventfd_read(self._kick_fd)

    # -- iterations ----------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """As in asyncio. The calling thread is the home until this returns."""
        self._check_closed()
        self._check_running()
        if thread.context is self.context:      # served already, around several runs of the loop
            super().run_forever()
            return
        self.context.begin_serving()
        try:
            super().run_forever()
        finally:
            self.context.end_serving()

    def run_one(self, *, blocking: bool) -> bool:   # home or big lock
        """One iteration, inside another or on its own; True if it ran anything that counts as progress."""
        before = self.turns
        if not blocking:
            # As if something were ready: the sleep is one of 0.
            self._ready.append(NOTHING)
            self.turns -= 1
        self._polls += 1
        self._careful += 1
        try:
            self._run_once()
        finally:
            self._careful -= 1
            self._polls -= 1
        return self.turns > before

    def is_home_alone(self) -> bool:
        """Is this the home's outermost iteration? Deeper ones wait for something of their own."""
        return not self._polls and get_ident() == self.home_ident

    def drive_once(self, co: Any, seconds: float) -> bool:      # big lock, a thread that drives
        """One iteration for who waits for co. False: the loop is to stop, which its home must do."""
        self._careful += 1
        self._drive_s = seconds
        try:
            self._run_once()
            if self._ready and not co.done():
                self._run_ready_carefully()         # mostly co's step, behind its reader: not worth a look at epoll
        finally:
            self._careful -= 1
            self._drive_s = None
        return not (self._stopping or self.inbox.closed)

    def end_iteration(self) -> None:
        """What has not run yet runs in the next one. Home or big lock."""
        self._iteration += 1

    def _run_once(self) -> None:
        """asyncio's iteration, re-entrant, and with an inbox.

        What an iteration has not run yet stays at the head of the ready queue: a nested iteration runs it
        first, and the outer one, which has nothing left then, ends (rule 12).
        """
        scheduled = self._scheduled
        if len(scheduled) > _base._MIN_SCHEDULED_TIMER_HANDLES:
            scheduled = self._drop_cancelled_timers()
        if scheduled and scheduled[0]._cancelled:
            self._drop_cancelled_heads()
        ready = self._ready
        if ready or self._stopping:
            timeout: float | None = 0
        elif scheduled:
            timeout = min(max(0, scheduled[0]._when - self.time()), _base.MAXIMUM_SELECT_TIMEOUT)
        else:
            timeout = None
        selector = self._selector
        if timeout == 0:
            found = selector.glance()
        else:
            # What note_next_timer() does. Who polls beside the sleeping home leaves no promise behind; who drives
            # leaves the home's as it is.
            if get_ident() == self.home_ident:
                self.sleeps_until = scheduled[0]._when if scheduled else _FAR
            else:
                if self._polls:
                    self.sleeps_until = _FAR
                if self._drive_s is not None:
                    timeout = self._drive_s if timeout is None else min(timeout, self._drive_s)
            polling = selector.polling
            found = selector.sleep(timeout) if polling is None else selector.look_then_sleep(polling, timeout)
        if found:
            self._queue_found(found)
        if self.inbox.entries:          # a miss is caught before the next sleep, under the inbox's lock
            self.inbox.take(ready)
        scheduled = self._scheduled     # a worker may have changed it during the select
        if scheduled:
            end_time = self.time() + self._clock_resolution
            while scheduled and scheduled[0]._when < end_time:
                handle = heapq.heappop(scheduled)
                handle._scheduled = False
                ready.append(handle)
        if self._debug or self._careful:
            self._run_ready_carefully()
            return
        self._iteration += 1
        iteration = self._iteration
        count = len(ready)
        self.turns += count
        for _ in range(count):
            handle = ready.popleft()
            if handle._cancelled:
                self.turns -= 1
            else:
                handle._run()
                if self._iteration != iteration:
                    break               # a nested iteration has run what was ready before it
        handle = None                   # a traceback may keep this frame, and with it what the last one held

    def _run_ready_carefully(self) -> None:
        """In debug mode: name the callbacks that take long. In a nested poll or a drive: bear entered contexts."""
        self._iteration += 1
        iteration = self._iteration
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if handle._cancelled:
                continue
            self.turns += 1
            if self._careful and isinstance(handle, events.Handle):
                _leave_entered(handle)
            if self._debug:
                self._run_timed(handle)
            else:
                handle._run()
            if self._iteration != iteration:
                break
        handle = None                   # as in _run_once

    def _run_timed(self, handle: Any) -> None:
        try:
            self._current_handle = handle
            start = self.time()
            handle._run()
            took = self.time() - start
            if took >= self.slow_callback_duration:
                what = _base._format_handle(handle) if isinstance(handle, events.Handle) else repr(handle)
                _base.logger.warning("Executing %s took %.3f seconds", what, took)
        finally:
            self._current_handle = handle = None        # a traceback may keep this frame, too

    def _queue_found(self, found: Any) -> None:
        """Queue the handles of what is ready; asyncio's _process_events without its list."""
        keys = self._selector.keys
        ready = self._ready
        for fd, event in found:
            key = keys.get(fd)
            if key is None:
                if fd != self._kick_fd:
                    self._selector.forget(fd)       # gone, or left behind by a Ctrl-C: it would come for ever
                continue
            reader, writer = key.data
            if reader is not None and event & ~OUT:
                if reader._cancelled:
                    self._remove_reader(fd)
                else:
                    ready.append(reader)
            if writer is not None and event & ~IN:
                if writer._cancelled:
                    self._remove_writer(fd)
                else:
                    ready.append(writer)

    def _drop_cancelled_heads(self) -> None:
        scheduled = self._scheduled
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False

    def _drop_cancelled_timers(self) -> list[Any]:
        scheduled = self._scheduled
        fraction = self._timer_cancelled_count / len(scheduled)
        if fraction > _base._MIN_CANCELLED_TIMER_HANDLES_FRACTION:
            kept = []
            for handle in scheduled:
                if handle._cancelled:
                    handle._scheduled = False
                else:
                    kept.append(handle)
            heapq.heapify(kept)
            self._scheduled = kept
            self._timer_cancelled_count = 0
        return self._scheduled

    def close(self) -> None:
        """As in asyncio; the context takes no more work, coroutines that wait for it are cancelled."""
        if self.is_running():
            raise RuntimeError("Cannot close a running event loop")
        if self.is_closed():
            return
        self.context.close_inbox()
        super().close()
        if self._kick_fd >= 0:
            if self.inbox.kick_is_owed():   # by a thread that is about to write: not into a file that comes after us
                poller = select.poll()
                poller.register(self._kick_fd, select.POLLIN)
                poller.poll(KICK_COMES_WITHIN_S * 1000)
            os.close(self._kick_fd)
            self._kick_fd = -1


def _leave_entered(handle: Any) -> None:
    """A contextvars.Context can be entered once. One that is entered below us on the stack (tasks may share one)
    is copied for the callback: what it sets there is seen by nobody else."""
    try:
        handle._context.run(_nothing)
    except RuntimeError:
        handle._context = handle._context.copy()


def _nothing() -> None:
    pass
