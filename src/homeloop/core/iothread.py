"""Threads that serve a context: IOThread for users, and the one under `with Runtime()`."""

from __future__ import annotations

import asyncio
import enum
import itertools
import threading
from collections.abc import Callable, Sequence
from collections.abc import Coroutine as CoroutineABC
from types import TracebackType
from typing import Any, TypeVar

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.current import current_context, thread
from homeloop.core.ending import end_context
from homeloop.core.loop import HomeLoop
from homeloop.core.polling import default_poll_max_ns
from homeloop.core.registry import runtime_of_this_thread
from homeloop.core.waitgraph import AnyOf, Hop, Sleep, needs_of_context, sleeps_of
from homeloop.core.waiting import kick, wait_while
from homeloop.errors import UsageError, WouldDeadlock, WrongState

__all__ = ["ContextThread", "IOThread"]

T = TypeVar("T")
_numbers = itertools.count(1)


class _State(enum.Enum):
    NEW = "new"
    RUNNING = "running"
    ENDED = "ended"


class ContextThread:
    """A thread that is the home of one context from start() to stop() (rule 14)."""

    def __init__(self, name: str, make: Callable[[], AioContext]) -> None:
        self.name = name
        self._make = make                                   # runs in the thread
        self._lock = threading.Lock()                       # a leaf
        self._state = _State.NEW                            # under _lock
        self._context: AioContext | None = None             # set once, before start() returns
        self._failure: BaseException | None = None          # what start-up raised
        self._looping = False                               # home: not yet in end_context()
        self._started = threading.Event()
        self._ended = threading.Event()                     # set by the thread, its last act but a kick
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    @property
    def context(self) -> AioContext:
        """The context that the thread serves; WrongState before start()."""
        if self._context is None:
            raise WrongState(f"{self.name} has not been started")
        return self._context

    def start(self) -> None:
        """Start the thread; return when its loop runs. Raises what start-up raised. Any thread, once."""
        with self._lock:
            if self._state is not _State.NEW:
                raise WrongState(f"{self.name} cannot be started: it is {self._state.value}")
            self._state = _State.RUNNING
        try:
            self._thread.start()
        except RuntimeError as exc:         # the system gives no more threads
            self._failure = exc
            self._started.set()
        self._started.wait()
        if self._failure is not None:
            if self._thread.ident is not None:
                self._thread.join()
            with self._lock:
                self._state = _State.ENDED
            raise self._failure

    def stop(self) -> None:
        """Run what was posted before, cancel what is left, wait for it, end the thread and join it.

        Any thread that may wait for it (rule 11): the main context's home serves its loop meanwhile; from
        itself or another IOThread WouldDeadlock. Twice is fine; before start() it only refuses a start.
        """
        if self._ended.is_set() and not self._thread.is_alive():
            return                      # nobody waits: from an IOThread, too, that left the stop to a worker
        here = current_context()
        if threading.current_thread() is self._thread:
            raise WouldDeadlock(f"{self.name} would wait for its own end: stop it from another thread")
        if here is not None and not here.is_main():
            raise WouldDeadlock(f"{here.name} would wait for the end of {self.name}: an IOThread may wait only for "
                                f"itself; use `await to_worker(iothread.stop)`")
        if thread.pool_of is not None and thread.pool_of is self._context:
            raise WouldDeadlock(f"a worker of {self.name} would wait for the end of its own pool")
        with self._lock:
            state, self._state = self._state, _State.ENDED
        if state is _State.NEW:
            self._started.set()         # nobody will start it: a second stop() has nothing to wait for
            return
        self._started.wait()            # another thread may be in start()
        if self._context is None:
            return
        gate = self._context.gate
        if gate is not None and gate.held() and here is None:
            gate.hand_over()        # left behind by a Ctrl-C in `with big_lock:`; the end would wait for us
        self._context.try_post(self._stop_loop)
        link = _Ending(self)
        if here is not None:
            wait_while(here, lambda: not self._ended.is_set(), None, link)
            self._thread.join()
            return
        sleep = Sleep(link)
        try:
            sleep.begin()
            self._ended.wait()          # up to 3.12 a join() that a Ctrl-C leaves takes the thread for ended
            self._thread.join()
        finally:
            sleep.end()

    def ended(self) -> bool:
        """Has its context ended? Any thread."""
        return self._ended.is_set()

    def _stop_loop(self) -> None:               # home
        if self._looping:
            self.context.loop.stop()

    def _main(self) -> None:
        try:
            context = self._make()
            context.begin_serving()
        except BaseException as exc:
            self._failure = exc
            self._started.set()
            return
        self._context = context
        context.loop.call_soon(self._started.set)
        try:
            try:
                self._looping = True
                context.loop.run_forever()
            finally:                # also where a coroutine raised SystemExit: what is left is still owed its end
                self._looping = False
                end_context(context)
        finally:
            context.end_serving()
            self._ended.set()
            kick()


