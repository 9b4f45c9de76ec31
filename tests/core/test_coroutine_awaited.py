"""A Coroutine as asyncio sees it: awaited, grouped, timed out, asked for; its errors, and what it may not yield."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import types
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import WrongState
from tests.core.bounded import LIMIT_S, in_plain_thread, returned, until, wait

PARKED = homeloop.CoroutineState.PARKED


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    with homeloop.Runtime() as runtime:
        yield runtime


@pytest.fixture(params=["main", "iothread"])
def context(request: pytest.FixtureRequest, rt: homeloop.Runtime) -> Iterator[homeloop.AioContext]:
    if request.param == "main":
        yield rt.main
    else:
        with homeloop.IOThread() as io:
            yield io.context


@pytest.fixture(params=["same context", "another context", "asyncio's own loop"])
def run_elsewhere(
    request: pytest.FixtureRequest, context: homeloop.AioContext, rt: homeloop.Runtime
) -> Iterator[Callable[[Any], Any]]:
    """Where the waiter is: runs a coroutine object there, in an asyncio task, and returns its result."""
    async def in_a_task(coro: Any) -> Any:
        return await asyncio.ensure_future(coro)

    if request.param == "same context":
        yield lambda coro: context.spawn(in_a_task(coro)).result(LIMIT_S)
    elif request.param == "asyncio's own loop":
        yield lambda coro: in_plain_thread(asyncio.run, coro)
    else:
        with homeloop.IOThread() as other:
            yield lambda coro: other.spawn(in_a_task(coro)).result(LIMIT_S)


async def parks(result: str = "woken") -> str:
    await homeloop.park()
    return result


async def raises() -> None:
    raise ZeroDivisionError("its own")


def parked(*cos: homeloop.Coroutine[Any]) -> None:
    for co in cos:
        until(lambda co=co: co.state is PARKED, co)


class Stubborn:
    """A coroutine that parks, and takes its time to end when it is cancelled."""

    def __init__(self) -> None:
        self.cleaned_up = False

    async def run(self) -> None:
        try:
            await homeloop.park()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self.cleaned_up = True


# Awaited from anywhere


def test_await_returns_its_result_and_raises_its_exception(
    context: homeloop.AioContext, run_elsewhere: Callable[[Any], Any]
) -> None:
    """Before and after it has ended, more than once, and by several waiters at once."""
    async def waits(co: Any) -> Any:
        return await co

    async def waits_twice(co: Any) -> list[Any]:
        results = await asyncio.gather(co, waits(co))
        return [*results, await co]

    co = context.spawn(parks())
    parked(co)

    async def wakes() -> list[Any]:
        waiting = asyncio.ensure_future(waits_twice(co))
        await asyncio.sleep(0)
        co.wake()
        return await waiting

    assert run_elsewhere(wakes()) == ["woken"] * 3
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="its own"):
            run_elsewhere(waits(context.spawn(raises())))


def test_await_in_gather_with_a_failure(context: homeloop.AioContext, run_elsewhere: Callable[[Any], Any]) -> None:
    """gather() takes Coroutines like any awaitable; return_exceptions keeps the places."""
    async def gathers() -> list[Any]:
        cos = [context.spawn(returned(lambda: 1)), context.spawn(raises()), context.spawn(returned(lambda: 3))]
        return await asyncio.gather(*cos, return_exceptions=True)

    first, second, third = run_elsewhere(gathers())
    assert (first, third) == (1, 3)
    assert isinstance(second, ZeroDivisionError)


def test_await_in_a_task_group(context: homeloop.AioContext, run_elsewhere: Callable[[Any], Any]) -> None:
    """A sibling fails: the Coroutine that the group's task awaits is cancelled, and waited for."""
    stubborn = Stubborn()

    async def waits(co: Any) -> None:
        await co

    co = context.spawn(stubborn.run())
    parked(co)

    async def group() -> list[type]:
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(waits(co))
                await asyncio.sleep(0)
                tasks.create_task(raises())
        assert co.cancelled()
        return [type(exc) for exc in caught.value.exceptions]

    assert run_elsewhere(group()) == [ZeroDivisionError]
    assert stubborn.cleaned_up


