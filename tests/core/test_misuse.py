"""Coroutine objects in wrong hands: what is refused, who is undisturbed, and in debug mode both call sites."""

from __future__ import annotations

import asyncio
import collections.abc
import re
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

import homeloop
from homeloop import CoroutineState
from homeloop.core import misuse
from homeloop.errors import UsageError, WouldDeadlock, WrongState
from tests.core.bounded import LIMIT_S, until
from tests.core.places import in_callback, returned

SITE = re.compile(r"test_misuse\.py:(\d+)")


@pytest.fixture(params=["main", "iothread"])
def context(request: pytest.FixtureRequest) -> Iterator[homeloop.AioContext]:
    with homeloop.Runtime(debug=False) as rt:
        if request.param == "main":
            yield rt.main
        else:
            with homeloop.IOThread() as io:
                yield io.context


@pytest.fixture
def debug() -> Iterator[homeloop.Runtime]:
    """A runtime in debug mode."""
    with homeloop.Runtime(debug=True) as rt:
        yield rt


async def parks(result: str = "woken") -> str:
    await homeloop.park()
    return result


def parked(co: homeloop.Coroutine[Any]) -> None:
    until(lambda: co.state is CoroutineState.PARKED, co)


def line() -> int:
    """The caller's line."""
    return sys._getframe(1).f_lineno


def named(error: BaseException) -> list[int]:
    """The lines of this file that an error names."""
    return [int(number) for number in SITE.findall(str(error))]


# One object, two owners


def test_what_has_begun_is_refused_and_goes_on(context: homeloop.AioContext) -> None:
    """A parked one, and one that an asyncio task runs: WrongState where it is given; its owner sees nothing of it."""
    coro = parks()
    first = context.spawn(coro)
    parked(first)
    gives: list[Callable[[Any], object]] = [context.create, context.spawn, context.enter, context.schedule]
    for give in (*gives, context.call):
        with pytest.raises(WrongState, match=r"parks.* has begun already.* runs once$"):
            give(coro)
    assert first.wake()
    assert first.result(LIMIT_S) == "woken"

    async def main() -> str:
        answered = asyncio.get_running_loop().create_future()

        async def waits() -> str:
            return str(await answered)

        waiting = waits()
        task = asyncio.ensure_future(waiting)
        await asyncio.sleep(0)
        with pytest.raises(WrongState):
            await context.run(waiting)
        answered.set_result("answer")
        return await task

    assert context.spawn(main()).result(LIMIT_S) == "answer"


@pytest.mark.parametrize("how", ["park", "future", "bare yield"])
def test_the_second_start_of_one_object_is_refused(context: homeloop.AioContext, how: str) -> None:
    """Both were created, and both started, before it began: who comes second fails, and does not resume the first."""
    log: list[str] = []
    release: list[Callable[[], object]] = []

    async def once() -> str:
        log.append("began")
        if how == "park":
            me = homeloop.current_coroutine()
            assert me is not None
            release.append(me.wake)
            await homeloop.park()
        elif how == "future":
            future = asyncio.get_running_loop().create_future()
            release.append(lambda: future.set_result(None))
            await future
        else:
            await asyncio.sleep(0)
        log.append("went on")
        return "ended"

    coro = once()
    first, second = context.create(coro), context.create(coro)

    def start() -> None:
        first.schedule()
        second.schedule()

    in_callback(context, start)
    with pytest.raises(WrongState, match="another has begun its coroutine object"):
        second.result(LIMIT_S)
    if release:
        assert log == ["began"]
        in_callback(context, release[0])
    assert first.result(LIMIT_S) == "ended"
    assert log == ["began", "went on"]


def test_the_second_start_of_one_that_runs_or_has_ended(context: homeloop.AioContext) -> None:
    """Started in a nested poll of the first: Python's own errors, and the first goes on."""
    async def polls() -> str:
        second.schedule()
        while not second.done():
            context.poll(True)
        return "ended"

    coro = polls()
    first, second, third = (context.create(coro) for _ in range(3))
    first.schedule()
    assert first.result(LIMIT_S) == "ended"
    with pytest.raises(ValueError, match="already executing"):
        second.result(LIMIT_S)
    third.schedule()
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        third.result(LIMIT_S)


def test_the_end_of_the_second_does_not_close_what_the_first_runs(context: homeloop.AioContext) -> None:
    """Cancelled before or behind its start, or dropped: the coroutine object is the first one's."""
    coro = parks()
    first, *others = (context.create(coro) for _ in range(3))
    first.schedule()
    parked(first)
    assert others[0].cancel()

    def start_and_cancel() -> None:
        others[1].schedule()
        others[1].cancel()

    in_callback(context, start_and_cancel)
    for other in others:
        with pytest.raises((asyncio.CancelledError, WrongState)):
            other.result(LIMIT_S)
    assert first.state is CoroutineState.PARKED
    assert first.wake()
    assert first.result(LIMIT_S) == "woken"


