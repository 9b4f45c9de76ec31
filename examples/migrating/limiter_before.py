"""docs/migrating.md: anyio's capacity limiter, before."""

import threading
from functools import partial

import anyio

pair = threading.Barrier(2)     # each job waits for another one, so that two are at work at once


def job() -> None:
    pair.wait(timeout=30)


async def main() -> None:
    limiter = anyio.CapacityLimiter(2)
    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(partial(anyio.to_thread.run_sync, job, limiter=limiter))
    print("all done, two at a time")


anyio.run(main)
