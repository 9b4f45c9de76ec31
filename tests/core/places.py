"""The places that synchronous code may stand in (which thread, with or without the big lock, in a coroutine or not),
and the coroutines that it waits for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import homeloop
from tests.core.bounded import LIMIT_S, in_plain_thread


@dataclasses.dataclass(frozen=True)
class World:
    """A runtime on a thread of its own, and two IOThreads; places that begin with `io` are in `own`."""

    rt: homeloop.Runtime
    own: homeloop.IOThread
    other: homeloop.IOThread


async def returned(fn: Callable[[], Any]) -> Any:
    """A coroutine that calls fn."""
    return fn()


class Slow:
    """A coroutine that waits for ever and, cancelled, takes several turns to clean up."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.log: list[str] = []

    async def run(self) -> str:
        asyncio.get_running_loop().call_soon(self.waiting.set)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            for _ in range(3):
                await asyncio.sleep(0)
            self.log.append("cleaned up")
            raise
        return "never"


def in_callback(context: homeloop.AioContext, fn: Callable[[], Any]) -> Any:
    """Call fn in a bare callback of context's loop; its result."""
    done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(fn())
        except BaseException as exc:
            done.set_exception(exc)

    context.post(run)
    return done.result(2 * LIMIT_S)


def in_coroutine(context: homeloop.AioContext, fn: Callable[[], Any]) -> Any:
    """Call fn in a coroutine at home in context; its result."""
    return context.spawn(returned(fn)).result(2 * LIMIT_S)


def with_lock(world: World, fn: Callable[[], Any]) -> Any:
    with world.rt.big_lock:
        return fn()


PLACES: dict[str, Callable[[World, Callable[[], Any]], Any]] = {
    "plain": lambda world, fn: in_plain_thread(fn),
    "plain with lock": lambda world, fn: in_plain_thread(with_lock, world, fn),
    "plain in driven coroutine": lambda world, fn: in_plain_thread(lambda: world.rt.call(returned(fn))),
    "main callback": lambda world, fn: in_callback(world.rt.main, fn),
    "main coroutine": lambda world, fn: in_coroutine(world.rt.main, fn),
    "io callback": lambda world, fn: in_callback(world.own.context, fn),
    "io coroutine": lambda world, fn: in_coroutine(world.own.context, fn),
    "io with lock": lambda world, fn: in_callback(world.own.context, lambda: with_lock(world, fn)),
}


def at(world: World, place: str, fn: Callable[[], Any]) -> Any:
    """Call fn in that place; its result or exception."""
    return PLACES[place](world, fn)
