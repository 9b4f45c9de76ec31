"""IOThreads: one that is stuck holds up neither the others nor the main context."""

import threading

import homeloop


async def stuck(until: threading.Event) -> None:
    until.wait()                                # never do this in a coroutine: its whole loop stands still


async def where() -> str:
    return threading.current_thread().name


async def main() -> None:
    end = threading.Event()
    with homeloop.IOThread("disk") as disk, homeloop.IOThread("net") as net:
        co = disk.spawn(stuck(end))             # starts over there; may be awaited from any context
        print("answer from", await net.run(where()))
        print("disk is done:", co.done())
        end.set()
        await co


homeloop.run(main())
