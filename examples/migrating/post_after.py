"""docs/migrating.md: A thread hands something to a loop, after."""

import asyncio
import threading

import homeloop


async def main() -> None:
    letters: asyncio.Queue[str] = asyncio.Queue()
    context = homeloop.main_context()
    threading.Thread(target=context.post, args=(letters.put_nowait, "from a thread")).start()
    print(await letters.get())


homeloop.run(main())
