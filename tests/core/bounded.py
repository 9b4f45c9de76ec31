"""Waits that have a limit, and plain threads to wait for: a hang fails and says who holds and who waits.

Nothing here sleeps to give others time. until() looks again and again, for what no event announces (a thread that
has joined the queue of a lock, a loop that has gone to sleep); everything else waits for an event.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from homeloop.core.biglock import BigLock
from homeloop.core.context import AioContext
from homeloop.core.runtime import Runtime

LIMIT_S = 10.0
STRESS_S = float(os.environ.get("HOMELOOP_STRESS_S") or 1)      # about how long a stress test takes
_NEVER = threading.Event()


def snapshot(*about: object) -> str:
    """What the objects say of themselves, and where every thread stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [repr(thing) for thing in about]
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {ident} {names.get(ident)!r}:")
        lines += [line.rstrip() for line in traceback.format_stack(frame)[-6:]]
    return "\n".join(lines)


def wait(event: threading.Event | threading.Barrier, *about: object) -> None:
    """Wait for an event, or at a barrier; fail with a snapshot when the limit is over."""
    if isinstance(event, threading.Barrier):
        try:
            event.wait(LIMIT_S)
        except threading.BrokenBarrierError:
            raise AssertionError(f"not everybody came to the barrier in {LIMIT_S} s\n{snapshot(*about)}") from None
    elif not event.wait(LIMIT_S):
        raise AssertionError(f"the event was not set in {LIMIT_S} s\n{snapshot(*about)}")


def until(predicate: Callable[[], object], *about: object) -> None:
    """Look until predicate() is true; fail with a snapshot when the limit is over."""
    end = time.monotonic() + LIMIT_S
    while not predicate():
        if time.monotonic() > end:
            raise AssertionError(f"not true within {LIMIT_S} s\n{snapshot(*about)}")
        _NEVER.wait(0.0002)


def asleep(context: AioContext) -> None:
    """Return once the home of an idle context has come round and sleeps anew, with nothing queued."""
    seen = threading.Event()
    context.post(seen.set)
    wait(seen, context)
    until(context.inbox.sleeping, context)


class Plain:
    """A thread without a context that runs one function."""

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        self._fn = fn
        self._args = args
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name=f"plain {fn.__name__}", daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, *about: object) -> Any:
        """What the function returned or raised; fails with a snapshot when the limit is over."""
        self._thread.join(LIMIT_S)
        if self._thread.is_alive():
            raise AssertionError(f"{self._thread.name} did not end in {LIMIT_S} s\n{snapshot(*about)}")
        if self._error is not None:
            raise self._error
        return self._outcome

    def _main(self) -> None:
        try:
            self._outcome = self._fn(*self._args)
        except BaseException as exc:
            self._error = exc


def in_plain_thread(fn: Callable[..., Any], *args: Any) -> Any:
    """Run fn(*args) in a fresh thread without a context; its result."""
    return Plain(fn, *args).result()


@contextmanager
def holding(big_lock: BigLock) -> Iterator[Plain]:
    """A plain thread holds the big lock during the block."""
    taken, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        assert big_lock.acquire(LIMIT_S)
        taken.set()
        wait(let_go, big_lock)
        big_lock.release()

    holder = Plain(hold)
    wait(taken, big_lock)
    try:
        yield holder
    finally:
        let_go.set()
        holder.result(big_lock)


# Of the big lock


def waiting(lock: BigLock) -> int:
    """How many threads have their place in the queue: what forces an order here."""
    return lock.statistics()["waiting"]


def acquired(lock: BigLock) -> None:
    """Take it; a hang fails."""
    assert lock.acquire(LIMIT_S), snapshot(lock)


def usable(rt: Runtime) -> None:
    """Nobody holds it for ever, nobody is left in the queue, and the main loop turns."""
    def take_and_let_go() -> None:
        acquired(rt.big_lock)
        rt.big_lock.release()

    asleep(rt.main)
    in_plain_thread(take_and_let_go)
    until(lambda: waiting(rt.big_lock) == 0, rt.big_lock)


async def returned(fn: Callable[..., Any], *args: Any) -> Any:
    """A coroutine that calls fn(*args)."""
    return fn(*args)
