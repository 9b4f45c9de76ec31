"""Coroutine to coroutine across contexts: one loop's coroutine runs another loop's and waits for the result.

Against wrap_future(run_coroutine_threadsafe()), from one loop thread to another.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Iterator

from bench.measure import MICROSECONDS, Contender, Round, Row
from bench.peers import LoopFactory, asyncio_loop, loop_thread, need_homeloop, uvloop_loop


async def noop() -> None:
    pass


async def drive(step: Callable[[], Awaitable[None]], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        await step()
    return time.perf_counter() - start


@contextlib.contextmanager
def wrapped_futures(factory: LoopFactory) -> Iterator[Round]:
    with loop_thread(factory) as here, loop_thread(factory) as there:

        def step() -> Awaitable[None]:
            return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(noop(), there))

        yield lambda count: asyncio.run_coroutine_threadsafe(drive(step, count), here).result()


@contextlib.contextmanager
def from_main() -> Iterator[Round]:
    homeloop = need_homeloop()
    with homeloop.Runtime(name="bench") as rt, homeloop.IOThread("bench") as io:
        # spawn: at home on the main thread from its first step, like the others; call() would begin it here.
        yield lambda count: rt.main.spawn(drive(lambda: io.run(noop()), count)).result()


@contextlib.contextmanager
def between_iothreads() -> Iterator[Round]:
    homeloop = need_homeloop()
    with homeloop.IOThread("bench-here") as here, homeloop.IOThread("bench-there") as there:
        yield lambda count: here.call(drive(lambda: there.run(noop()), count))


def rows() -> list[Row]:
    return [
        Row(
            name="await io.run(noop()) across contexts",
            unit=MICROSECONDS,
            contenders=[
                Contender(name="homeloop", open=from_main, ours=True),
                Contender(name="homeloop io to io", open=between_iothreads, ours=True),
                Contender(name="asyncio", open=functools.partial(wrapped_futures, asyncio_loop)),
                Contender(name="uvloop", open=functools.partial(wrapped_futures, uvloop_loop)),
            ],
            targets={"asyncio": 2.0, "uvloop": 1.0},
        )
    ]
