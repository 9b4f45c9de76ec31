"""The big lock: who holds it does the main context's work itself, without a thread switch."""

import asyncio
import threading

import homeloop


async def where() -> str:
    return threading.current_thread().name


async def writer(letters: asyncio.Queue[str]) -> None:
    await homeloop.park()
    letters.put_nowait(threading.current_thread().name)


with homeloop.Runtime(name="app") as rt:        # the main context is at home in a thread named app-main
    print("spawn() runs in", rt.main.spawn(where()).result())
    print("call() runs in ", rt.call(where()))  # right here: the loop sleeps, so the big lock is free

    letters: asyncio.Queue[str] = asyncio.Queue()
    with rt.big_lock:
        co = rt.main.create(writer(letters))
        co.wake()                               # runs it now, on this stack, until it parks
        co.wake()                               # and on to its end
        print("wake() runs in ", letters.get_nowait())      # asyncio's objects of the main loop are ours, too
