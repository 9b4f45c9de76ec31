"""Three mistakes at the seam between event loops and threads, with asyncio and with homeloop.

Where asyncio hangs, homeloop does what was meant, or the one who is wrong gets an error that says what to do.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import homeloop

HANGS_AFTER_S = 1.5
LOOP_SLEEPS_AFTER_S = 0.2

Say = Callable[[str], None]


class Library(NamedTuple):
    run: Callable[[Coroutine[Any, Any, None]], None]        # the main program
    call: Callable[[Coroutine[Any, Any, str]], str]         # from synchronous code: run it, wait for it


def asyncio_call(coro: Coroutine[Any, Any, str]) -> str:
    return asyncio.run_coroutine_threadsafe(coro, asyncio.get_running_loop()).result()


def homeloop_call(coro: Coroutine[Any, Any, str]) -> str:
    return homeloop.main_context().call(coro)


def future_set_by_a_thread(library: Library, say: Say) -> None:
    """Nobody tells the loop that its future is done: it sleeps on."""

    async def waits() -> None:
        future = asyncio.get_running_loop().create_future()
        threading.Timer(LOOP_SLEEPS_AFTER_S, reporting, [say, future.set_result, None]).start()
        await future
        say("works")

    library.run(waits())


def wait_for_ones_own_loop(library: Library, say: Say) -> None:
    """A synchronous function, called in a coroutine, waits for another coroutine of the same loop."""

    async def answer() -> str:
        return "works"

    async def main() -> None:
        say(library.call(answer()))

    library.run(main())


def one_lock_for_two_loops(library: Library, say: Say) -> None:
    """Uncontended it works; contended, the release wakes a waiter in a loop that does not hear it."""
    lock, held, queued = asyncio.Lock(), threading.Event(), threading.Event()

    async def first() -> None:
        async with lock:
            held.set()
            await asyncio.to_thread(queued.wait)

    async def second() -> None:
        threading.Timer(LOOP_SLEEPS_AFTER_S, queued.set).start()
        async with lock:
            say("works")

    threading.Thread(target=reporting, args=[say, library.run, first()], daemon=True).start()
    held.wait()
    library.run(second())


def reporting(say: Say, fn: Callable[..., object], *args: object) -> None:
    try:
        fn(*args)
    except RuntimeError as error:
        say(type(error).__name__)


def outcome(mistake: Callable[[Library, Say], None], library: Library) -> str:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=reporting, args=[said.put, mistake, library, said.put], daemon=True).start()
    try:
        return said.get(timeout=HANGS_AFTER_S)
    except queue.Empty:
        return "hangs"


for mistake in (future_set_by_a_thread, wait_for_ones_own_loop, one_lock_for_two_loops):
    with_asyncio = outcome(mistake, Library(asyncio.run, asyncio_call))
    with_homeloop = outcome(mistake, Library(homeloop.run, homeloop_call))
    print(f"{mistake.__name__.replace('_', ' '):24} asyncio {with_asyncio}, homeloop: {with_homeloop}")
