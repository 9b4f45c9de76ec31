"""Rule 15: adaptive polling."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

import pytest

import homeloop
from homeloop.core.polling import FIRST_NS, POLL_MAX_NS, AdaptivePolling, default_poll_max_ns
from homeloop.errors import UsageError
from tests.core.bounded import LIMIT_S, in_plain_thread, until, usable

LONG_NS = 20_000_000        # a look that surely meets what comes at once


def test_rule15_grows_while_it_pays() -> None:
    """Waits that a longer look would have met: 4 us, then doubled, never above the maximum."""
    polling = AdaptivePolling(20_000)
    seen = []
    for _ in range(5):
        polling.learn(19_000)
        seen.append(polling.duration)
    assert seen == [FIRST_NS, 8_000, 16_000, 20_000, 20_000]


@pytest.mark.parametrize(("shrink", "left"), [(0, 0), (2, 8_000), (4, 4_000)])
def test_rule15_shrinks_when_it_does_not(shrink: int, left: int) -> None:
    """A wait that no allowed look meets: straight to 0, or divided by `shrink`."""
    polling = AdaptivePolling(20_000, 0, shrink)
    polling.duration = 16_000
    polling.learn(20_001)
    assert polling.duration == left


def test_rule15_keeps_what_was_long_enough() -> None:
    """Work that came within the look changes nothing."""
    polling = AdaptivePolling(20_000, grow=4)
    polling.duration = 16_000
    polling.learn(16_000)
    assert polling.duration == 16_000
    polling.learn(16_001)
    assert polling.duration == 20_000


def test_rule15_is_off_where_the_gil_is_on() -> None:
    """By default; poll_max_ns switches it on."""
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    assert default_poll_max_ns() == (0 if gil else POLL_MAX_NS)
    with homeloop.IOThread() as io:
        assert (io.context.statistics().polling is None) == gil
    with homeloop.IOThread(poll_max_ns=1000) as io:
        statistics = io.context.statistics().polling
        assert statistics is not None
        assert statistics.maximum_ns == 1000


def test_rule15_options_are_checked() -> None:
    """Negative values, and a loop of another make."""
    with pytest.raises(UsageError, match="negative"), homeloop.IOThread() as io:
        io.context.set_polling(-1)
    with pytest.raises(UsageError, match="adaptive polling"):
        homeloop.IOThread(loop_factory=asyncio.SelectorEventLoop, poll_max_ns=1).start()


def test_rule15_work_that_comes_while_it_looks_needs_no_kick() -> None:
    """A chain of posts from a thread: all run, and looks have found some of them without a sleep."""
    with homeloop.IOThread(poll_max_ns=LONG_NS) as io:
        here = threading.Semaphore(0)
        for _ in range(300):
            io.post(here.release)
            assert here.acquire(timeout=LIMIT_S)
        statistics = io.context.statistics()
        assert statistics.polling is not None
        assert statistics.polling.hits > 0
        assert statistics.kicks < 300


def test_rule15_timers_and_readers_are_met() -> None:
    """A look ends for a timer in time, and sees a file descriptor become readable."""
    async def sleeps() -> float:
        loop = asyncio.get_running_loop()
        start = loop.time()
        await asyncio.sleep(0.002)   # tidy: allow sleep: a timer is what the look must end for
        return loop.time() - start

    async def echoes() -> bytes:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(3))
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"abc")
            data = await reader.read()
            writer.close()
            await writer.wait_closed()
        return data

    with homeloop.IOThread(poll_max_ns=LONG_NS) as io:
        for _ in range(5):
            assert 0.002 <= io.call(sleeps(), LIMIT_S) < 1
            assert io.call(echoes(), LIMIT_S) == b"abc"


def test_rule15_a_look_of_the_main_loop_lets_the_big_lock_go() -> None:
    """While the main loop looks, a worker gets in; what it queues runs, though no kick is sent to who is awake.

        main loop                        worker
        looks, no sleep                  waits for the lock
        gives the lock away              call_soon(f), sees nobody asleep, lets go
        looks into its queue: f          ...
    """
    ran: list[Any] = []

    def worker(number: int) -> None:
        with rt.big_lock:
            rt.main.loop.call_soon(ran.append, number)
            rt.main.loop.call_later(0.0005, ran.append, number)

    with homeloop.Runtime() as rt:
        rt.main.set_polling(LONG_NS)
        for number in range(200):
            in_plain_thread(worker, number)
        usable(rt)
        until(lambda: len(ran) == 400, rt.main)
    assert sorted(ran) == sorted([*range(200)] * 2)
