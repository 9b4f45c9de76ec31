"""Every synchronous wait in a thread that serves a loop is refused at once: free or not, and both sides are named."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import WouldBlockLoop
from homeloop.sync import Barrier, Channel, Condition, Event, Mutex, OneShot, RwLock, Semaphore, SharedResource
from tests.core.bounded import LIMIT_S, Plain, until, wait
from tests.sync.task_groups import PARENTS, Run


def enter(manager: Any) -> Callable[[], object]:
    def enters() -> None:
        with manager:
            raise AssertionError("got it")

    return enters


def condition() -> Any:
    made = Condition(name="thing")
    return made, [enter(made), lambda: made.acquire(timeout=1), lambda: made.wait(timeout=1),
                  lambda: made.wait_for(lambda: True, timeout=1)]


def mutex() -> Any:
    made = Mutex("thing")
    return made, [enter(made), lambda: made.acquire(timeout=1)]


def rwlock() -> Any:
    made = RwLock("thing")
    return made, [enter(made.read), enter(made.write), lambda: made.read.acquire(timeout=1),
                  lambda: made.write.acquire(timeout=1)]


def semaphore() -> Any:
    made = Semaphore(name="thing")
    return made, [enter(made), lambda: made.acquire(timeout=1)]


def resource() -> Any:
    made = SharedResource(2, name="thing")
    return made, [enter(made.take(2)), lambda: made.acquire(1, timeout=1)]


def event() -> Any:
    made = Event("thing")
    return made, [lambda: made.wait(timeout=1)]


def barrier() -> Any:
    made = Barrier(1, name="thing")
    return made, [lambda: made.wait(timeout=1)]


def channel() -> Any:
    made: Channel[int] = Channel(1, name="thing")
    return made, [lambda: made.send(1, timeout=1), lambda: made.receive(timeout=1), lambda: list(made)]


def one_shot() -> Any:
    made: OneShot[int] = OneShot("thing")
    return made, [made.result, lambda: made.result(timeout=1)]


MAKES = [condition, mutex, rwlock, semaphore, resource, event, barrier, channel, one_shot]


@pytest.fixture(params=[name for name in PARENTS if name != "call() of a runtime"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    return PARENTS[request.param]


def in_callback(fn: Callable[[], object]) -> asyncio.Future[BaseException | None]:
    """What fn() raises in a callback of the running loop, outside any task."""
    loop = asyncio.get_running_loop()
    raised: asyncio.Future[BaseException | None] = loop.create_future()

    def call() -> None:
        try:
            fn()
        except BaseException as error:
            raised.set_result(error)
        else:
            raised.set_result(None)

    loop.call_soon(call)
    return raised


@pytest.mark.parametrize("make", MAKES)
def test_refused_in_a_coroutine_and_in_a_callback(make: Any, run: Run) -> None:
    thing, waits = make()

    async def main() -> None:
        me: Any = asyncio.current_task()
        for blocks in waits:
            with pytest.raises(WouldBlockLoop) as info:
                blocks()
            assert "'thing'" in str(info.value)
            assert me.get_name() in str(info.value)             # the caller
            assert "serves" in str(info.value)                  # and why
            assert isinstance(await in_callback(blocks), WouldBlockLoop)
        assert thing.waiters() == ()

    run(main())


@pytest.mark.parametrize(("make", "hold"), [
    (mutex, lambda made: made.acquire()),
    (rwlock, lambda made: made.write.acquire()),
    (condition, lambda made: made.acquire()),
], ids=["Mutex", "RwLock", "Condition"])
def test_names_the_holder(make: Any, hold: Any, run: Run) -> None:
    thing, waits = make()
    held, done = threading.Event(), threading.Event()

    def holds() -> None:
        hold(thing)
        held.set()
        done.wait(LIMIT_S)              # as long as it lives its number is nobody else's

    holder = Plain(holds)
    wait(held)

    async def main() -> None:
        for blocks in waits:
            with pytest.raises(WouldBlockLoop, match=r"(held|written) by thread 'plain holds'"):
                blocks()

    try:
        run(main())
    finally:
        done.set()
        holder.result()


@pytest.mark.parametrize("make", MAKES)
def test_an_iothread_that_holds_no_big_lock_is_refused_while_others_wait(make: Any) -> None:
    """Another thread waits there already, or has it: who asks on a loop is refused all the same, and left out."""
    thing, waits = make()
    with homeloop.IOThread("disk") as io:
        async def main() -> None:
            with pytest.raises(WouldBlockLoop, match="serves context 'disk'"):
                waits[0]()

        io.call(main())
    until(lambda: thing.waiters() == (), thing)
