"""Ownership is checked always (rule 17): who is not at home is refused, and told what to call instead."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import WrongThread
from tests.core.bounded import LIMIT_S, Plain, holding, in_plain_thread, wait
from tests.core.places import PLACES, Slow, World, at, in_callback, returned

# Whose home is each place? "own" is the IOThread; the main context's home is whoever holds the big lock.
HOME_OF = {place: "own" if place.startswith("io") else "main" for place in PLACES} | {"plain": ""}
MAIN_AND_OWN = ["main", "own"]
WRONG = [(place, target) for place in PLACES for target in MAIN_AND_OWN if target != HOME_OF[place]
         and (place, target) != ("io with lock", "main")]       # it has the lock: see the test of its name
RIGHT = [(place, target) for place in PLACES for target in MAIN_AND_OWN if target == HOME_OF[place]]


@pytest.fixture(params=[None, True], ids=["", "debug"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with (homeloop.Runtime(debug=request.param) as rt, homeloop.IOThread("io-own") as own,
          homeloop.IOThread("io-other") as other):
        yield World(rt=rt, own=own, other=other)


def context_of(world: World, target: str) -> homeloop.AioContext:
    return world.rt.main if target == "main" else world.own.context


class Touched:
    """Things of one loop that a wrong thread may try to change, and what came of it."""

    def __init__(self, context: homeloop.AioContext) -> None:
        self.context = context
        self.loop = context.loop
        self.ran: list[str] = []
        self.waited = threading.Event()
        self.read_end, self.write_end = os.pipe()
        self.coro = self.body()
        self.future: Any = None
        self.waiter = context.spawn(self.wait_for_future())
        wait(self.waited, context)

    def close(self) -> None:
        self.coro.close()
        os.close(self.read_end)
        os.close(self.write_end)

    async def body(self) -> str:
        self.ran.append("coroutine")
        return "ended"

    async def wait_for_future(self) -> Any:
        self.future = self.loop.create_future()
        self.loop.call_soon(self.waited.set)
        return await self.future

    def call(self, name: str) -> Any:
        """Make the call of that name."""
        loop, fn = self.loop, self.ran.append
        actions: dict[str, Callable[[], Any]] = {
            "loop.call_soon": lambda: loop.call_soon(fn, "call_soon"),
            "loop.call_later": lambda: loop.call_later(0, fn, "call_later"),
            "loop.call_at": lambda: loop.call_at(loop.time(), fn, "call_at"),
            "loop.create_task": lambda: loop.create_task(self.coro),
            "loop.add_reader": lambda: loop.add_reader(self.read_end, lambda: None),
            "loop.add_writer": lambda: loop.add_writer(self.write_end, lambda: None),
            "loop.remove_reader": lambda: loop.remove_reader(self.read_end),
            "loop.remove_writer": lambda: loop.remove_writer(self.write_end),
            "Future.set_result": lambda: self.future.set_result("settled"),
            "Future.set_exception": lambda: self.future.set_exception(OSError("settled")),
            "Future.cancel": lambda: self.future.cancel(),
            "context.worker": lambda: self.context.worker(fn, "worker"),
        }
        return actions[name]()


CALLS = ["loop.call_soon", "loop.call_later", "loop.call_at", "loop.create_task", "loop.add_reader", "loop.add_writer",
         "loop.remove_reader", "loop.remove_writer", "Future.set_result", "Future.set_exception", "Future.cancel",
         "context.worker"]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("place", "target"), WRONG, ids=lambda word: word)
def test_rule17_refused_from_the_wrong_thread(world: World, place: str, target: str, name: str) -> None:
    """WrongThread says what was called, where it belongs and what to call instead; nothing has changed."""
    context = context_of(world, target)
    touched = Touched(context)
    try:
        with pytest.raises(WrongThread) as caught:
            at(world, place, lambda: touched.call(name))
        text = str(caught.value)
        assert context.name in text
        assert any(instead in text for instead in ("post()", "spawn()", "to_worker()"))
        if name == "loop.create_task":
            assert inspect.getcoroutinestate(touched.coro) == inspect.CORO_CLOSED
        # Whoever waits goes on waiting, and is woken by the right thread.
        assert not touched.future.done()
        assert not touched.waiter.done()
        context.post(lambda: touched.future.set_result("from home"))
        assert touched.waiter.result(LIMIT_S) == "from home"
        in_callback(context, lambda: None)
        assert touched.ran == []
        assert in_callback(context, lambda: (context.loop.remove_reader(touched.read_end),
                                             context.loop.remove_writer(touched.write_end))) == (False, False)
    finally:
        touched.close()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("place", "target"), RIGHT, ids=lambda word: word)
def test_rule17_allowed_at_home(world: World, place: str, target: str, name: str) -> None:
    """The home thread may, in a callback or a coroutine; and for main whoever holds the big lock."""
    context = context_of(world, target)
    touched = Touched(context)
    try:
        at(world, place, lambda: touched.call(name))
        if not name.startswith("Future."):
            context.post(lambda: touched.future.set_result("from home"))
        ends = {"Future.set_exception": OSError, "Future.cancel": asyncio.CancelledError}
        if name in ends:
            with pytest.raises(ends[name]):
                touched.waiter.result(LIMIT_S)
        else:
            assert touched.waiter.result(LIMIT_S) == ("settled" if name == "Future.set_result" else "from home")
        context.spawn(asyncio.sleep(0.001)).result(LIMIT_S)     # tidy: allow sleep: behind the timer of 0 s
        ran = {"loop.create_task": "coroutine", "loop.call_soon": "call_soon", "loop.call_later": "call_later",
               "loop.call_at": "call_at"}
        assert touched.ran == [ran[name]] if name in ran else touched.ran in ([], ["worker"])
    finally:
        in_callback(context, lambda: (context.loop.remove_reader(touched.read_end),
                                      context.loop.remove_writer(touched.write_end)))
        touched.close()


def test_rule17_an_iothread_that_holds_the_big_lock(world: World) -> None:
    """It may touch its own loop, and main's: nothing else of main runs while it has the lock."""
    touched = Touched(world.rt.main)
    try:
        at(world, "io with lock", lambda: touched.call("Future.set_result"))
        assert touched.waiter.result(LIMIT_S) == "settled"
    finally:
        touched.close()