@pytest.mark.parametrize("how", ["timeout", "wait_for"])
def test_await_under_a_timeout(
    context: homeloop.AioContext, run_elsewhere: Callable[[Any], Any], how: str
) -> None:
    """TimeoutError, once the Coroutine has been cancelled and has ended; the waiter's own count is as before."""
    stubborn = Stubborn()

    co = context.spawn(stubborn.run())
    parked(co)

    async def waits() -> int:
        with pytest.raises(TimeoutError):
            if how == "timeout":
                async with asyncio.timeout(0.001):
                    await co
            else:
                await asyncio.wait_for(co, 0.001)
        assert co.cancelled()
        assert stubborn.cleaned_up
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert run_elsewhere(waits()) == 0


def test_cancel_of_the_waiter_cancels_and_waits(
    context: homeloop.AioContext, run_elsewhere: Callable[[Any], Any]
) -> None:
    """Cancelling a task that awaits a Coroutine cancels that; shield() keeps it alive, as with a task."""
    stubborn = Stubborn()

    async def waits(co: Any) -> None:
        await co

    co, kept = context.spawn(stubborn.run()), context.spawn(parks())
    parked(co, kept)

    async def cancels() -> list[bool]:
        seen = []
        for awaitable in (co, asyncio.shield(kept)):
            task = asyncio.ensure_future(waits(awaitable))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            seen.append(stubborn.cleaned_up)
        seen += [co.cancelled(), kept.done()]
        kept.wake()
        assert await kept == "woken"
        return seen

    assert run_elsewhere(cancels()) == [True, True, True, False]


# In place of a task


def test_it_is_the_current_task_while_it_runs(context: homeloop.AioContext) -> None:
    """current_task(), all_tasks(), timeout() and TaskGroup inside it: asyncio takes it for a task."""
    async def inside() -> list[Any]:
        me = homeloop.current_coroutine()
        seen: list[Any] = [asyncio.current_task() is me]
        await asyncio.sleep(0)
        seen.append(asyncio.current_task() is me)
        seen.append(me in asyncio.all_tasks())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await homeloop.park()
        seen.append(me.cancelling() if me else None)
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(raises())
                await homeloop.park()
        seen += [len(caught.value.exceptions), me.cancelling() if me else None, asyncio.current_task() is me]
        return seen

    assert context.spawn(inside()).result(LIMIT_S) == [True, True, True, 0, 1, 0, True]


def test_a_task_that_it_makes_is_a_task_of_its_own(context: homeloop.AioContext) -> None:
    """Within a plain task no Coroutine is current, and the task is; back in the Coroutine it is the other way round."""
    async def task() -> tuple[Any, Any]:
        return homeloop.current_coroutine(), asyncio.current_task()

    async def inside() -> bool:
        me = homeloop.current_coroutine()
        made = asyncio.create_task(task())
        assert await made == (None, made)
        return homeloop.current_coroutine() is me is asyncio.current_task()

    assert context.spawn(inside()).result(LIMIT_S) is True


def test_done_callbacks_run_at_home_with_it(context: homeloop.AioContext) -> None:
    """add_done_callback() calls from the home loop, also when it has ended already; removed ones do not run."""
    called: list[tuple[Any, int]] = []
    all_called = threading.Event()

    def callback(co: Any) -> None:
        called.append((co, threading.get_ident()))
        if len(called) == 2:
            all_called.set()

    def removed(co: Any) -> None:
        called.append((co, 0))

    home = context.spawn(returned(threading.get_ident)).result(LIMIT_S)
    co = context.spawn(parks())
    parked(co)
    co.add_done_callback(callback)
    co.add_done_callback(removed)
    assert co.remove_done_callback(removed) == 1
    co.wake()
    co.result(LIMIT_S)
    co.add_done_callback(callback)
    wait(all_called)
    assert called == [(co, home)] * 2


# Its result and its errors


def test_result_and_exception(context: homeloop.AioContext) -> None:
    """Not ended: exception() says so and result(timeout) gives up without harm; ended: as it ended, again and again."""
    co = context.spawn(parks())
    parked(co)
    assert not co.done()
    with pytest.raises(asyncio.InvalidStateError):
        co.exception()
    with pytest.raises(TimeoutError):
        co.result(0.001)
    assert co.state is PARKED
    co.wake()
    assert [co.result(LIMIT_S), co.result()] == ["woken", "woken"]
    assert co.exception() is None
    failed = context.spawn(raises())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            failed.result(LIMIT_S)
        assert any(entry.name == "raises" for entry in caught.traceback)
    assert isinstance(failed.exception(), ZeroDivisionError)
    assert not failed.cancelled()


