"""Home: any thread may wake a coroutine; it only ever runs in the thread of its home context."""

import threading

import homeloop


async def sleeper() -> None:
    print("starts in ", threading.current_thread().name)
    await homeloop.park()                       # until one wake; one that comes first is remembered
    print("goes on in", threading.current_thread().name)


async def main() -> None:
    co = homeloop.main_context().spawn(sleeper())
    threading.Thread(target=co.wake, name="waker").start()      # no call_soon_threadsafe, no future to set
    await co


homeloop.run(main())
