"""The way of one device's blocking calls to worker threads and back, in batches both ways.

A thread switch for each request is the dearest thing of all (50 to 100 us). So:

    home     put() put() put()  -> push(): all of one turn of the loop, one wake
    worker   _drain(): one job after the other until there is none, one message home for all that are done
    home     _deliver(): job.done(job) for each

How many threads: a serialised lane has one drain at a time. A parallel one begins with one as well: where the calls
are quick, or hold the GIL, more threads only get into each other's way. Each millisecond the home looks whether the
jobs that wait are getting on; where they are not, the calls block, and for a while every job that waits gets a
thread of its own, up to the limit (_look). The same look collects what is done behind a call that takes long, so
that a quick answer waits for a slow neighbour for 1 ms at most.

Nothing here knows what a job does.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from homeloop.core.context import AioContext
from homeloop.core.current import current_context

__all__ = ["NOT_BEGUN", "Job", "Lane"]

NOT_BEGUN: Final = object()     # the answer of a job that no thread came to; its error says why

# A drain reports what is done when so much time has passed since it began or last did: about the price of a hop.
_TELL_AFTER_S: Final = 50e-6
_LOOK_EVERY_S: Final = 1e-3
# Jobs begun between two looks, with others waiting. Fewer: each takes longer than a hop, which more threads are worth.
_GETTING_ON: Final = 10
# Looks for which a lane that did not get on gives each job a thread; then it tries one for all again.
_EAGER_LOOKS: Final = 250
_THREADS_MAX: Final = 64
# Jobs of one drain. Then the thread is the next device's, if one waits for it.
_DRAIN_JOBS_MAX: Final = 1024


class Job:
    """One call on a worker: call(*args) there, then done(job) at home, with `answer` or `error`."""

    __slots__ = ("answer", "args", "call", "done", "error")

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...], done: Callable[[Any], object]) -> None:
        self.call = call
        self.args = args
        self.done = done                            # must not raise
        self.answer: Any = None                     # the drain's, then the home's
        self.error: BaseException | None = None     # likewise


class _Home:
    """Where a lane is at home: its workers, and the way back. A context, or a plain asyncio loop and its executor."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.context: AioContext | None = current_context()

    def start(self, fn: Callable[[], None]) -> None:
        """Run fn() on a worker thread. Raises what keeps it from that: the end of the home, no more threads."""
        if self.context is not None:
            self.context.pool().submit_quiet(fn)
        else:
            _ = self.loop.run_in_executor(None, fn)

    def post(self, fn: Callable[[], None]) -> None:
        """Run fn() at home; nothing if the home has ended. Any thread."""
        if self.context is not None:
            self.context.try_post(fn)
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(fn)


