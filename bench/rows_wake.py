"""Wakes: threads post callbacks into a context; the time ends when the last one has run.

An idle context has nothing else to do: it sleeps, is woken, drains, sleeps. A busy one never sleeps: a callback
of its own, with about five microseconds of work, queues itself again. Producers are plain threads, started and
lined up before the clock starts. Against call_soon_threadsafe(), which does the same for asyncio and uvloop.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from bench.measure import MICROSECONDS, Contender, Opening, Round, Row
from bench.peers import LoopFactory, asyncio_loop, loop_thread, need_homeloop, uvloop_loop

ARRIVE_WITHIN_S = 60.0
Post = Callable[[Callable[[], None]], object]


class Arrivals:
    """The posted callback: counts down at home, and tells when all have come."""

    def __init__(self, count: int) -> None:
        self._left = count                  # home thread
        self.complete = threading.Event()

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.complete.set()


class Ticker:
    """Keeps a loop busy: a callback that works for about five microseconds and queues itself again."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._on = True                     # set by the bench's thread, read at home
        self.started = threading.Event()
        self.stopped = threading.Event()

    def __call__(self) -> None:
        self.started.set()
        sum(range(500))
        if self._on:
            self._call_soon(self)
        else:
            self.stopped.set()

    def stop(self) -> None:
        self._on = False
        self.stopped.wait(ARRIVE_WITHIN_S)


@dataclass(frozen=True, slots=True)
class Target:
    """A context to post into, of any make."""

    post: Post
    call_soon: Callable[[Callable[[], None]], object]       # at home only

    def round(self, count: int, threads: int, busy: bool) -> float:
        count = max(count, threads)
        if not busy:
            return self._post_all(count, threads)
        ticker = Ticker(self.call_soon)
        self.post(ticker)
        ticker.started.wait(ARRIVE_WITHIN_S)
        try:
            return self._post_all(count, threads)
        finally:
            ticker.stop()

    def _post_all(self, count: int, threads: int) -> float:
        shares = [count // threads + (number < count % threads) for number in range(threads)]
        arrivals = Arrivals(count)
        line = threading.Barrier(threads + 1)

        def produce(share: int) -> None:
            post = self.post
            line.wait()
            for _ in range(share):
                post(arrivals)

        producers = [threading.Thread(target=produce, args=(share,)) for share in shares]
        for producer in producers:
            producer.start()
        line.wait()
        start = time.perf_counter()
        if not arrivals.complete.wait(ARRIVE_WITHIN_S):
            raise RuntimeError(f"{count} wakes were posted, not all have run after {ARRIVE_WITHIN_S:.0f} s")
        seconds = time.perf_counter() - start
        for producer in producers:
            producer.join()
        return seconds


@contextlib.contextmanager
def into_loop(factory: LoopFactory, threads: int, busy: bool) -> Iterator[Round]:
    with loop_thread(factory) as loop:
        target = Target(loop.call_soon_threadsafe, loop.call_soon)
        yield lambda count: target.round(count, threads, busy)


@contextlib.contextmanager
def into_iothread(threads: int, busy: bool) -> Iterator[Round]:
    with need_homeloop().IOThread("bench") as io:
        target = Target(io.context.post, io.context.loop.call_soon)
        yield lambda count: target.round(count, threads, busy)


@contextlib.contextmanager
def into_main(threads: int, busy: bool) -> Iterator[Round]:
    with need_homeloop().Runtime(name="bench") as rt:
        target = Target(rt.main.post, rt.main.loop.call_soon)
        yield lambda count: target.round(count, threads, busy)


def wake_row(threads: int, busy: bool) -> Row:
    state = "a busy" if busy else "an idle"
    plural = "thread" if threads == 1 else "threads"

    def opening(into: Callable[..., AbstractContextManager[Round]], *first: object) -> Opening:
        return functools.partial(into, *first, threads=threads, busy=busy)

    return Row(
        name=f"wakes into {state} context from {threads} {plural}",
        unit=MICROSECONDS,
        contenders=[
            Contender(name="homeloop", open=opening(into_iothread), ours=True),
            Contender(name="homeloop main", open=opening(into_main), ours=True),
            Contender(name="asyncio", open=opening(into_loop, asyncio_loop)),
            Contender(name="uvloop", open=opening(into_loop, uvloop_loop)),
        ],
        targets={"asyncio": 4.0, "uvloop": 1.0},
    )


def rows() -> list[Row]:
    return [wake_row(threads, busy) for busy in (False, True) for threads in (1, 4)]