class _Ending:
    """The end of a context's thread, as a link of the wait graph: it waits for the worker threads."""

    passes_cancel = False
    refuses = True

    def __init__(self, ending: ContextThread) -> None:
        self._ending = ending

    def pending(self) -> bool:
        return not self._ending.ended()

    def needs(self) -> Sequence[Hop | AnyOf]:
        context = self._ending.context
        pool = context._pool
        idents = [] if pool is None else pool.running()
        workers = [Hop(sleep, ", whose worker, {}, has not ended") for ident in idents for sleep in sleeps_of(ident)]
        return [*workers, *needs_of_context(context)]

    def sought(self) -> str:
        return f"the end of {self._ending.name}"


class IOThread:
    """A thread with a context of its own.

    `with` it, or start() and stop(). loop_factory: a loop of another make (uvloop.new_event_loop); polling
    and nested polls are then not available. poll_max_ns: look for work that long before a sleep, in nanoseconds
    (rule 15); None: 32768 in an interpreter without a GIL, 0 (off) in others. poll_grow, poll_shrink: see
    AioContext.set_polling. worker_min, worker_max: the threads of its worker pool.

    Any thread may make and start one. call() and stop(): threads that may wait (rule 11). The rest: any thread.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        poll_max_ns: int | None = None,
        poll_grow: int = 0,
        poll_shrink: int = 0,
        worker_min: int = 0,
        worker_max: int = 64,
    ) -> None:
        self.name = name or f"iothread-{next(_numbers)}"
        if not 0 <= worker_min <= worker_max or worker_max < 1:
            raise UsageError(f"worker_min={worker_min}, worker_max={worker_max}: need 0 <= min <= max and max >= 1")
        if min(poll_max_ns or 0, poll_grow, poll_shrink) < 0:
            raise UsageError("poll_max_ns, poll_grow and poll_shrink must not be negative")
        self.poll_max_ns = poll_max_ns
        self.poll_grow = poll_grow
        self.poll_shrink = poll_shrink
        self._loop_factory = loop_factory
        self._workers = (worker_min, worker_max)
        self._runtime = runtime_of_this_thread()
        self._thread = ContextThread(self.name, self._make_context)

    def _make_context(self) -> AioContext:
        loop = None if self._loop_factory is None else self._loop_factory()
        if isinstance(loop, HomeLoop):
            return AioContext.of(loop)
        low, high = self._workers
        context = AioContext(self.name, runtime=self._runtime, loop=loop, worker_min=low, worker_max=high)
        poll_max_ns = self.poll_max_ns
        if poll_max_ns is None:
            poll_max_ns = 0 if loop is not None else default_poll_max_ns()
        try:
            context.set_polling(poll_max_ns, self.poll_grow, self.poll_shrink)
        except UsageError:
            context.loop.close()
            raise
        return context

    @property
    def context(self) -> AioContext:
        """Its context; WrongState before start()."""
        return self._thread.context

    def start(self) -> IOThread:
        """Start the thread; return when its loop runs. Raises what start-up raised."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Run what was posted before, cancel and await what is left, end the thread.

        Any thread but itself (WouldDeadlock); the main context's home serves its loop meanwhile. Twice is fine.
        """
        self._thread.stop()

    def __enter__(self) -> IOThread:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def spawn(self, coro: CoroutineABC[Any, Any, T], *, name: str | None = None) -> Coroutine[T]:
        """AioContext.spawn on its context."""
        return self._context_for(coro).spawn(coro, name=name)

    async def run(self, coro: CoroutineABC[Any, Any, T]) -> T:
        """AioContext.run on its context."""
        return await self._context_for(coro).run(coro)

    def call(self, coro: CoroutineABC[Any, Any, T], timeout: float | None = None) -> T:
        """AioContext.call on its context."""
        return self._context_for(coro).call(coro, timeout)

    def post(self, fn: Callable[..., object], /, *args: Any) -> None:
        """AioContext.post on its context."""
        self.context.post(fn, *args)

    def _context_for(self, coro: CoroutineABC[Any, Any, Any]) -> AioContext:
        try:
            return self.context
        except UsageError:
            coro.close()
            raise

    def __repr__(self) -> str:
        return f"<IOThread {self.name} {self._thread._state.value}>"
