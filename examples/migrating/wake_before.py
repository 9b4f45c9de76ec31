"""docs/migrating.md: A thread tells a coroutine, by a wake, before."""

import asyncio
import threading


async def waiter(told: asyncio.Event) -> None:
    await told.wait()
    print("woken")


async def main() -> None:
    told = asyncio.Event()
    task = asyncio.create_task(waiter(told))
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: loop.call_soon_threadsafe(told.set)).start()
    await task


asyncio.run(main())
