"""The truthful current context: a thread is in one or it is not, and nobody guesses."""

import homeloop


def show(who: str) -> None:
    context = homeloop.current_context()
    print(f"{who:24}", context.name if context else None)


async def at_home(who: str) -> None:
    show(who)


with homeloop.Runtime(name="app") as rt, homeloop.IOThread("io") as io:
    rt.main.spawn(at_home("home of the main context")).result()
    io.call(at_home("IOThread"))
    show("any other thread")                    # None: it never passes for the main thread
    with rt.big_lock:
        show("... with the big lock")           # for so long, it is the main context's home
