"""No growth: what has ended leaves nothing, however often. The bench has the bytes of each (rows_memory)."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator

import pytest

import homeloop

PARKED = 2_000
FINISHED = 5_000
ROUNDS = 4
# What a round may leave that no coroutine of it left: a free list that fills, a deque's block, a line cache. A table
# may grow in any one round; what leaks, leaks in each. So the round that left least is judged.
SLACK_BYTES = 4_096


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def now() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def judge(sizes: list[int]) -> None:
    """sizes: before the rounds, and behind each."""
    left = [after - before for before, after in itertools.pairwise(sizes)]
    assert min(left) < SLACK_BYTES, f"bytes left by each round: {left}"


async def parks() -> None:
    await homeloop.park("to be counted")


async def noop() -> None:
    pass


async def parked(context: homeloop.AioContext) -> None:
    started = [context.spawn(parks()) for _ in range(PARKED)]
    await asyncio.sleep(0)
    for co in started:
        co.wake()
    for co in started:
        await co


async def cancelled(context: homeloop.AioContext) -> None:
    started = [context.spawn(parks()) for _ in range(PARKED)]
    await asyncio.sleep(0)
    for co in started:
        co.cancel()
    await asyncio.gather(*started, return_exceptions=True)


async def finished(context: homeloop.AioContext) -> None:
    for _ in range(FINISHED // 500):
        for co in [context.spawn(noop()) for _ in range(500)]:
            await co


async def hopped(context: homeloop.AioContext) -> None:
    del context
    with homeloop.IOThread() as io:
        for _ in range(FINISHED // 10):
            await io.run(noop())


async def worked(context: homeloop.AioContext) -> None:
    for _ in range(FINISHED // 20):
        await context.worker(int)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("round_", [parked, cancelled, finished, hopped, worked])
def test_rounds_leave_nothing(round_: Callable[[homeloop.AioContext], Awaitable[None]]) -> None:
    """Tables keep the size that the first round made them grow to; later rounds add nothing."""
    async def main() -> list[int]:
        context = homeloop.current_context()
        assert context is not None
        await round_(context)
        await round_(context)
        sizes = [now()]
        for _ in range(ROUNDS):
            await round_(context)
            sizes.append(now())
        assert context.statistics().coroutines <= 1
        return sizes

    judge(homeloop.run(main()))


@pytest.mark.usefixtures("traced")
def test_calls_from_a_plain_thread_leave_nothing() -> None:
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        def calls() -> None:
            for _ in range(FINISHED // 5):
                rt.call(noop())
                io.post(int)
            for _ in range(FINISHED // 50):
                io.call(noop())

        calls()
        sizes = [now()]
        for _ in range(ROUNDS):
            calls()
            sizes.append(now())
    judge(sizes)


@pytest.mark.usefixtures("traced")
def test_contexts_that_ended_leave_nothing() -> None:
    def opens() -> None:
        for _ in range(10):
            with homeloop.Runtime() as rt, homeloop.IOThread() as io:
                rt.call(noop())
                io.spawn(parks())
            homeloop.run(noop())

    opens()
    opens()
    sizes = [now()]
    for _ in range(ROUNDS):
        opens()
        sizes.append(now())
    judge(sizes)
    assert threading.active_count() < 10


def test_a_leak_is_seen() -> None:
    """4 bytes for each of a round's coroutines are too many."""
    with pytest.raises(AssertionError, match="bytes left"):
        judge([number * 4 * PARKED for number in range(ROUNDS + 1)])
    judge([0, 10, 200_000, 200_010])


def test_a_parked_coroutine_is_not_much_more_than_a_task() -> None:
    """Target: 1.5 times. tracemalloc counts bytes, so a small number tells as much as a large one."""
    async def ours() -> float:
        context = homeloop.current_context()
        assert context is not None
        await parked(context)
        before = now()
        started = [context.spawn(parks()) for _ in range(PARKED)]
        await asyncio.sleep(0)
        each = (now() - before) / PARKED
        for co in started:
            co.wake()
        return each

    async def theirs() -> float:
        async def waits(future: asyncio.Future[None]) -> None:
            await future

        async def start() -> list[asyncio.Task[None]]:
            loop = asyncio.get_running_loop()
            tasks = [loop.create_task(waits(loop.create_future())) for _ in range(PARKED)]
            await asyncio.sleep(0)
            return tasks

        for task in await start():
            task.cancel()
        await asyncio.sleep(0)
        before = now()
        tasks = await start()
        each = (now() - before) / PARKED
        for task in tasks:
            task.cancel()
        return each

    tracemalloc.start()
    try:
        ratio = homeloop.run(ours()) / asyncio.run(theirs())
    finally:
        tracemalloc.stop()
    print(f"{ratio:.2f} times a task")
    assert ratio <= 1.5
