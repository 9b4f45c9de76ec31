"""docs/migrating.md: A thread tells a coroutine, before."""

import asyncio
import threading


async def main() -> None:
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: loop.call_soon_threadsafe(ready.set)).start()
    await ready.wait()
    print("ready")


asyncio.run(main())
