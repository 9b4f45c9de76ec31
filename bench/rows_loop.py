"""Plain asyncio work on our loop: what a program pays that only wants its asyncio to go on as before.

Each contender is one asyncio.Runner on a thread of its own. uvloop is shown for comparison; the target is
against the stock SelectorEventLoop, which ours is built on.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager

from bench.measure import MICROSECONDS, Contender, Round, Row
from bench.peers import (
    LoopFactory,
    Rounds,
    asyncio_loop,
    homeloop_loop,
    need_homeloop,
    need_uvloop,
    round_thread,
    uvloop_loop,
)

AT_ONCE = 100
ECHO_BYTES = 1024
Job = Callable[[int], Coroutine[object, object, float]]


def nothing() -> None:
    pass


async def noop() -> None:
    pass


class Chain:
    """A callback that queues itself again until it has run `count` times: one loop iteration for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self._loop = loop
        self._left = count
        self.done = loop.create_future()

    def __call__(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._loop.call_soon(self)
        else:
            self.done.set_result(None)


async def call_soon_chain(count: int) -> float:
    chain = Chain(asyncio.get_running_loop(), count)
    start = time.perf_counter()
    chain()
    await chain.done
    return time.perf_counter() - start


async def call_soon_batches(count: int) -> float:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    for _ in range(count):
        for _ in range(AT_ONCE):
            loop.call_soon(nothing)
        await asyncio.sleep(0)
    return time.perf_counter() - start


async def create_tasks(count: int) -> float:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    for _ in range(count):
        await loop.create_task(noop())
    return time.perf_counter() - start


async def gathers(count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        await asyncio.gather(*[noop() for _ in range(AT_ONCE)])
    return time.perf_counter() - start


async def tcp_echoes(count: int) -> float:
    """One connection over loopback, client and server on the same loop, one message at a time."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    message = bytes(ECHO_BYTES)
    start = time.perf_counter()
    for _ in range(count):
        writer.write(message)
        await reader.readexactly(ECHO_BYTES)
    seconds = time.perf_counter() - start
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    return seconds


def on_runner(factory: LoopFactory, need: Callable[[], object], job: Job) -> AbstractContextManager[Round]:
    need()

    def body(rounds: Rounds) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            for count in rounds:
                rounds.answer(runner.run(job(count)))

    return round_thread(body)


def loop_row(name: str, job: Job) -> Row:
    opening = functools.partial(functools.partial, on_runner)
    return Row(
        name=name,
        unit=MICROSECONDS,
        contenders=[
            Contender(name="homeloop", open=opening(homeloop_loop, need_homeloop, job), ours=True),
            Contender(name="asyncio", open=opening(asyncio_loop, nothing, job)),
            Contender(name="uvloop", open=opening(uvloop_loop, need_uvloop, job)),
        ],
        targets={"asyncio": 0.95},
    )


def rows() -> list[Row]:
    return [
        loop_row("asyncio on our loop: call_soon, one an iteration", call_soon_chain),
        loop_row(f"asyncio on our loop: call_soon, {AT_ONCE} an iteration", call_soon_batches),
        loop_row("asyncio on our loop: await create_task(noop())", create_tasks),
        loop_row(f"asyncio on our loop: gather of {AT_ONCE}", gathers),
        loop_row(f"asyncio on our loop: TCP echo of {ECHO_BYTES} bytes", tcp_echoes),
    ]
