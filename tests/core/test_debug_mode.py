"""asyncio's debug mode on loops of ours: it names what is slow, also what is no asyncio.Handle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

import homeloop
from tests.core.bounded import LIMIT_S
from tests.core.places import in_callback, returned


@pytest.fixture
def slow_loop(caplog: pytest.LogCaptureFixture) -> Iterator[homeloop.AioContext]:
    """A main context in debug mode, to which everything is slow."""
    caplog.set_level(logging.WARNING, logger="asyncio")
    with homeloop.Runtime(debug=True) as rt:
        in_callback(rt.main, lambda: setattr(rt.main.loop, "slow_callback_duration", 0))
        yield rt.main


@pytest.mark.parametrize("kind", ["coroutine", "woken", "task", "callback", "post", "bottom half", "idle", "cancel"])
def test_rule18_debug_mode_names_every_kind_of_entry(
    slow_loop: homeloop.AioContext, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Whatever takes long is reported by name, and the loop goes on: a text must not end it."""

    async def sluggish(park: bool = False) -> str:
        if park:
            await homeloop.park()
        await asyncio.sleep(0)
        return "ended"

    def fn() -> None:
        pass

    kept: list[Any] = []
    if kind in ("coroutine", "woken", "cancel"):
        co = slow_loop.spawn(sluggish(kind != "coroutine"))
        (co.cancel if kind == "cancel" else co.wake)()
        if kind == "cancel":
            with pytest.raises(asyncio.CancelledError):
                co.result(LIMIT_S)
        else:
            assert co.result(LIMIT_S) == "ended"
    elif kind == "task":
        in_callback(slow_loop, lambda: kept.append(slow_loop.loop.create_task(sluggish())))
    elif kind == "callback":
        in_callback(slow_loop, lambda: slow_loop.loop.call_soon(fn))
    elif kind == "post":
        slow_loop.post(fn)
    else:
        slow_loop.bottom_half(fn, idle=kind == "idle").schedule()
    for _ in range(3):
        assert slow_loop.spawn(returned(lambda: "goes on")).result(LIMIT_S) == "goes on"
    assert "Executing" in caplog.text
    assert "took" in caplog.text


def test_rule18_debug_mode_says_where_a_task_was_made(slow_loop: homeloop.AioContext) -> None:
    """repr() of handles, tasks and coroutines works in debug mode, in every state."""

    async def body() -> str:
        here = homeloop.current_coroutine()
        task = asyncio.ensure_future(asyncio.sleep(0))
        handle = asyncio.get_running_loop().call_later(0, lambda: None)
        texts = [repr(here), repr(task), repr(handle), repr(asyncio.get_running_loop())]
        await task
        return " ".join([*texts, repr(task), repr(handle)])

    co = slow_loop.spawn(body())
    text = co.result(LIMIT_S)
    assert "body" in text
    assert "test_debug_mode.py" in text
    assert "done" in repr(co)
