"""A soak for lost wakes, to run on one's own way to wait and wake."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.iothread import IOThread
from homeloop.testing.snapshots import snapshot

__all__ = ["SoakReport", "lost_wake_soak"]

Wait = Callable[[], Awaitable[object]]
Wake = Callable[[], object]
SPIN_MAX = 300          # rounds of a busy pause: up to some 10 us, what lies between a look and a sleep
ASLEEP_S = 0.005        # long enough for an idle home to go to sleep, also where others keep the processors busy
ASLEEP_SHARE = 0.05     # of the wakes: those that meet a home asleep
_NEVER = threading.Event()


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakReport:
    """What a soak did. `seed` repeats its moves. A value, for any thread."""

    seed: int
    wakes: int          # sent, and all of them arrived
    seconds: float


def lost_wake_soak(
    make: Callable[[], tuple[Wait, Wake]],
    *,
    context: AioContext | None = None,
    threads: int = 2,
    wakes: int = 5_000,
    limit_s: float = 10.0,
    exact: bool = True,
    seed: int | None = None,
) -> SoakReport:
    """Wake coroutines from `threads` plain threads, `wakes` times in all; each wake must arrive.

    make() is called in `context` (None: in an IOThread of its own) once for each thread. It returns (wait, wake): the
    coroutine `await wait()` returns once for each wake(), which is called from elsewhere, also before the wait. Each
    thread sends its next wake when the last has arrived, after a random pause: so wakes meet the waiter before, in
    and behind its wait, and its home awake and asleep.

    AssertionError with a snapshot() if a wake does not arrive within `limit_s` seconds; if wait() returned more often
    than it was woken (exact=False allows that). What wait or wake raises is raised. Call it in a thread without a
    context. After a failure the waiters are cancelled.
    """
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        if context is None:
            context = stack.enter_context(IOThread("lost-wake soak")).context
        each = max(1, wakes // threads)
        pairs = [_Pair(context, make, each, limit_s, exact, seed + number) for number in range(threads)]
        for pair in pairs:
            stack.enter_context(pair.running())
        for pair in pairs:
            pair.thread.join()
    for pair in pairs:
        if pair.error is not None:
            pair.error.add_note(f"seed of the soak: {seed}")
            raise pair.error
    return SoakReport(seed=seed, wakes=each * threads, seconds=time.monotonic() - start)


class _Pair:
    """One waiter at home, and the thread that wakes it."""

    def __init__(
        self, context: AioContext, make: Callable[[], tuple[Wait, Wake]], wakes: int, limit_s: float, exact: bool,
        seed: int,
    ) -> None:
        self._context = context
        self._make = make
        self._wakes = wakes
        self._limit_s = limit_s
        self._exact = exact
        self._moves = random.Random(seed)
        self._made = threading.Event()
        self._wake: Wake | None = None              # set before _made
        self._arrived = threading.Semaphore(0)
        self._sent = 0                              # waking thread; counted before the wake
        self._returned = 0                          # home
        self._waiter: Coroutine[None] | None = None     # set before the thread starts
        self.error: BaseException | None = None     # the thread's
        self.thread = threading.Thread(target=self._main, name=f"waker of {context.name}", daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._waiter = waiter = self._context.spawn(self._wait(), name="soaked")
        waiter.when_done(self._ended)
        self.thread.start()
        try:
            yield
        finally:
            waiter.cancel()
            with contextlib.suppress(BaseException):
                waiter.result(self._limit_s)

    async def _wait(self) -> None:
        wait, self._wake = self._make()
        self._made.set()
        pauses = random.Random(self._moves.random())
        while True:                                 # until running() ends it: so one return too many is seen
            await wait()
            self._returned += 1
            self._arrived.release()
            _spin(pauses)

    def _ended(self, _co: Coroutine[Any]) -> None:
        self._made.set()
        self._arrived.release()                     # else its error is seen only when the time is over

    def _main(self) -> None:
        try:
            self._made.wait()
            while self._sent < self._wakes:
                self._one()
            _NEVER.wait(4 * ASLEEP_S)               # a return too many comes behind the last that was due
            self._check_not_doubled()
        except BaseException as exc:
            self.error = exc

    def _one(self) -> None:
        waiter = self._waiter
        assert waiter is not None
        if waiter.done():
            waiter.outcome()                        # raises: it has no other end before ours
        assert self._wake is not None, f"{self._make!r} returned no wake"
        if self._moves.random() < ASLEEP_SHARE:
            _NEVER.wait(ASLEEP_S)
        else:
            _spin(self._moves)
        self._check_not_doubled()
        self._sent += 1
        self._wake()
        if not self._arrived.acquire(timeout=self._limit_s):
            raise AssertionError(f"wake {self._sent} was lost: not arrived {self._limit_s:g} s later\n{snapshot()}")
        if waiter.done():
            waiter.outcome()

    def _check_not_doubled(self) -> None:
        if self._exact and self._returned > self._sent:
            raise AssertionError(f"wait() returned {self._returned} times for {self._sent} wakes")


def _spin(moves: random.Random) -> None:
    for _ in range(moves.randrange(SPIN_MAX)):
        pass
