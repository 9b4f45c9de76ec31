"""Who uses a primitive: coroutines of any loop, and threads. A script is written once and runs in any of them.

A script is a generator that yields calls; the party makes each call, awaits what it returned if that can be
awaited, and sends the result back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import homeloop
from tests.core.bounded import LIMIT_S

Script = Generator[Callable[[], Any], Any, Any]
Start = Callable[[Script], Any]         # returns something with result(timeout)


async def perform(script: Script) -> Any:
    """Run a script in a coroutine."""
    turn: Callable[[], Any] = lambda: next(script)      # noqa: E731 - replaced below
    while True:
        try:
            call = turn()
        except StopIteration as stop:
            return stop.value
        try:
            value = call()
            if inspect.isawaitable(value):
                value = await value
        except BaseException as error:
            turn = lambda error=error: script.throw(error)      # noqa: E731
        else:
            turn = lambda value=value: script.send(value)       # noqa: E731


def perform_here(script: Script) -> Any:
    """Run a script in a thread: the same, and nothing may be awaitable."""
    co = perform(_unawaitable(script))
    try:
        co.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the synchronous form returned something to await")


def _unawaitable(script: Script) -> Script:
    def checked(call: Callable[[], Any]) -> Any:
        value = call()
        assert not inspect.isawaitable(value), f"{value!r} in a thread"
        return value

    turn: Callable[[], Any] = lambda: next(script)      # noqa: E731
    while True:
        try:
            call = turn()
        except StopIteration as stop:
            return stop.value
        try:
            value = yield lambda call=call: checked(call)
        except BaseException as error:
            turn = lambda error=error: script.throw(error)      # noqa: E731
        else:
            turn = lambda value=value: script.send(value)       # noqa: E731


@contextlib.contextmanager
def iothread() -> Iterator[Start]:
    with homeloop.IOThread() as io:
        yield lambda script: io.spawn(perform(script))


@contextlib.contextmanager
def main_context() -> Iterator[Start]:
    with homeloop.Runtime() as rt:
        yield lambda script: rt.main.spawn(perform(script))


class ForeignTask:
    """A task on a loop of another make. Unlike the future of run_coroutine_threadsafe it is done when the task is: a
    cancelled one may still have something to hand back."""

    def __init__(self, loop: asyncio.AbstractEventLoop, script: Script) -> None:
        self._loop = loop
        self._ended: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._task: asyncio.Task[Any] | None = None         # the loop's
        loop.call_soon_threadsafe(self._begin, script)

    def _begin(self, script: Script) -> None:
        self._task = self._loop.create_task(perform(script))
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self._ended.set_result(task.result())
        else:
            self._ended.set_exception(error)

    def _cancel(self) -> None:
        assert self._task is not None, "begun before"
        self._task.cancel()

    def cancel(self) -> bool:
        if self.done():
            return False
        self._loop.call_soon_threadsafe(self._cancel)
        return True

    def running(self) -> bool:
        return not self.done()

    def done(self) -> bool:
        return self._ended.done()

    def result(self, timeout: float | None = None) -> Any:
        return self._ended.result(timeout)


@contextlib.contextmanager
def foreign(make: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[Start]:
    """A loop of another make in a thread of its own, without any runtime."""
    loop = make()
    thread = threading.Thread(target=loop.run_forever, name="foreign loop")
    thread.start()
    try:
        yield lambda script: ForeignTask(loop, script)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LIMIT_S)
        loop.close()


@contextlib.contextmanager
def threads() -> Iterator[Start]:
    """Every script gets a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        yield lambda script: pool.submit(perform_here, script)


def stock() -> contextlib.AbstractContextManager[Start]:
    return foreign(asyncio.SelectorEventLoop)


def uvloop() -> contextlib.AbstractContextManager[Start]:
    return foreign(importlib.import_module("uvloop").new_event_loop)


Kind = Callable[[], contextlib.AbstractContextManager[Start]]
CASES: dict[str, tuple[Kind, ...]] = {
    "one of ours": (iothread,),
    "one stock loop": (stock,),
    "two of ours": (iothread, iothread),
    "main and IOThread": (main_context, iothread),
    "ours and stock": (iothread, stock),
    "two stock loops": (stock, stock),
    "loop and threads": (iothread, threads),
    "stock and threads": (stock, threads),
    "threads": (threads,),
    "everybody": (main_context, iothread, iothread, stock, threads),
}
ONE_OF_EACH = {"one of each": (main_context, iothread, stock, threads)}
try:
    importlib.import_module("uvloop")
except ImportError:
    pass
else:
    CASES["ours and uvloop"] = (iothread, uvloop)


class Parties:
    """Starts scripts, each in the next of the places."""

    def __init__(self, starts: list[Start]) -> None:
        self._starts = starts
        self._next = 0
        self.handles: list[Any] = []

    def start(self, script: Script) -> Any:
        handle = self._starts[self._next % len(self._starts)](script)
        self._next += 1
        self.handles.append(handle)
        return handle

    def results(self) -> list[Any]:
        return [handle.result(LIMIT_S) for handle in self.handles]


@contextlib.contextmanager
def parties(case: str) -> Iterator[Parties]:
    with contextlib.ExitStack() as stack:
        yield Parties([stack.enter_context(kind()) for kind in (CASES | ONE_OF_EACH)[case]])
