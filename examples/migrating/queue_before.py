"""docs/migrating.md: A queue between threads and coroutines, before."""

import asyncio

import janus


async def main() -> None:
    queue: janus.Queue[int | None] = janus.Queue(maxsize=2)

    def produce() -> None:
        for number in range(5):
            queue.sync_q.put(number)
        queue.sync_q.put(None)

    producing = asyncio.create_task(asyncio.to_thread(produce))
    while (number := await queue.async_q.get()) is not None:
        print(number)
    await producing
    await queue.aclose()


asyncio.run(main())