def test_coroutines_of_another_make_are_run(context: homeloop.AioContext) -> None:
    """A class that is a Coroutine by its methods, and has no cr_suspended."""
    class Wrapped(collections.abc.Coroutine[Any, Any, str]):
        def __init__(self) -> None:
            self._coro = parks()

        def send(self, value: Any) -> Any:
            return self._coro.send(value)

        def throw(self, *args: Any) -> Any:
            return self._coro.throw(*args)

        def close(self) -> None:
            self._coro.close()

        def __await__(self) -> Generator[Any, Any, str]:
            return self._coro.__await__()

    co = context.spawn(Wrapped())
    parked(co)
    assert co.wake()
    assert co.result(LIMIT_S) == "woken"
    cancelled = context.spawn(Wrapped())
    assert cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        cancelled.result(LIMIT_S)


# Both call sites, in debug mode


def test_debug_mode_names_both_who_gave_an_object_that_had_begun(debug: homeloop.Runtime) -> None:
    coro = parks()
    co, first = debug.main.spawn(coro), line()
    parked(co)
    with pytest.raises(WrongState, match=r"first given at .* now given at") as caught:
        debug.main.spawn(coro)
    assert named(caught.value) == [first, line() - 1]
    co.wake()
    assert co.result(LIMIT_S) == "woken"
    with pytest.raises(WrongState, match=r"has ended.*first given at .* now given at") as caught:
        debug.main.create(coro)
    assert named(caught.value) == [first, line() - 1]


def test_debug_mode_names_both_who_started_one_object(debug: homeloop.Runtime) -> None:
    coro = parks()
    first, first_line = debug.main.create(coro), line()
    second, second_line = debug.main.create(coro), line()
    first.schedule()
    second.schedule()
    with pytest.raises(WrongState, match=r"runs once; given at .* to .*-main; given at") as caught:
        second.result(LIMIT_S)
    assert named(caught.value) == [first_line, second_line]
    first.wake()
    assert first.result(LIMIT_S) == "woken"


@pytest.mark.parametrize("method", ["enter", "schedule"])
def test_debug_mode_names_both_sites_of_another_contexts_coroutine(debug: homeloop.Runtime, method: str) -> None:
    with homeloop.IOThread() as io:
        co, first = debug.main.spawn(parks()), line()
        with pytest.raises(UsageError, match=r"not at home in .*; a coroutine's home never changes") as caught:
            getattr(io.context, method)(co)
        assert named(caught.value) == [first, line() - 1]
        co.wake()
        assert co.result(LIMIT_S) == "woken"


def test_debug_mode_names_both_sites_of_a_wait_for_itself(debug: homeloop.Runtime) -> None:
    lines: list[int] = []

    async def waits() -> list[BaseException]:
        me = homeloop.current_coroutine()
        assert me is not None
        errors: list[BaseException] = []
        lines.append(line() + 2)
        try:
            me.result()
        except WouldDeadlock as error:
            errors.append(error)
        lines.append(line() + 2)
        try:
            await me
        except RuntimeError as error:
            errors.append(error)
        return errors

    first = line() + 1
    errors = debug.main.spawn(waits()).result(LIMIT_S)
    assert [named(error) for error in errors] == [[first, lines[0]], [first, lines[1]]]


def test_rule4_a_wake_from_inside_itself_is_a_permit(debug: homeloop.Runtime) -> None:
    """No misuse: the next park takes it. Twice is one; likewise enter() and schedule() of the running one."""
    async def wakes() -> list[bool]:
        me = homeloop.current_coroutine()
        assert me is not None
        answers = []
        for wake in (me.wake, me.schedule, lambda: debug.main.enter(me), lambda: debug.main.schedule(me)):
            answers += [wake(), wake()]
            await homeloop.park()
        return answers

    assert debug.main.spawn(wakes()).result(LIMIT_S) == [True, False] * 4


def test_without_debug_mode_nothing_is_noted(context: homeloop.AioContext) -> None:
    """The texts have no call sites, and nothing is kept. Debug mode may begin at any time."""
    coro = parks()
    co = context.spawn(coro)
    parked(co)
    assert coro not in misuse._given
    with pytest.raises(WrongState) as caught:
        context.spawn(coro)
    assert named(caught.value) == []
    in_callback(context, lambda: context.loop.set_debug(True))
    noted = returned(lambda: 1)
    assert context.spawn(noted).result(LIMIT_S) == 1
    assert noted in misuse._given
    co.wake()
    assert co.result(LIMIT_S) == "woken"
