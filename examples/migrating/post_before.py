"""docs/migrating.md: A thread hands something to a loop, before."""

import asyncio
import threading


async def main() -> None:
    letters: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=loop.call_soon_threadsafe, args=(letters.put_nowait, "from a thread")).start()
    print(await letters.get())


asyncio.run(main())