def test_rule17_refused_once_the_lock_is_let_go(world: World) -> None:
    """Inside released() and after release() a former holder is a stranger again."""
    touched = Touched(world.rt.main)

    def holder() -> str:
        with world.rt.big_lock:
            with world.rt.big_lock.released():
                with pytest.raises(WrongThread):
                    touched.call("loop.call_soon")
        with pytest.raises(WrongThread):
            touched.call("Future.set_result")
        with world.rt.big_lock:
            touched.call("Future.set_result")
        return "told"

    try:
        assert in_plain_thread(holder) == "told"
        assert touched.waiter.result(LIMIT_S) == "settled"
        assert touched.ran == []
    finally:
        touched.close()


def test_rule17_while_somebody_else_holds_the_lock(world: World) -> None:
    """A thread without the lock is refused, whoever has it."""
    touched = Touched(world.rt.main)
    try:
        with holding(world.rt.big_lock):
            with pytest.raises(WrongThread):
                touched.call("loop.call_soon")
        world.rt.main.post(lambda: touched.future.set_result(1))
        assert touched.waiter.result(LIMIT_S) == 1
    finally:
        touched.close()


@pytest.mark.parametrize("kind", ["Event", "Queue", "Semaphore"])
def test_rule17_asyncio_primitives_are_covered(world: World, kind: str) -> None:
    """asyncio's own objects wake their waiters through futures: from a wrong thread they say so, not nothing."""
    made: dict[str, Any] = {}
    waits = threading.Event()

    async def body() -> None:
        world.own.context.loop.call_soon(waits.set)
        if kind == "Event":
            made["wake"] = asyncio.Event()
            await made["wake"].wait()
        elif kind == "Queue":
            made["wake"] = asyncio.Queue()
            await made["wake"].get()
        else:
            made["wake"] = asyncio.Semaphore(0)
            await made["wake"].acquire()

    co = world.own.spawn(body())
    wait(waits, world.own.context)
    wake = {"Event": lambda: made["wake"].set(), "Queue": lambda: made["wake"].put_nowait(1),
            "Semaphore": lambda: made["wake"].release()}[kind]
    with pytest.raises(WrongThread):
        wake()
    assert not co.done()


