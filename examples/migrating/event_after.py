"""docs/migrating.md: A thread tells a coroutine, after."""

import threading

import homeloop
from homeloop.sync import Event


async def main() -> None:
    ready = Event()
    threading.Thread(target=ready.set).start()
    await ready.wait()
    print("ready")


homeloop.run(main())
