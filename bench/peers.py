"""The libraries we measure: each may be missing, and then says so by name. Loop threads and round threads."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bench.measure import Missing, Round


def optional(name: str) -> Any:
    """The module, or None: the benchmark runs without any of its peers."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


homeloop = optional("homeloop")
uvloop = optional("uvloop")
anyio = optional("anyio.from_thread") and optional("anyio")
asgiref = optional("asgiref.sync") and optional("asgiref")
aiologic = optional("aiologic")
culsans = optional("culsans")
janus = optional("janus")

ROUND_S_MAX = 120.0


def need_homeloop() -> Any:
    if not hasattr(homeloop, "Runtime"):
        raise Missing("homeloop cannot be imported")
    return homeloop


def need_uvloop() -> Any:
    if uvloop is None:
        raise Missing("uvloop is not installed")
    return uvloop


def need_anyio() -> Any:
    if anyio is None:
        raise Missing("anyio is not installed")
    return anyio


def need_asgiref() -> Any:
    if asgiref is None:
        raise Missing("asgiref is not installed")
    return asgiref


def need_aiologic() -> Any:
    if aiologic is None:
        raise Missing("aiologic is not installed")
    return aiologic


def need_culsans() -> Any:
    if culsans is None:
        raise Missing("culsans is not installed")
    return culsans


def need_janus() -> Any:
    if janus is None:
        raise Missing("janus is not installed")
    return janus


LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def asyncio_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop()


def uvloop_loop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = need_uvloop().new_event_loop()
    return loop


def homeloop_loop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = need_homeloop().new_event_loop()
    return loop


@contextlib.contextmanager
def loop_thread(factory: LoopFactory) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs on a background thread: what programs without homeloop build for themselves."""
    loop = factory()
    thread = threading.Thread(target=loop.run_forever, name="bench-loop")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Rounds:
    """Hands the rounds of one contender to a thread of its own: iterate for the counts, answer() each."""

    def __init__(self) -> None:
        self._counts: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[int]:
        return iter(self._counts.get, None)

    def answer(self, seconds: float | BaseException) -> None:
        self._answers.put(seconds)

    def run(self, count: int) -> float:
        self._counts.put(count)
        answer = self._answers.get(timeout=ROUND_S_MAX)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        self._counts.put(None)


@contextlib.contextmanager
def round_thread(body: Callable[[Rounds], None]) -> Iterator[Round]:
    """Run `body(rounds)` on a thread of its own. What it raises, the round under way (or the next) raises."""
    rounds = Rounds()

    def run_body() -> None:
        try:
            body(rounds)
        except BaseException as error:
            rounds.answer(error)

    thread = threading.Thread(target=run_body, name="bench-rounds")
    thread.start()
    try:
        yield rounds.run
    finally:
        rounds.end()
        thread.join(ROUND_S_MAX)
