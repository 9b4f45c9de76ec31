"""docs/migrating.md: A thread asks a loop, before."""

import asyncio
import threading


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0.001)
    return a + b


loop = asyncio.new_event_loop()
thread = threading.Thread(target=loop.run_forever)
thread.start()
print(asyncio.run_coroutine_threadsafe(add(1, 2), loop).result(timeout=10))
loop.call_soon_threadsafe(loop.stop)
thread.join()
loop.close()
