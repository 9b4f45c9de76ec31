"""Where the parents and the children of task groups live, and what they do there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Coroutine as CoroutineABC
from typing import Any

import pytest

import homeloop
from tests.core.bounded import LIMIT_S

Run = Callable[[CoroutineABC[Any, Any, Any]], Any]


def run_on_uvloop(coro: CoroutineABC[Any, Any, Any]) -> Any:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coro)


def run_in_iothread(coro: CoroutineABC[Any, Any, Any]) -> Any:
    with homeloop.IOThread("parent") as io:
        return io.call(coro)


def run_in_runtime(coro: CoroutineABC[Any, Any, Any]) -> Any:
    with homeloop.Runtime() as rt:
        return rt.call(coro)


PARENTS: dict[str, Run] = {
    "asyncio": asyncio.run, "uvloop": run_on_uvloop, "main": homeloop.run, "IOThread": run_in_iothread,
    "call() of a runtime": run_in_runtime,
}


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def fails(error: BaseException) -> None:
    raise error


async def value(given: Any) -> Any:
    await asyncio.sleep(0)
    return given


async def turns(number: int = 10) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def come(predicate: Callable[[], object]) -> None:
    """until(), in a coroutine."""
    async with asyncio.timeout(LIMIT_S):
        while not predicate():          # noqa: ASYNC110 - what no event announces
            await asyncio.sleep(0)