@pytest.mark.parametrize("looked_at", [False, "result", "exception", "await"])
def test_an_exception_that_nobody_retrieves_is_reported_once(context: homeloop.AioContext, looked_at: Any) -> None:
    """When the coroutine is collected, through the loop's exception handler; not if somebody looked."""
    reports: list[dict[str, Any]] = []
    ended = threading.Event()

    def handler(loop: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
        reports.append(what)

    async def set_handler() -> None:
        asyncio.get_running_loop().set_exception_handler(handler)

    async def waits(awaited: Any) -> None:
        with pytest.raises(ZeroDivisionError):
            await awaited

    context.spawn(set_handler()).result(LIMIT_S)
    co: Any = context.spawn(raises())
    until(co.done, co)
    if looked_at == "result":
        with pytest.raises(ZeroDivisionError):
            co.result()
    elif looked_at == "exception":
        co.exception()
    elif looked_at == "await":
        context.spawn(waits(co)).result(LIMIT_S)
    del co
    gc.collect()
    context.post(ended.set)
    wait(ended)
    gc.collect()
    assert len(reports) == (0 if looked_at else 1)
    if reports:
        assert "never retrieved" in reports[0]["message"]
        assert isinstance(reports[0]["exception"], ZeroDivisionError)


# What it may not yield


@types.coroutine
def yielding(thing: Any) -> Generator[Any, Any, Any]:
    return (yield thing)


@pytest.mark.parametrize("what", ["an object", "a future, by yield", "a future of another loop"])
def test_bad_yields_are_raised_where_they_came_from(context: homeloop.AioContext, what: str) -> None:
    """RuntimeError in the coroutine, which may catch it and go on; the loop is none the worse."""
    other = asyncio.new_event_loop()

    async def bad() -> str:
        with pytest.raises(RuntimeError) as caught:
            if what == "an object":
                await yielding(object())
            elif what == "a future, by yield":
                await yielding(asyncio.get_running_loop().create_future())
            else:
                await other.create_future()
        await asyncio.sleep(0)
        return str(caught.value)

    try:
        text = context.spawn(bad()).result(LIMIT_S)
    finally:
        other.close()
    expected = {
        "an object": "bad yield",
        "a future, by yield": "yield was used instead of yield from",
        "a future of another loop": "different loop",
    }
    assert expected[what] in text
    assert context.spawn(parks_not()).result(LIMIT_S) is None


async def parks_not() -> None:
    await asyncio.sleep(0)


def test_await_on_itself_is_refused(context: homeloop.AioContext) -> None:
    """It could never end: RuntimeError, as in asyncio, and not a hang."""
    async def waits_for_itself() -> str:
        with pytest.raises(RuntimeError):
            await homeloop.current_coroutine()      # type: ignore[misc]
        return "went on"

    co = context.spawn(waits_for_itself())
    try:
        assert co.result(2) == "went on"
    finally:
        co.cancel()


def test_what_is_no_coroutine_object_is_refused(context: homeloop.AioContext) -> None:
    """TypeError: a function that was not called, a future, None."""
    for thing in (parks, None, 1):
        with pytest.raises(TypeError):
            context.spawn(thing)                    # type: ignore[arg-type]


# What it is to those who ask


def test_park_outside_a_coroutine_is_refused(context: homeloop.AioContext) -> None:
    """In a plain asyncio task of the context too: nobody could wake it."""
    async def main() -> None:
        task = asyncio.ensure_future(parks())
        with pytest.raises(WrongState):
            await task

    context.spawn(main()).result(LIMIT_S)


def test_park_says_why(context: homeloop.AioContext) -> None:
    """The reason stands in repr() while it is parked."""
    async def sleeper() -> None:
        await homeloop.park("for the winter")

    co = context.spawn(sleeper(), name="bear")
    parked(co)
    assert "for the winter" in repr(co)
    assert "bear" in repr(co)
    co.wake()
    co.result(LIMIT_S)
    assert "winter" not in repr(co)


def test_contextvars_are_those_of_who_made_it(context: homeloop.AioContext) -> None:
    """A coroutine runs in a copy of its maker's variables, whoever wakes it; what it sets stays its own."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def looks() -> None:
        seen.append(variable.get())
        variable.set("its own")
        await homeloop.park()
        seen.append(variable.get())

    variable.set("maker's")
    co = context.spawn(looks())
    parked(co)
    assert in_plain_thread(lambda: [variable.set("waker's"), co.wake()][1])
    co.result(LIMIT_S)
    assert seen == ["maker's", "its own"]
    assert variable.get() == "maker's"
