"""AioContext: an event loop with a home, and the calls that any thread may make into it.

The home is the one thread that runs the context's code; for a main context also whoever holds the big
lock (rule 2). Everything that comes from elsewhere goes through the inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Coroutine as CoroutineABC
from types import CoroutineType
from typing import TYPE_CHECKING, Any, TypeVar

from homeloop.core import forking, waiting
from homeloop.core.adopted import AdoptedLoops
from homeloop.core.bottom_half import BottomHalf
from homeloop.core.coroutine import Coroutine
from homeloop.core.current import current_context, thread
from homeloop.core.entries import Call, Calls, RunWakes, SingleCall
from homeloop.core.inbox import Inbox
from homeloop.core.loop import HomeLoop, current_task, enter_task, leave_task, running_loop, set_running_loop
from homeloop.core.misuse import check_given, not_at_home
from homeloop.core.polling import AdaptivePolling
from homeloop.core.statistics import ContextStatistics, Counters
from homeloop.core.workers import WorkerPool
from homeloop.errors import ContextClosed, NoRuntime, UsageError, WouldDeadlock, WrongState, WrongThread

if TYPE_CHECKING:
    from homeloop.core.biglock import BigLock
    from homeloop.core.runtime import Runtime

__all__ = ["AioContext"]

T = TypeVar("T")
get_ident = threading.get_ident
copy_context = contextvars.copy_context

# Wakes that one entry may run before the loop goes round: more than the longest chain anybody was promised
# (25,000), few enough that two coroutines which wake each other for ever do not starve I/O and the big lock.
CHAIN_MAX = 32_768


class AioContext:
    """An event loop with a home. Its methods may be called from any thread unless they say otherwise.

    Made by Runtime, IOThread, new_event_loop() or AioContext.of(), not by itself. name: for people. loop: the asyncio
    loop in it, for the home thread only, or for who holds the big lock; all else of it raises WrongThread (rule 17).
    """

    def __init__(self, name: str, *, runtime: Runtime | None = None, loop: asyncio.AbstractEventLoop | None = None,
                 worker_min: int = 0, worker_max: int = 64) -> None:
        self.name = name
        self.runtime = runtime
        self.gate: BigLock | None = None                        # the big lock, in a main context that has one
        self.running: Coroutine[Any] | None = None              # home: the Coroutine that runs now
        self.driven: Coroutine[Any] | None = None               # big lock: a call() that its caller drives
        self.coroutines: set[Coroutine[Any]] = set()            # home: those that have suspended and not ended
        self.counters = Counters()
        self.debug = loop is not None and loop.get_debug()      # home or big lock: note where coroutines come from
        self.orphaned = False                                   # of the parent process; set in a forked child
        self._outer_runtime: Runtime | None = None              # home: what thread.runtime was before
        self.home_away = False                                  # big lock: the home is in released()
        self.calls: Calls | None = None                        # home: the posted callbacks that run now
        self._wakes: list[Coroutine[Any]] = []                  # home: woken by what runs now, in order
        self._chain: deque[Coroutine[Any]] = deque()            # home: to run before anything that is ready
        self._wakes_queued = False                              # home: an entry for _wakes is at the head
        self._pool: WorkerPool | None = None                    # home, made on first use
        self._pool_limits = (worker_min, worker_max)
        if loop is None:
            own = HomeLoop(self)
            self.loop: asyncio.AbstractEventLoop = own
            self.inbox = own.inbox
        else:
            self.loop = loop
            self.inbox = Inbox(name, self._kick_foreign, lambda: None)
            self.inbox.serve_foreign(loop.is_closed)
        self.home: HomeLoop | None = self.loop if isinstance(self.loop, HomeLoop) else None
        self.lock = self.inbox.lock                             # a leaf; guards inbox, wakes and ends of coroutines
        forking.remember(self)

    def set_polling(self, poll_max_ns: int, grow: int = 0, shrink: int = 0) -> None:
        """Look for work up to poll_max_ns before each sleep, learning whether it pays; 0: never (rule 15).

        Any thread; it holds from the next sleep on. grow: factor, 0 for 2. shrink: divisor, 0 for straight to 0.
        UsageError for negative values, or where the loop is not homeloop's own.
        """
        if min(poll_max_ns, grow, shrink) < 0:
            raise UsageError(f"poll_max_ns={poll_max_ns}, grow={grow}, shrink={shrink}: none may be negative")
        if self.home is None:
            if poll_max_ns:
                raise UsageError(f"{self.name} runs {self.loop!r}: adaptive polling needs homeloop's own loop")
            return
        self.home.set_polling(AdaptivePolling(poll_max_ns, grow, shrink) if poll_max_ns else None)

    # -- asking ----------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Has it ended? Then it takes no more work."""
        return self.inbox.closed

    def is_current(self) -> bool:
        """Is the calling thread in this context: its home, or holding its big lock?"""
        return current_context() is self

    def may_enter(self) -> bool:
        """May the calling thread run this context's code right now?

        Less than is_current(): the home that sleeps (we are in a signal handler then), or that has let the big lock
        go, may not.
        """
        gate = self.gate
        if gate is not None:
            mine = thread.context
            return gate._holder == get_ident() and (mine is self or mine is None)
        if self.home is not None:
            return thread.context is self and not self.inbox.sleeping()
        return current_context() is self

    def is_main(self) -> bool:
        """Is it the main context of its runtime?"""
        return self.runtime is not None and self.runtime.main is self

    def statistics(self) -> ContextStatistics:
        """Return what it has done so far. Any thread; the counts are of about the same moment."""
        counters = self.counters
        return ContextStatistics(
            name=self.name,
            entered=counters.entered,
            scheduled=counters.scheduled,
            kicks=self.inbox.kicks,
            posted=counters.posted,
            calls_driven=counters.calls_driven,
            calls_handed_over=counters.calls_handed_over,
            coroutines=len(self.coroutines),
            polling=None if self.home is None else self.home.polling_statistics(),
            workers={} if self._pool is None else self._pool.statistics(),
        )

    def __repr__(self) -> str:
        kind = "main" if self.is_main() else "closed" if self.closed else "context"
        return f"<AioContext {self.name} {kind} coroutines={len(self.coroutines)}>"

    # -- work from any thread --------------------------------------------------------------------------

    def create(self, coro: CoroutineABC[Any, Any, T], *, name: str | None = None) -> Coroutine[T]:
        """Give a coroutine object this home; it is not started. Any thread.

        The caller's contextvars go along. ContextClosed if the context has ended (coro is closed then),
        TypeError if it is no coroutine object, WrongState if it has begun already.
        """
        if type(coro) is not CoroutineType or coro.cr_suspended or self.debug:
            check_given(self, coro)
        if self.inbox.closed:
            coro.close()
            raise self.inbox.refusal()
        return Coroutine(self, coro, name)

    def spawn(self, coro: CoroutineABC[Any, Any, T], *, name: str | None = None) -> Coroutine[T]:
        """Start coro at home, in a later iteration of its loop; return its Coroutine at once. Any thread."""
        co = self.create(coro, name=name)
        self.schedule_new(co)
        return co

    async def run(self, coro: CoroutineABC[Any, Any, T]) -> T:
        """Run coro here and return its result; from a coroutine of any context or asyncio loop.

        Cancelling the waiting coroutine cancels coro and waits for it. contextvars go along. (rule 10)
        """
        return await self.spawn(coro)

    def call(self, coro: CoroutineABC[Any, Any, T], timeout: float | None = None) -> T:
        """Run coro here and wait for it, from synchronous code; return its result or raise its exception.

        On the main context, from a thread without a context: coro is driven in the calling thread, under the
        big lock; while it waits for something, this thread serves the loop if the home sleeps. From elsewhere
        as rule 11 has it, else WouldDeadlock. The caller's contextvars are visible to coro. After `timeout`
        seconds, or by Ctrl-C, coro is cancelled and waited for; then TimeoutError or KeyboardInterrupt.
        """
        mine = thread.context
        caller = mine or current_context()
        if caller is not None and caller is not self and not caller.is_main():
            coro.close()
            raise WouldDeadlock(f"call() from {caller.name} to {self.name}: an IOThread may wait only for itself; "
                                f"use `await context.run(...)`")
        co = self.create(coro)
        end = None if timeout is None else time.monotonic() + timeout
        if self.gate is not None and mine is None and (caller is None or caller is self):
            try:
                waiting.drive(self, self.gate, co, end)
            except BaseException:
                waiting.give_up_driven(co)
                raise
            if co.done():
                return co.outcome()
        else:
            return waiting.submit_call(co, timeout)
        return waiting.finish_call(co, None if end is None else max(0.0, end - time.monotonic()))

    def post(self, fn: Callable[..., object], /, *args: Any) -> None:
        """Call fn(*args) at home, in a later iteration, in the order of the posts. Any thread, signal handlers too.

        The caller's contextvars go along. An exception goes to the loop's exception handler. ContextClosed
        if the context has ended.
        """
        call = (fn, args, copy_context())
        with self.lock:
            entries = self.inbox.entries
            if entries and type(entries[-1]) is Calls:     # open: closing takes what is there
                entries[-1].append(call)        # whoever put the first of them has kicked
            elif self.inbox.closed:
                raise self.inbox.refusal()
            else:
                self._post_first_locked(call)

    def try_post(self, fn: Callable[..., object], /, *args: Any) -> bool:
        """post(), but False instead of ContextClosed."""
        call = (fn, args, copy_context())
        with self.lock:
            entries = self.inbox.entries
            if entries and type(entries[-1]) is Calls:
                entries[-1].append(call)
            elif self.inbox.closed:
                return False
            else:
                try:
                    self._post_first_locked(call)
                except ContextClosed:
                    return False
        return True

    def _post_first_locked(self, call: Call) -> None:
        calls = Calls() if self.home is not None else SingleCall()
        calls.context = self
        calls.append(call)
        self.inbox.put_locked(calls)

    def bottom_half(self, fn: Callable[[], object], *, idle: bool = False) -> BottomHalf:
        """Make a bottom half that calls fn() at home when scheduled; see BottomHalf. Any thread."""
        return BottomHalf(self, fn, idle=idle)

    def enter(self, co: Coroutine[Any] | CoroutineABC[Any, Any, Any]) -> bool:
        """Start or wake co: now if this thread is at home, else queued to the home (rule 3; QEMU: aio_co_enter)."""
        return self._mine(co).wake()

    def schedule(self, co: Coroutine[Any] | CoroutineABC[Any, Any, Any]) -> bool:
        """Start or wake co at home, never now (rule 3; QEMU: aio_co_schedule)."""
        return self._mine(co).schedule()

    def worker(self, fn: Callable[..., T], /, *args: Any) -> asyncio.Future[T]:
        """Queue fn(*args) to this context's worker threads; await the result. Home thread.

        contextvars go along. Cancelled while queued it does not run; while it runs, it is waited for.
        """
        if not self.is_current():
            raise WrongThread(f"worker() of {self.name} called elsewhere; use to_worker() in a coroutine of it")
        return self.pool().submit(functools.partial(contextvars.copy_context().run, fn, *args))

    def pool(self) -> WorkerPool:
        """The worker threads, made on first use. Home thread."""
        if self._pool is None:
            self._pool = WorkerPool(self, *self._pool_limits)
        return self._pool

    def wait_while(self, predicate: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until predicate() is false, serving the loop that this thread may serve meanwhile.

        Return False if `timeout` seconds were over first. Who changes what predicate() looks at calls kick()
        afterwards. Rule 11 says who may wait; else WouldDeadlock. Source: QEMU's AIO_WAIT_WHILE.
        """
        return waiting.wait_while(self, predicate, timeout)

    def wait_done(self, co: Coroutine[Any], timeout: float | None) -> bool:
        """Wait for the end of a coroutine of this context; False if the time is over first (rule 11)."""
        return waiting.wait_done(co, timeout)

    def poll(self, blocking: bool) -> bool:
        """One iteration of the loop, inside whatever runs now; True if it made progress.

        Home thread or who holds the big lock; a thread may also poll a context that nobody serves.
        blocking: sleep until there is something to do; a bare notification also ends the sleep, without
        progress. Outer work first; current task and contextvars are right at every level (rule 12).
        Source: QEMU's aio_poll.
        """
        if self.home is None:
            raise UsageError(f"{self.name} runs a {type(self.loop).__module__} loop: nested polls need homeloop's own")
        if self.closed:
            raise self.inbox.refusal()
        if not self.is_current() and self.home.home_ident is not None:
            raise WrongThread(f"poll() of {self.name} in thread {threading.current_thread().name!r}: its home thread "
                              f"polls it, or who holds the big lock")
        with self.stand_in():
            return self._poll_here(self.home, blocking)

    @contextlib.contextmanager
    def stand_in(self) -> Iterator[None]:
        """Be one that may run this context's code, for the block: as it is, under its big lock, else as its home."""
        if self.may_enter():
            yield
        elif self.gate is not None:
            with self.gate:
                yield
        else:
            self.begin_serving()
            outer_loop = running_loop()
            set_running_loop(self.loop)
            try:
                yield
            finally:
                set_running_loop(outer_loop)
                self.end_serving()

    # -- of a loop of any make -------------------------------------------------------------------------

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop | None = None) -> AioContext:
        """Return the context of a running loop of any make; None: of the loop that runs in this thread.

        A loop that is not homeloop's is adopted: its thread is the home as long as it runs. What such a loop
        cannot do (poll, nested waits) says so. Call it in the loop's own thread, or pass a loop that has
        been adopted before. NoRuntime (RuntimeError) without a running loop.
        """
        return _adopt(loop)

    def runs_in_this_thread(self) -> bool:
        """Does the context's loop run in the calling thread?"""
        return running_loop() is self.loop

    # -- for the runtime: home thread or big lock -------------------------------------------------------

    def is_served(self) -> bool:            # or, a loop of another make: does it run?
        """Has it a home thread now?"""
        return self.loop.is_running() if self.home is None else self.home.home_ident is not None

    def has_ended_locked(self) -> bool:
        """Does it take no more work? Asks a loop of another make."""
        if self.home is None and self.loop.is_closed():
            self.inbox.closed = True
        return self.inbox.closed

    def check_open_locked(self) -> None:
        """Raise ContextClosed if the context has ended."""
        self.inbox.check_open_locked()

    def queue(self, co: Coroutine[Any]) -> None:
        """Step co in the next iteration, after what is ready."""
        if self.home is not None:
            self.home.queue(co)
        else:
            self.loop.call_soon(co)

    def enter_here(self, co: Coroutine[Any]) -> None:
        """Rule 3's enter, in a thread that is at home. co is SCHEDULED and in no queue."""
        if self.running is not None:
            self._wakes.append(co)
        elif current_task(self.loop) is None:
            self.run_chain(co)
        else:
            # An asyncio task runs; nobody tells us when it parks. The head of the ready queue is what
            # runs right after it.
            self._wakes.append(co)
            if not self._wakes_queued:
                self._wakes_queued = True
                if self.home is not None:
                    self.home.queue_first(RunWakes(self))
                else:
                    self.loop.call_soon(RunWakes(self))

    def run_chain(self, co: Coroutine[Any]) -> None:
        """Step co, then those that it woke, then those that they woke: depth first, in the order of the
        wakes, with constant stack. Source: qemu_aio_coroutine_enter."""
        self._chain.appendleft(co)
        self._run_chain()

    def run_new(self, co: Coroutine[Any]) -> None:
        """run_chain() of a coroutine that nobody else has seen."""
        co.set_scheduled()
        self.running = co
        try:
            co.step()
        except BaseException:           # Ctrl-C: what it woke before is still owed its turn
            self._chain_to_queue(first=True)
            raise
        finally:
            self.running = None
        if self._wakes or self._chain:
            self._take_wakes()
            self._run_chain()

    def _run_chain(self) -> None:
        chain = self._chain
        left = CHAIN_MAX
        try:
            while chain and left:
                self.running = co = chain.popleft()
                co.step()
                if self._wakes:
                    chain.extendleft(reversed(self._wakes))
                    self._wakes.clear()
                left -= 1
        finally:
            self.running = None
            if chain or self._wakes:
                self._chain_to_queue(first=left > 0)

    def _take_wakes(self) -> None:
        self._chain.extendleft(reversed(self._wakes))
        self._wakes.clear()

    def run_wakes(self) -> None:
        """Run what the asyncio task before us woke."""
        self._wakes_queued = False
        self._take_wakes()
        self._run_chain()

    def _chain_to_queue(self, *, first: bool) -> None:
        """What the chain has not run goes to the ready queue: to its head, or behind what waits there."""
        self._take_wakes()
        entries = list(self._chain)
        self._chain.clear()
        if first and self.home is not None:
            for co in reversed(entries):
                self.home.queue_first(co)
        else:
            for co in entries:
                self.queue(co)

    def runs_something(self) -> bool:
        """Is a coroutine or an asyncio task of this context on the stack of who asks?"""
        return self.running is not None or current_task(self.loop) is not None

    def suspend_running(self) -> Any:
        """Step out of what runs now (a nested poll, or the home lets the big lock go). Undone by resume_running."""
        task = current_task(self.loop)
        if task is not None:
            leave_task(self.loop, task)
        running, self.running = self.running, None
        thread.below.append(running or task)
        return running, task

    def resume_running(self, suspended: Any) -> None:
        """Go on with what suspend_running() stepped out of."""
        thread.below.pop()
        self.running, task = suspended
        if task is not None:
            enter_task(self.loop, task)

    def _poll_here(self, home: HomeLoop, blocking: bool) -> bool:
        suspended = self.suspend_running()
        progress = False
        try:
            if self._wakes or self._chain:
                self._take_wakes()
                self._run_chain()
                progress = True
            if self.calls:
                self.calls._run()
                progress = True
            return home.run_one(blocking=blocking and not progress) or progress
        finally:
            self.resume_running(suspended)

    def discount_turn(self) -> None:
        """What runs now is no progress."""
        if self.home is not None:
            self.home.turns -= 1

    def report(self, what: dict[str, Any]) -> None:
        """Hand an error that nobody waits for to the loop's exception handler."""
        self.loop.call_exception_handler(what)

    def begin_serving(self) -> None:
        """Become the home (rule 1); until end_serving, it stays this thread."""
        home, me = self.home, get_ident()
        if thread.context is not None or thread.held is not None:
            what = thread.context.name if thread.context is not None else "a big lock"
            raise WrongState(f"this thread cannot serve {self.name}: it has {what}")
        if home is not None:
            with self.lock:
                if home.home_ident is not None:
                    raise WrongThread(f"{self.name} is served by another thread")
                home.home_ident = me
        else:
            _adopted.remember(self)     # of() must not make a second context for it
        thread.context = self
        self._outer_runtime = thread.runtime
        thread.runtime = self.runtime or thread.runtime
        if self.gate is not None:
            try:
                self.gate.take(me)
            except BaseException:
                self._leave_home()
                raise

    def end_serving(self) -> None:
        """Stop being the home."""
        if self.gate is not None:
            self.gate.hand_over()
        self._leave_home()
        waiting.kick()                  # who slept because we served must look for itself

    def _leave_home(self) -> None:
        thread.context = None
        thread.runtime = self._outer_runtime
        if self.home is not None:
            self.home.home_ident = None

    async def stop_workers(self) -> None:
        """End the worker threads, after what they were given; the loop goes on meanwhile."""
        if self._pool is not None:
            await self._pool.stop()

    def close_inbox(self) -> None:
        """End it: no more work; what nobody ran is cancelled. Home thread, its last act."""
        left = self.inbox.close()
        if self.home is not None:
            left += self.home.ready_entries()
        left += [*self._chain, *self._wakes, *self.coroutines]
        for entry in left:
            if isinstance(entry, Coroutine) and not entry.done():
                try:
                    entry.abandon(asyncio.CancelledError(f"{self.name} has ended"))
                except BaseException as exc:        # its `finally` awaits, or raises: the others are owed their end
                    self.report({"message": f"exception while {entry!r} was closed", "exception": exc})
        if self.runtime is not None and self.is_main():
            self.runtime.forget()

    def orphan(self) -> None:
        """In a forked child: the home is a thread of the parent. End, and say so to who comes."""
        self.orphaned = True
        self.inbox.orphan()
        self.lock = self.inbox.lock
        if self.gate is not None:
            self.gate.orphan()
        if self.home is not None:
            self.home.orphan()

    # -- inside ----------------------------------------------------------------------------------------

    def schedule_new(self, co: Coroutine[Any]) -> None:     # any thread
        if not co.schedule():
            raise self.inbox.refusal()

    def _mine(self, co: Coroutine[Any] | CoroutineABC[Any, Any, Any]) -> Coroutine[Any]:
        if not isinstance(co, Coroutine):
            return self.create(co)
        if co.context is not self:
            raise not_at_home(co, self)
        return co

    def _kick_foreign(self) -> None:
        """The inbox of a loop that is not ours: each kick is a callback there."""
        self.loop.call_soon_threadsafe(self._drain_foreign)

    def _drain_foreign(self) -> None:
        entries: deque[Any] = deque()
        with self.lock:
            self.inbox.take(entries)
            self.inbox.rearm()
        try:
            while entries:
                entry = entries.popleft()
                if not entry._cancelled:
                    entry._run()
        finally:
            if entries:                 # SystemExit, Ctrl-C
                with self.lock:
                    self.inbox.put_back_locked(entries)


_adopted = AdoptedLoops()


def _adopt(loop: asyncio.AbstractEventLoop | None) -> AioContext:
    """AioContext.of."""
    here = running_loop()
    if loop is None:
        if here is None:
            raise NoRuntime("no event loop runs in this thread")
        loop = here
    if isinstance(loop, HomeLoop):
        return loop.context
    if thread.context is not None and thread.context.loop is loop:
        return thread.context
    context = _adopted.get(loop)
    if context is None:
        if loop is not here:
            raise WrongThread(f"{loop!r} has no context yet: call AioContext.of() in the thread that runs it first")
        context = AioContext(f"adopted-{next(_adopted.numbers)}", loop=loop)
        _adopted.remember(context)
    if loop is here and thread.context is None:
        thread.adopted = context
    return context