class Lane:
    """The blocking calls of one device. All but _drain: home thread.

    serialised: one at a time, in the order of put(). parallel: begun in that order.
    """

    def __init__(self, *, parallel: bool) -> None:
        self._parallel = parallel
        self._home: _Home | None = None             # home; of the jobs that are open
        self._new: list[Job] = []                   # home: put, not pushed yet
        self._push_queued = False                   # home
        self._open = 0                              # home: jobs put and not delivered
        self._look_handle: asyncio.TimerHandle | None = None    # home
        self._eager_looks = 0                       # home: for so many more each job gets a thread
        self._begun_before = 0                      # home: _begun at the last look
        self._lock = threading.Lock()               # a leaf
        self._jobs: deque[Job] = deque()            # under _lock: wait for a thread; as many as requests in flight
        self._drains = 0                            # under _lock: that run, or are about to
        self._begun = 0                             # under _lock: jobs taken by drains, ever
        self._ended: list[Job] = []                 # under _lock: to be delivered
        self._told = False                          # under _lock: a message home is on its way

    def put(self, job: Job) -> None:
        """Let it run on a worker thread. What is put in one turn of the loop goes together."""
        if not self._open:
            self._home = _Home()
        self._open += 1
        self._new.append(job)
        if not self._push_queued:
            self._push_queued = True
            self._at_home().loop.call_soon(self.push)

    def push(self) -> None:
        """Hand over now what was put."""
        self._push_queued = False
        if not self._new:
            return
        with self._lock:
            self._jobs.extend(self._new)
            self._new.clear()
        self._start_drains()
        self._look_later()

    def withdraw(self, job: Job) -> bool:
        """Take a job back that nobody has begun: it is neither called nor delivered. False: too late."""
        if job in self._new:
            self._new.remove(job)
        else:
            with self._lock:
                if job not in self._jobs:
                    return False
                self._jobs.remove(job)
        self._open -= 1
        return True

    async def run(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Put a call and wait for it; contextvars go along.

        Cancelled: what has not begun is dropped, what runs is waited for.
        """
        call = functools.partial(contextvars.copy_context().run, fn, *args, **options)
        return await _Waiter(self, call)

    def _at_home(self) -> _Home:
        assert self._home is not None, "jobs without a home"
        return self._home

    def _start_drains(self) -> None:
        with self._lock:
            if self._parallel and self._eager_looks:
                wanted = min(len(self._jobs), _THREADS_MAX - self._drains)
            else:
                wanted = 1 if self._jobs and not self._drains else 0
            self._drains += wanted
        for started in range(wanted):
            try:
                self._at_home().start(self._drain)
            except Exception as error:
                self._not_started(wanted - started, error)
                return

    def _not_started(self, drains: int, error: Exception) -> None:
        """The system has no more threads, or the home ends: others come to the jobs, or else they fail."""
        with self._lock:
            self._drains -= drains
            if not self._drains:
                for job in self._jobs:
                    job.answer, job.error = NOT_BEGUN, error
                self._ended.extend(self._jobs)
                self._jobs.clear()
        self._at_home().loop.call_soon(self._deliver)

    def _drain(self) -> None:                       # a worker thread
        tell_at = time.perf_counter() + _TELL_AFTER_S
        left = _DRAIN_JOBS_MAX
        job: Job | None = None
        while True:
            now = time.perf_counter()
            with self._lock:
                if job is not None:
                    self._ended.append(job)
                if self._jobs and left:
                    job = self._jobs.popleft()
                    self._begun += 1
                    tell = now >= tell_at and not self._told and bool(self._ended)
                else:
                    job = None
                    self._drains -= 1
                    tell = not self._told and bool(self._ended)
                if tell:
                    self._told = True
            if tell:
                tell_at = now + _TELL_AFTER_S
                self._at_home().post(self._deliver)
            if job is None:
                return
            left -= 1
            try:
                job.answer = job.call(*job.args)
            except BaseException as error:          # its place is at the waiter, whatever it is
                job.error = error

    def _deliver(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
            self._told = False
            stopped = bool(self._jobs) and not self._drains
        self._open -= len(ended)
        for job in ended:
            job.done(job)
        if stopped:                                 # a drain had done its share
            self._start_drains()

    def _look_later(self) -> None:
        # One job alone needs no look: its drain tells of it in any case.
        if self._look_handle is None and self._open > 1:
            self._look_handle = self._at_home().loop.call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        """Do the jobs get on? See the module's text."""
        self._look_handle = None
        self._deliver()
        with self._lock:
            waiting, begun = bool(self._jobs), self._begun
        if self._eager_looks:
            self._eager_looks -= 1
        elif waiting and begun - self._begun_before < _GETTING_ON:
            self._eager_looks = _EAGER_LOOKS
            if self._parallel:
                self._start_drains()
        self._begun_before = begun
        self._look_later()


class _Waiter(asyncio.Future[Any]):
    """Waits for one job. Cancelling it takes the job back, or waits for its end and then drops what came of it."""

    def __init__(self, lane: Lane, call: Callable[[], Any]) -> None:
        super().__init__()
        self._lane = lane
        self._job = Job(call, (), self._ended)
        self._cancel_wanted = False
        self._message: Any = None
        lane.put(self._job)

    def cancel(self, msg: Any = None) -> bool:
        if self.done():
            return False
        if self._lane.withdraw(self._job):
            return super().cancel(msg)
        self._cancel_wanted = True
        self._message = msg
        return True

    def _ended(self, job: Job) -> None:
        if self.done():
            return                                  # the loop's end cancelled it
        if self._cancel_wanted:
            super().cancel(self._message)
        elif job.error is not None:
            self.set_exception(job.error)
        else:
            self.set_result(job.answer)
