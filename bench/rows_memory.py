"""Memory: what a coroutine that waits costs, and what one million that have ended leave behind.

Bytes that Python allocated, by tracemalloc, each measured in a process of its own: what one contender left in its free
lists must not feed the next. All wait for something that only a program of theirs ends: homeloop's in park(), asyncio's
on a future of their own. The name and the coroutine object are part of it, and the same for all.

A finished one should cost nothing: the row has what is left in all when a million have ended.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Better, Contender, Missing, Round, Row, Unit

PARKED = 100_000
FINISHED = 1_000_000
# A round's figure is bytes each, in the place of seconds each.
BYTES_EACH = Unit("bytes", Better.LOWER, lambda each: each)
BYTES_IN_ALL = Unit("bytes", Better.LOWER, lambda each: max(1.0, each * FINISHED))     # 1: ratios divide by it
BATCH = 1_000                   # finished ones that live at a time
PROGRAM_S_MAX = 300.0
ROOT = Path(__file__).resolve().parent.parent

COMMON = """
import asyncio, gc, json, sys, tracemalloc
count, batch = int(sys.argv[1]), int(sys.argv[2])

def now():
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
"""

# Each program has: start(n), n that wait, as a list; end(list), a coroutine that ends them; finish(n), a coroutine.
HOMELOOP = """
import homeloop

async def parks():
    await homeloop.park()

async def noop():
    pass

def start(number):
    context = homeloop.current_context()
    return [context.spawn(parks()) for _ in range(number)]

async def end(started):
    for co in started:
        co.wake()
    for co in started:
        await co

async def finish(number):
    context = homeloop.current_context()
    for co in [context.spawn(noop()) for _ in range(number)]:
        await co

run = homeloop.run
"""
TASKS = """
async def parks(future):
    await future

async def noop():
    pass

def start(number):
    loop = asyncio.get_running_loop()
    return [loop.create_task(parks(loop.create_future())) for _ in range(number)]

async def end(started):
    for task in started:
        task.get_coro().cr_frame.f_locals["future"].set_result(None)
    for task in started:
        await task

async def finish(number):
    for task in [asyncio.create_task(noop()) for _ in range(number)]:
        await task
"""
ASYNCIO = TASKS + """
run = asyncio.run
"""
UVLOOP = TASKS + """
import uvloop
def run(main):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
"""
PARKED_MAIN = """
async def main():
    await end(start(batch))                     # caches, free lists, the growth of tables
    before = now()
    started = start(count)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    each = (now() - before) / count
    await end(started)
    del started
    return each, now() - before
"""
FINISHED_MAIN = """
async def main():
    await finish(batch)
    before = now()
    for _ in range(count // batch):
        await finish(batch)
    left = now() - before
    return left / count, left
"""
LAST = """
tracemalloc.start()
print(json.dumps(run(main())))
"""


@functools.cache            # it comes out the same each time, to a few bytes: one measurement serves all rounds
def measured(program: str, main: str, count: int) -> tuple[float, float]:
    """Bytes each, and bytes left when all have ended; in a process of its own."""
    source = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program + main + LAST, str(count), str(BATCH)],
        env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True, timeout=PROGRAM_S_MAX, check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise Missing(last[0])
    each, left = json.loads(done.stdout)
    return float(each), float(left)


@contextlib.contextmanager
def process(program: str, main: str) -> Iterator[Round]:
    yield lambda count: measured(program, main, count)[0] * count


def contenders(main: str) -> list[Contender]:
    return [
        Contender(name="homeloop", open=functools.partial(process, HOMELOOP, main), ours=True),
        Contender(name="asyncio", open=functools.partial(process, ASYNCIO, main)),
        Contender(name="uvloop", open=functools.partial(process, UVLOOP, main)),
    ]


def rows() -> list[Row]:
    return [
        Row(
            name=f"memory of each of {PARKED:,} parked coroutines",
            unit=BYTES_EACH,
            contenders=contenders(PARKED_MAIN),
            targets={"asyncio": 0.67, "uvloop": 0.67},
            count=PARKED,
        ),
        Row(
            name=f"memory left by {FINISHED:,} finished coroutines",
            unit=BYTES_IN_ALL,
            contenders=contenders(FINISHED_MAIN),
            targets={},
            count=FINISHED,
        ),
    ]
