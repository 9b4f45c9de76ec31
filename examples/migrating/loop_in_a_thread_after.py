"""docs/migrating.md: A loop in a thread of its own, after."""

import threading

import homeloop


async def where() -> str:
    return threading.current_thread().name


async def main() -> None:
    with homeloop.IOThread("disk") as disk:     # its end cancels what is left, and waits for it
        print(await disk.run(where()))


homeloop.run(main())