# What any thread may do


@pytest.mark.parametrize("target", MAIN_AND_OWN)
@pytest.mark.parametrize("place", list(PLACES))
def test_rule17_for_any_thread(world: World, place: str, target: str) -> None:
    """post, spawn, wake, schedule, cancel, bottom halves, done callbacks and call_soon_threadsafe."""
    context = context_of(world, target)
    ran: list[Any] = []
    parked = Touched(context)
    it = Slow()
    slow = context.spawn(it.run())
    wait(it.waiting, context)

    async def parks() -> str:
        await homeloop.park()
        ran.append("woken")
        return "ended"

    async def parks_more() -> None:
        await homeloop.park()
        ran.append("scheduled")

    co, more = context.spawn(parks()), context.spawn(parks_more())

    def everything() -> None:
        context.post(ran.append, "post")
        context.loop.call_soon_threadsafe(ran.append, "threadsafe")
        context.bottom_half(lambda: ran.append("bottom half")).schedule()
        co.add_done_callback(lambda co: ran.append("done callback"))
        assert co.wake()
        assert more.schedule()
        assert slow.cancel()
        context.spawn(parked.body(), name="spawned")
        assert (co.done(), slow.done()) in ((False, False), (True, False), (False, True), (True, True))

    try:
        at(world, place, everything)
        assert co.result(LIMIT_S) == "ended"
        more.result(LIMIT_S)
        with pytest.raises(asyncio.CancelledError):
            slow.result(LIMIT_S)
        in_callback(context, lambda: None)
        assert sorted(ran) == ["bottom half", "done callback", "post", "scheduled", "threadsafe", "woken"]
        context.post(lambda: parked.future.set_result(None))
        parked.waiter.result(LIMIT_S)
        assert parked.ran == ["coroutine"]
    finally:
        parked.close()


def test_rule17_a_loop_that_nobody_serves() -> None:
    """As with asyncio: what is made before the loop runs may be made by any one thread."""
    loop = homeloop.new_event_loop()
    ran: list[int] = []
    try:
        in_plain_thread(loop.call_soon, ran.append, 1)
        task = loop.create_task(returned(lambda: ran.append(2)))
        future = loop.create_future()
        future.set_result(None)
        loop.run_until_complete(task)
        assert ran == [1, 2]
    finally:
        loop.close()


def test_rule17_checks_end_with_the_service() -> None:
    """Between two runs of a loop nobody is its home; the next thread that runs it is."""
    loop = homeloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.sleep(0))
        assert in_plain_thread(loop.run_until_complete, returned(threading.get_ident)) != threading.get_ident()
        running = threading.Event()
        stop = threading.Event()

        def runs() -> None:
            loop.call_soon(running.set)
            loop.run_until_complete(until_set(stop, loop))

        thread = Plain(runs)
        wait(running)
        with pytest.raises(WrongThread):
            loop.call_soon(lambda: None)
        stop.set()
        loop.call_soon_threadsafe(lambda: None)
        thread.result()
        loop.call_soon(lambda: None)
    finally:
        loop.close()


async def until_set(event: threading.Event, loop: asyncio.AbstractEventLoop) -> None:
    await loop.run_in_executor(None, wait, event)
    await loop.shutdown_default_executor()
