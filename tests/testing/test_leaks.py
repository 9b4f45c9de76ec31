"""leak_check() sees each kind of leak, and nothing where all was ended."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

import homeloop
from homeloop.testing.leaks import leak_check

SOON_S = 0.05


async def parks() -> None:
    await homeloop.park("left behind")


def test_nothing_left() -> None:
    with leak_check():
        with homeloop.Runtime() as rt, homeloop.IOThread() as io:
            io.spawn(parks())
            assert rt.call(homeloop.to_worker(os.getpid)) == os.getpid()
        homeloop.run(asyncio.sleep(0))


def test_what_ends_late_is_no_leak() -> None:
    go_on = threading.Event()
    with leak_check():
        thread = threading.Thread(target=go_on.wait, args=(10,))
        thread.start()
        threading.Timer(0.02, go_on.set).start()


def test_a_thread() -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait, args=(10,), name="the forgotten")
    with pytest.raises(AssertionError, match="thread 'the forgotten'"), leak_check(within_s=SOON_S):
        thread.start()
    go_on.set()
    thread.join()


def test_a_file_descriptor() -> None:
    fd = -1
    with pytest.raises(AssertionError, match=f"file descriptor .*{os.path.basename(os.devnull)}"):
        with leak_check(within_s=SOON_S):
            fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)


def test_a_coroutine_of_a_context_that_goes_on() -> None:
    with homeloop.IOThread() as io:
        with pytest.raises(AssertionError, match="parked \\(left behind\\)"), leak_check(within_s=SOON_S):
            co = io.spawn(parks(), name="forgotten")
        co.cancel()


def test_a_task_of_a_context_that_goes_on() -> None:
    async def starts() -> asyncio.Task[bool]:
        return asyncio.create_task(asyncio.Event().wait(), name="forgotten task")

    with homeloop.IOThread() as io:
        with pytest.raises(AssertionError, match="forgotten task"), leak_check(within_s=SOON_S):
            task = io.call(starts())
        io.post(task.cancel)


def test_a_context() -> None:
    with pytest.raises(AssertionError, match="context <AioContext runtime-"):
        with leak_check(within_s=SOON_S):
            loop = homeloop.new_event_loop()
    loop.close()


def test_the_blocks_own_error_comes_first() -> None:
    with pytest.raises(LookupError), leak_check():
        raise LookupError
