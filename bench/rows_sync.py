"""Locks and channels: uncontended against asyncio's and threading's, and items between a thread and a loop.

Uncontended: one task, or one thread, enters and leaves the same lock. Items: a plain thread sends, a coroutine in
another thread's loop receives, and the other way round; the peers' way is an asyncio.Queue fed by
call_soon_threadsafe(), or read through run_coroutine_threadsafe(). Both channels hold 1024 items.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from bench.measure import MICROSECONDS, Contender, Missing, Round, Row
from bench.peers import asyncio_loop, loop_thread, need_homeloop, optional

sync = optional("homeloop.sync")
CAPACITY = 1024
ARRIVE_WITHIN_S = 60.0


def need_sync() -> Any:
    need_homeloop()
    if not hasattr(sync, "Mutex"):
        raise Missing("homeloop.sync cannot be imported")
    return sync


# Uncontended


async def enter_async(lock: AbstractAsyncContextManager[Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        async with lock:
            pass
    return time.perf_counter() - start


def enter(lock: AbstractContextManager[Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        with lock:
            pass
    return time.perf_counter() - start


@contextlib.contextmanager
def in_task(make: Callable[[], Any]) -> Iterator[Round]:
    """A stock loop, so that the lock is all that differs."""
    lock = make()
    with asyncio.Runner(loop_factory=asyncio_loop) as runner:
        yield lambda count: runner.run(enter_async(lock, count))


@contextlib.contextmanager
def in_thread(make: Callable[[], Any]) -> Iterator[Round]:
    lock = make()
    yield lambda count: enter(lock, count)


def mutex() -> Any:
    return need_sync().Mutex()


# Items between a thread and a loop


async def receive_all(receive: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        await receive()


async def send_all(send: Callable[[int], Any], count: int) -> None:
    for number in range(count):
        await send(number)


@contextlib.contextmanager
def channel_to_coroutine() -> Iterator[Round]:
    channel = need_sync().Channel(CAPACITY)
    with need_homeloop().IOThread("bench") as io:

        def round_(count: int) -> float:
            start = time.perf_counter()
            receiver = io.spawn(receive_all(channel.receive, count))
            for number in range(count):
                channel.send(number)
            receiver.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_


@contextlib.contextmanager
def queue_to_coroutine() -> Iterator[Round]:
    """No limit: a thread cannot wait for a place in an asyncio.Queue."""
    with loop_thread(asyncio_loop) as loop:
        queue: asyncio.Queue[int] = asyncio.Queue()

        def round_(count: int) -> float:
            start = time.perf_counter()
            receiver = asyncio.run_coroutine_threadsafe(receive_all(queue.get, count), loop)
            for number in range(count):
                loop.call_soon_threadsafe(queue.put_nowait, number)
            receiver.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_


@contextlib.contextmanager
def channel_to_thread() -> Iterator[Round]:
    channel = need_sync().Channel(CAPACITY)
    with need_homeloop().IOThread("bench") as io:

        def round_(count: int) -> float:
            start = time.perf_counter()
            sender = io.spawn(send_all(channel.send, count))
            for _ in range(count):
                channel.receive()
            seconds = time.perf_counter() - start
            sender.result(ARRIVE_WITHIN_S)
            return seconds

        yield round_


@contextlib.contextmanager
def queue_to_thread() -> Iterator[Round]:
    with loop_thread(asyncio_loop) as loop:
        queue: asyncio.Queue[int] = asyncio.Queue(CAPACITY)

        def round_(count: int) -> float:
            start = time.perf_counter()
            sender = asyncio.run_coroutine_threadsafe(send_all(queue.put, count), loop)
            for _ in range(count):
                asyncio.run_coroutine_threadsafe(queue.get(), loop).result(ARRIVE_WITHIN_S)
            seconds = time.perf_counter() - start
            sender.result(ARRIVE_WITHIN_S)
            return seconds

        yield round_


async def bounce(receive: Callable[[], Any], send: Callable[[int], Any], count: int) -> None:
    for _ in range(count):
        number = await receive()
        sent = send(number)
        if sent is not None:
            await sent


async def serve_and_bounce(receive: Callable[[], Any], send: Callable[[int], Any], count: int) -> None:
    sent = send(1)
    if sent is not None:
        await sent
    await bounce(receive, send, count - 1)
    await receive()


@contextlib.contextmanager
def ping_pong_channels() -> Iterator[Round]:
    there, back = need_sync().Channel(1), need_sync().Channel(1)
    with need_homeloop().IOThread("bench-a") as a, need_homeloop().IOThread("bench-b") as b:

        def round_(count: int) -> float:
            start = time.perf_counter()
            other = b.spawn(bounce(there.receive, back.send, count))
            a.spawn(serve_and_bounce(back.receive, there.send, count)).result(ARRIVE_WITHIN_S)
            other.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_


@contextlib.contextmanager
def ping_pong_queues() -> Iterator[Round]:
    with loop_thread(asyncio_loop) as a, loop_thread(asyncio_loop) as b:
        there: asyncio.Queue[int] = asyncio.Queue()
        back: asyncio.Queue[int] = asyncio.Queue()

        def to(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[int], number: int) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, number)

        def round_(count: int) -> float:
            start = time.perf_counter()
            other = asyncio.run_coroutine_threadsafe(bounce(there.get, functools.partial(to, a, back), count), b)
            mine = serve_and_bounce(back.get, functools.partial(to, b, there), count)
            asyncio.run_coroutine_threadsafe(mine, a).result(ARRIVE_WITHIN_S)
            other.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_


def row(name: str, ours: Callable[[], Any], theirs: tuple[str, Callable[[], Any]], target: float) -> Row:
    return Row(
        name=name,
        unit=MICROSECONDS,
        contenders=[Contender(name="homeloop", open=ours, ours=True), Contender(name=theirs[0], open=theirs[1])],
        targets={theirs[0]: target},
    )


def rows() -> list[Row]:
    bind = functools.partial
    return [
        row("a free lock in a task", bind(in_task, mutex), ("asyncio", bind(in_task, asyncio.Lock)), 1 / 1.3),
        row("a free lock in a thread", bind(in_thread, mutex), ("threading", bind(in_thread, threading.Lock)), 1 / 5),
        row("items from a thread to a coroutine", channel_to_coroutine, ("asyncio", queue_to_coroutine), 2.0),
        row("items from a coroutine to a thread", channel_to_thread, ("asyncio", queue_to_thread), 2.0),
        row("ping-pong of two contexts", ping_pong_channels, ("asyncio", ping_pong_queues), 1.5),
    ]
