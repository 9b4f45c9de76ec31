"""Locks and channels: free and contended, items between a thread and a loop, and what an idle one takes.

Free: one task, or one thread, enters and leaves the same lock. Contended: a task in each of two loops in two threads.
Items: a plain thread sends, a coroutine in another thread's loop receives, and the other way round; asyncio's way is
an asyncio.Queue fed by call_soon_threadsafe(), or read through run_coroutine_threadsafe(). All hold 1024 items. Ours
run in IOThreads, the others' on stock loops; "on stock loops" are ours there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from bench.measure import MICROSECONDS, Contender, Missing, Opening, Round, Row
from bench.peers import (
    asyncio_loop,
    loop_thread,
    need_aiologic,
    need_culsans,
    need_homeloop,
    need_janus,
    optional,
)
from bench.rows_memory import BYTES_EACH, process

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


def aiologic_lock() -> Any:
    return need_aiologic().Lock()


# Contended


async def share(lock: AbstractAsyncContextManager[Any], count: int) -> None:
    """Inside it lets its loop go round once: whoever wants the lock comes meanwhile."""
    for _ in range(count):
        async with lock:
            await asyncio.sleep(0)


@contextlib.contextmanager
def two_iothreads(make: Callable[[], Any]) -> Iterator[Round]:
    lock = make()
    with need_homeloop().IOThread("bench-a") as a, need_homeloop().IOThread("bench-b") as b:

        def round_(count: int) -> float:
            start = time.perf_counter()
            for co in [io.spawn(share(lock, count)) for io in (a, b)]:
                co.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_


@contextlib.contextmanager
def two_stock_loops(make: Callable[[], Any]) -> Iterator[Round]:
    lock = make()
    with loop_thread(asyncio_loop) as a, loop_thread(asyncio_loop) as b:

        def round_(count: int) -> float:
            start = time.perf_counter()
            for future in [asyncio.run_coroutine_threadsafe(share(lock, count), loop) for loop in (a, b)]:
                future.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_


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
def two_faced_to_coroutine(make: Callable[[], Any]) -> Iterator[Round]:
    """janus and culsans: a queue with a side for threads and one for coroutines."""
    queue = make()
    with loop_thread(asyncio_loop) as loop:

        def round_(count: int) -> float:
            start = time.perf_counter()
            receiver = asyncio.run_coroutine_threadsafe(receive_all(queue.async_q.get, count), loop)
            for number in range(count):
                queue.sync_q.put(number)
            receiver.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_
        asyncio.run_coroutine_threadsafe(queue.aclose(), loop).result(ARRIVE_WITHIN_S)


@contextlib.contextmanager
def two_faced_to_thread(make: Callable[[], Any]) -> Iterator[Round]:
    queue = make()
    with loop_thread(asyncio_loop) as loop:

        def round_(count: int) -> float:
            start = time.perf_counter()
            sender = asyncio.run_coroutine_threadsafe(send_all(queue.async_q.put, count), loop)
            for _ in range(count):
                queue.sync_q.get()
            seconds = time.perf_counter() - start
            sender.result(ARRIVE_WITHIN_S)
            return seconds

        yield round_
        asyncio.run_coroutine_threadsafe(queue.aclose(), loop).result(ARRIVE_WITHIN_S)


def janus_queue() -> Any:
    return need_janus().Queue(CAPACITY)


def culsans_queue() -> Any:
    return need_culsans().Queue(CAPACITY)


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


@contextlib.contextmanager
def ping_pong_two_faced(make: Callable[[], Any]) -> Iterator[Round]:
    """Each side puts without waiting, as the other rows do: there is always a place."""
    there, back = make(), make()
    with loop_thread(asyncio_loop) as a, loop_thread(asyncio_loop) as b:

        def round_(count: int) -> float:
            start = time.perf_counter()
            other = asyncio.run_coroutine_threadsafe(bounce(there.async_q.get, back.sync_q.put_nowait, count), b)
            mine = serve_and_bounce(back.async_q.get, there.sync_q.put_nowait, count)
            asyncio.run_coroutine_threadsafe(mine, a).result(ARRIVE_WITHIN_S)
            other.result(ARRIVE_WITHIN_S)
            return time.perf_counter() - start

        yield round_
        asyncio.run_coroutine_threadsafe(there.aclose(), b).result(ARRIVE_WITHIN_S)
        asyncio.run_coroutine_threadsafe(back.aclose(), a).result(ARRIVE_WITHIN_S)


# Memory


IDLE = 10_000
IDLE_MAIN = """
async def main():
    make()
    places = [None] * count
    before = now()
    for number in range(count):
        places[number] = make()
    each = (now() - before) / count
    return each, 0

run = asyncio.run
"""


def idle(program: str) -> Opening:
    return functools.partial(process, program, IDLE_MAIN)


def row(name: str, ours: Mapping[str, Opening], theirs: Mapping[str, tuple[Opening, float]]) -> Row:
    """theirs: how it is opened, and what ours must reach against it."""
    return Row(
        name=name,
        unit=MICROSECONDS,
        contenders=[
            *(Contender(name=who, open=opening, ours=True) for who, opening in ours.items()),
            *(Contender(name=who, open=opening) for who, (opening, _) in theirs.items()),
        ],
        targets={who: target for who, (_, target) in theirs.items()},
    )


def memory_row(name: str, ours: str, theirs: str) -> Row:
    return Row(
        name=name,
        unit=BYTES_EACH,
        contenders=[
            Contender(name="homeloop", open=idle(f"from homeloop import sync\nmake = lambda: sync.{ours}"), ours=True),
            Contender(name="asyncio", open=idle(f"make = lambda: asyncio.{theirs}")),
        ],
        targets={"asyncio": 1 / 1.5},
        count=IDLE,
    )


def rows() -> list[Row]:
    bind = functools.partial
    task, thread = bind(bind, in_task), bind(bind, in_thread)
    return [
        row("a free lock in a task", {"homeloop": task(mutex)},
            {"asyncio": (task(asyncio.Lock), 1 / 1.3), "aiologic": (task(aiologic_lock), 3.0)}),
        row("a free lock in a thread", {"homeloop": thread(mutex)},
            {"threading": (thread(threading.Lock), 1 / 5), "aiologic": (thread(aiologic_lock), 1.0)}),
        row("a lock that two loops want",
            {"homeloop": bind(two_iothreads, mutex), "on stock loops": bind(two_stock_loops, mutex)},
            {"aiologic": (bind(two_stock_loops, aiologic_lock), 2.0)}),
        row("items from a thread to a coroutine", {"homeloop": channel_to_coroutine},
            {"asyncio": (queue_to_coroutine, 2.0), "janus": (bind(two_faced_to_coroutine, janus_queue), 2.0),
             "culsans": (bind(two_faced_to_coroutine, culsans_queue), 2.0)}),
        row("items from a coroutine to a thread", {"homeloop": channel_to_thread},
            {"asyncio": (queue_to_thread, 2.0), "janus": (bind(two_faced_to_thread, janus_queue), 2.0),
             "culsans": (bind(two_faced_to_thread, culsans_queue), 2.0)}),
        row("ping-pong of two contexts", {"homeloop": ping_pong_channels},
            {"asyncio": (ping_pong_queues, 1.5), "janus": (bind(ping_pong_two_faced, janus_queue), 1.5),
             "culsans": (bind(ping_pong_two_faced, culsans_queue), 1.5)}),
        memory_row("memory of an idle lock", "Mutex()", "Lock()"),
        memory_row("memory of an idle channel", "Channel(1)", "Queue(1)"),
    ]
