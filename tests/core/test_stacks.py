"""get_stack() and print_stack() of a Coroutine: what asyncio's tasks have (rule 18)."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import pytest

import homeloop
from homeloop.core.coroutine import Coroutine, CoroutineState
from homeloop.core.stacks import await_frames, stack_text, traceback_frames
from tests.core.bounded import LIMIT_S, until


@pytest.fixture
def main() -> Iterator[homeloop.AioContext]:
    with homeloop.Runtime() as rt:
        yield rt.main


async def inner(until_woken: str) -> str:
    if until_woken == "raise":
        raise LookupError("nothing there")
    if until_woken == "future":
        await asyncio.get_running_loop().create_future()
    await homeloop.park()
    return "ended"


async def outer(until_woken: str = "park") -> str:
    return await inner(until_woken)


def names(co: Any, **limit: int) -> list[str]:
    return [frame.f_code.co_name for frame in co.get_stack(**limit)]


def printed(co: Any, **options: int) -> str:
    file = io.StringIO()
    co.print_stack(file=file, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "state"), [("park", CoroutineState.PARKED), ("future", CoroutineState.WAITING)])
def test_rule18_stack_of_a_suspended_coroutine(
    main: homeloop.AioContext, kind: str, state: CoroutineState
) -> None:
    """The way down to where it is suspended, from any thread."""
    co = main.spawn(outer(kind))
    until(lambda: co.state is state, co)
    assert names(co) == ["outer", "inner"]
    assert names(co, limit=1) == ["inner"], "the newest"
    assert names(co, limit=0) == []
    assert names(co, limit=9) == ["outer", "inner"]
    lines = printed(co).splitlines()
    assert lines[0] == f"Stack for {co!r} (most recent call last):"
    assert "return await inner(until_woken)" in lines[2]
    assert "await" in lines[-1]
    assert printed(co, limit=1).count("File") == 1
    co.cancel()
    with pytest.raises(asyncio.CancelledError):
        co.result(LIMIT_S)


def test_rule18_stack_of_one_that_raised(main: homeloop.AioContext) -> None:
    """Its traceback, at whatever time it is asked for; and that does not count as having looked at the error."""
    co = main.spawn(outer("raise"))
    until(co.done, co)
    assert names(co)[-2:] == ["outer", "inner"]
    assert names(co, limit=1) == names(co)[:1], "the oldest"
    lines = printed(co).splitlines()
    assert lines[0] == f"Traceback for {co!r} (most recent call last):"
    assert lines[-1] == "LookupError: nothing there"
    with pytest.raises(LookupError):
        co.result(LIMIT_S)
    assert names(co)[-2:] == ["outer", "inner"], "raising it again made it no longer"


def test_rule18_stack_of_one_that_has_none(main: homeloop.AioContext, capsys: pytest.CaptureFixture[str]) -> None:
    """Returned, or not begun."""
    co = main.spawn(outer())
    co.wake()
    assert co.result(LIMIT_S) == "ended"
    assert co.get_stack() == []
    co.print_stack()
    assert capsys.readouterr().err == f"No stack for {co!r}\n"
    unborn = main.create(outer())
    assert names(unborn) == ["outer"], "where it will begin, as with asyncio's tasks"
    unborn.cancel()
    until(unborn.done, unborn)
    assert unborn.get_stack() == []


def test_rule18_stack_of_the_running_one(main: homeloop.AioContext) -> None:
    async def asks() -> list[str]:
        me = homeloop.current_coroutine()
        assert isinstance(me, Coroutine)
        return names(me)

    assert main.spawn(asks()).result(LIMIT_S) == ["asks"]


def test_rule18_print_stack_says_what_asyncio_says(main: homeloop.AioContext) -> None:
    """Line for line, for a task and a Coroutine that stand at the same place."""
    async def alone() -> None:
        await asyncio.get_running_loop().create_future()

    async def compare() -> tuple[str, str]:
        task = asyncio.ensure_future(alone())
        co = main.spawn(alone())
        for _ in range(3):
            await asyncio.sleep(0)      # they begin, and wait
        texts = printed(task).replace(repr(task), "IT"), printed(co).replace(repr(co), "IT")
        task.cancel()
        co.cancel()
        return texts

    of_task, of_coroutine = main.spawn(compare()).result(LIMIT_S)
    assert of_coroutine == of_task
    assert "await asyncio.get_running_loop().create_future()" in of_task


def test_frames_of_what_has_none() -> None:
    assert await_frames(object(), None) == []
    assert traceback_frames(None, None) == []
    assert stack_text("it", [], ValueError("x")) == "No stack for it\nValueError: x\n"
