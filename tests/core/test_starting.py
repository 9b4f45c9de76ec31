"""start_now(): the first step on this stack, where that is allowed; else as spawn()."""

from __future__ import annotations

import asyncio

import pytest

import homeloop
from homeloop.core.starting import start_now
from homeloop.errors import ContextClosed


async def note(order: list[str], what: str) -> str:
    order.append(what)
    return what


def test_from_a_callback_it_runs_at_once() -> None:
    async def main() -> None:
        context = homeloop.current_context()
        assert context is not None
        order: list[str] = []
        ended = context.loop.create_future()

        def callback() -> None:
            co = start_now(context, note(order, "started"))
            order.append("callback")
            assert co.done()
            assert co.result() == "started"
            ended.set_result(None)

        context.loop.call_soon(callback)
        await ended
        assert order == ["started", "callback"]

    homeloop.run(main())


@pytest.mark.parametrize("task", [False, True])
def test_inside_a_coroutine_it_runs_later(task: bool) -> None:
    async def starting() -> None:
        context = homeloop.current_context()
        assert context is not None
        order: list[str] = []
        co = start_now(context, note(order, "started"))
        assert not order
        assert await co == "started"

    async def main() -> None:
        if task:
            await asyncio.create_task(starting())
        else:
            await starting()

    homeloop.run(main())


def test_from_another_thread_and_after_the_end() -> None:
    with homeloop.IOThread("io") as io:
        assert start_now(io.context, note([], "there")).result(10) == "there"
    with pytest.raises(ContextClosed):
        start_now(io.context, note([], "never"))
