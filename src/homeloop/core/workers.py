"""Worker threads: blocking functions off the loop, awaited from it (rule 16).

One pool per context. A thread is made when work is queued and no thread is idle, up to `maximum`; one that
is idle for 10 s ends, down to `minimum`. Source: QEMU's util/thread-pool.c (behaviour; see design rule 16).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from homeloop.core.current import current_context, thread
from homeloop.core.waitgraph import AnyOf, Hop, begin_await, end_await, sleeps_of
from homeloop.errors import ContextClosed, NoRuntime, UsageError

if TYPE_CHECKING:
    from homeloop.core.context import AioContext

__all__ = ["WorkerPool", "to_worker"]

T = TypeVar("T")
get_ident = threading.get_ident
IDLE_END_S = 10.0           # QEMU's worker idle time-out
REPORT_AFTER_S = 5.0        # an end that waits this long for a worker says for which


class _Work(asyncio.Future[Any]):
    """One call. A future of the context's loop: cancelling it takes the call out of the queue, or waits for it.

    detached: as asyncio's executors have it, a call that runs is left to itself, the future is cancelled at once.
    """

    def __init__(self, pool: WorkerPool, fn: Callable[[], Any], detached: bool) -> None:
        super().__init__(loop=pool.context.loop)
        self.pool = pool
        self.fn = fn
        self.detached = detached
        self.cancel_message: Any = None         # home
        self.cancel_wanted = False              # home: cancelled while it ran
        self.runner = 0                         # the worker thread's: its ident while it runs fn
        self.ran = False                        # the worker thread's

    def __await__(self) -> Generator[Any, Any, Any]:
        if self.done():
            return self.result()
        waiter = begin_await(self)
        try:
            return (yield from super().__await__())
        finally:
            end_await(waiter)

    # As a link of the wait graph (see waitgraph.Link): who runs it, or keeps it from being run.
    refuses = True

    @property
    def passes_cancel(self) -> bool | None:
        return False if self.runner and not self.detached else None

    def pending(self) -> bool:
        return not self.ran and not self.done()

    def needs(self) -> Sequence[Hop | AnyOf]:
        if self.runner:
            return [Hop(sleep, ", run by {}") for sleep in sleeps_of(self.runner)]
        busy = self.pool.busy()
        if not busy:
            return ()
        sleeps = [sleeps_of(ident)[-1:] for ident in busy]
        if not all(sleeps):
            return ()                   # somebody works, and will take it
        return (AnyOf(tuple(Hop(sleep, ", queued behind what {} runs") for [sleep] in sleeps)),)

    def sought(self) -> str:
        return f"{_described(self.fn)} on a worker of {self.pool.context.name}"

    def cancel(self, msg: Any = None) -> bool:
        """Cancel now if it is still queued; else once it has run, whose result is then dropped."""
        if self.done():
            return False
        if self.pool.context.home is not None:
            self.pool.context.home.check_home("Future.cancel")
        if self.pool.withdraw(self) or self.detached:
            return super().cancel(msg)
        self.cancel_wanted = True
        self.cancel_message = msg
        return True

    def complete(self, result: Any, exception: BaseException | None) -> None:       # home
        if self.done():
            return                      # detached, and cancelled
        if self.cancel_wanted:
            super().cancel(self.cancel_message)
        elif exception is not None:
            if isinstance(exception, StopIteration):        # a future cannot carry one
                exception = RuntimeError(f"{self.fn!r} raised StopIteration")
            elif isinstance(exception, concurrent.futures.CancelledError):
                exception = asyncio.CancelledError(*exception.args)     # as asyncio translates it
            self.set_exception(exception)
        else:
            self.set_result(result)


class WorkerPool:
    """The worker threads of one context."""

    def __init__(self, context: AioContext, minimum: int = 0, maximum: int = 64) -> None:
        _check_limits(minimum, maximum)
        self.context = context
        self._lock = threading.Lock()                   # a leaf
        self.minimum = minimum                          # under _lock
        self.maximum = maximum                          # under _lock
        self._work: deque[_Work | Callable[[], object]] = deque()              # under _lock; FIFO
        self._idle: deque[threading.Lock] = deque()     # under _lock; gates of idle threads, newest last
        self._threads: set[threading.Thread] = set()    # under _lock
        # under _lock: what each thread runs now
        self._calls: dict[threading.Thread, _Work | Callable[[], object]] = {}
        self._stopping = False                          # under _lock
        self._done: deque[tuple[_Work, Any, BaseException | None]] = deque()    # under _lock: to hand over
        self._handing_over = False                      # under _lock: a message to the home is on its way
        self._started = 0                               # under _lock: threads ever made
        self._completed = 0                             # under _lock

    def submit(self, fn: Callable[[], T], *, detached: bool = False) -> asyncio.Future[T]:
        """Queue fn() and return its future (home thread). detached: see _Work."""
        work = _Work(self, fn, detached)
        self._queue(work)
        return work

    def submit_quiet(self, fn: Callable[[], object]) -> None:
        """Queue fn() and tell nobody of its end (home thread). It must not raise, and cannot be withdrawn."""
        self._queue(fn)

    def _queue(self, work: _Work | Callable[[], object]) -> None:
        with self._lock:
            if self._stopping:
                raise ContextClosed(f"the workers of {self.context.name} have ended")
            self._work.append(work)
            if self._idle:
                self._idle.pop().release()
            elif len(self._threads) < self.maximum:
                try:
                    self._start_locked()
                except RuntimeError:
                    if not self._threads:       # else those that are there will come to it
                        self._work.remove(work)
                        raise

    def set_limits(self, minimum: int, maximum: int) -> None:
        """Change how many threads there may be. Any thread, never waits; UsageError for limits that cannot be.

        More: what is queued gets them now. Fewer: nothing that runs is stopped; who has nothing to do ends, the others
        after what they run.
        """
        _check_limits(minimum, maximum)
        with self._lock:
            self.minimum, self.maximum = minimum, maximum
            if self._stopping:
                return
            for _ in range(min(len(self._work), maximum - len(self._threads))):
                try:
                    self._start_locked()
                except RuntimeError:        # the system has no more: those that are there will come to it
                    break
            while self._idle:               # they look again whether they may stay
                self._idle.pop().release()

    def running(self) -> list[int]:
        """The idents of the threads that run a call. Any thread, no lock."""
        return [worker.ident for worker in list(self._calls) if worker.ident is not None]

    def busy(self) -> list[int]:
        """The idents of all threads, if there may be no more and each runs a call; else []. Any thread, no lock."""
        idents = self.running()
        return idents if len(idents) >= self.maximum else []

    def withdraw(self, work: _Work) -> bool:
        """Take queued work back. False: it runs, or has run."""
        with self._lock:
            try:
                self._work.remove(work)
            except ValueError:
                return False
            return True

    async def stop(self) -> None:
        """Let the queue run empty, end the threads and wait for them. Home thread; twice is fine.

        The loop goes on meanwhile: a worker may need it, or the big lock, for its last call.
        """
        with self._lock:
            self._stopping = True
            while self._idle:
                self._idle.pop().release()
            threads = list(self._threads)
        if threads:
            ended = self.context.loop.create_future()
            threading.Thread(target=self._join, args=(threads, ended), name=f"{self.context.name}-reaper").start()
            await ended

    def _join(self, threads: list[threading.Thread], ended: asyncio.Future[None]) -> None:
        try:
            for worker in threads:
                worker.join(REPORT_AFTER_S)
                if worker.is_alive():
                    self.context.try_post(self._report_slow, worker)
                    worker.join()
        finally:
            self.context.try_post(_settle, ended)

    def _report_slow(self, worker: threading.Thread) -> None:       # home
        """The end waits for a call that does not return: say which, and where it stands."""
        with self._lock:
            work = self._calls.get(worker)
        frame = sys._current_frames().get(worker.ident or 0)
        if work is None or frame is None:
            return                          # it has just ended
        what = work.fn if isinstance(work, _Work) else work
        stack = "".join(traceback.format_stack(frame))
        self.context.report({
            "message": f"the end of {self.context.name} waits for {_described(what)}, which runs in {worker.name}:\n"
                       f"{stack}"
        })

    def statistics(self) -> dict[str, int]:
        """Return counts: threads, idle ones, queued and completed calls."""
        return {
            "threads": len(self._threads),
            "idle": len(self._idle),
            "queued": len(self._work),
            "started": self._started,
            "completed": self._completed,
        }

    def _start_locked(self) -> None:
        self._started += 1
        worker = threading.Thread(
            target=self._serve, name=f"{self.context.name}-worker-{self._started}", daemon=True
        )
        self._threads.add(worker)
        try:
            worker.start()
        except BaseException:           # the system has no more threads
            self._threads.discard(worker)
            raise

    def _serve(self) -> None:               # a worker thread
        thread.runtime = self.context.runtime
        thread.pool_of = self.context
        me = threading.current_thread()
        try:
            while (work := self._next()) is not None:
                with self._lock:
                    self._calls[me] = work
                if not isinstance(work, _Work):
                    work()
                    with self._lock:
                        del self._calls[me]
                        self._completed += 1
                    continue
                work.runner = get_ident()
                try:
                    outcome: tuple[Any, BaseException | None] = (work.fn(), None)
                except BaseException as exc:        # its place is at the waiter, whatever it is
                    outcome = (None, exc)
                work.ran = True
                with self._lock:
                    del self._calls[me]
                self._hand_over(work, *outcome)
                del work, outcome
        finally:
            with self._lock:
                self._threads.discard(me)

    def _next(self) -> _Work | Callable[[], object] | None:
        """Wait for work. None: end."""
        idle_until = time.monotonic() + IDLE_END_S
        while True:
            with self._lock:
                if len(self._threads) > self.maximum:       # set_limits(); the others come to what is queued
                    self._threads.discard(threading.current_thread())
                    return None
                if self._work:
                    return self._work.popleft()
                if self._stopping:
                    return None
                if time.monotonic() >= idle_until and len(self._threads) > self.minimum:
                    self._threads.discard(threading.current_thread())
                    return None
                gate = threading.Lock()
                gate.acquire()
                self._idle.append(gate)
            if not gate.acquire(timeout=IDLE_END_S):
                with self._lock:
                    if gate in self._idle:
                        self._idle.remove(gate)

    def _hand_over(self, work: _Work, result: Any, exception: BaseException | None) -> None:
        with self._lock:
            self._completed += 1
            self._done.append((work, result, exception))
            if self._handing_over:
                return                          # one message carries all that are done by the time it arrives
            self._handing_over = True
        self.context.try_post(self._deliver)

    def _deliver(self) -> None:             # home
        with self._lock:
            done, self._done = self._done, deque()
            self._handing_over = False
        for work, result, exception in done:
            work.complete(result, exception)


def _check_limits(minimum: int, maximum: int) -> None:
    if minimum < 0 or maximum < 1 or minimum > maximum:
        raise UsageError(f"worker_min={minimum}, worker_max={maximum}: need 0 <= min <= max and max >= 1")


def _described(fn: Callable[[], Any]) -> str:
    """What a call is, for people: the caller's function without what was put around it."""
    while isinstance(fn, functools.partial) and fn.args:
        fn = fn.args[0]
    return f"{getattr(fn, '__qualname__', None) or repr(fn)}()"


def _settle(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


async def to_worker(fn: Callable[..., T], /, *args: Any) -> T:
    """Run fn(*args) on the current context's worker pool; return its result or raise its exception.

    From a coroutine of any context. contextvars go along. Cancelled while queued, it does not run; cancelled
    while it runs, the function is waited for and its result dropped.
    """
    context = current_context()
    if context is None:
        raise NoRuntime("to_worker() needs a context; asyncio.to_thread() is for plain asyncio loops")
    return await context.worker(fn, *args)
