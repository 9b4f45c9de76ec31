"""docs/migrating.md: A thread tells a coroutine, by a wake, after."""

import threading

import homeloop


async def waiter() -> None:
    await homeloop.park("the thread")           # a wake that comes first is remembered
    print("woken")


async def main() -> None:
    co = homeloop.main_context().spawn(waiter())
    threading.Thread(target=co.wake).start()
    await co


homeloop.run(main())
