"""docs/migrating.md: anyio's capacity limiter, after."""

import threading

import homeloop
from homeloop.sync import Semaphore

pair = threading.Barrier(2)     # each job waits for another one, so that two are at work at once


def job() -> None:
    pair.wait(timeout=30)


async def limited(semaphore: Semaphore) -> None:
    async with semaphore:       # for coroutines of all contexts; of one, IOThread(worker_max=2) does it
        await homeloop.to_worker(job)


async def main() -> None:
    semaphore = Semaphore(2, limit=2)
    async with homeloop.TaskGroup() as group:
        for _ in range(6):
            group.spawn(limited(semaphore))
    print("all done, two at a time")


homeloop.run(main())
