"""At home, and entitled to run code there, are two things: rules 2, 5, 8 and 9 where they part."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed, WouldDeadlock
from tests.core.bounded import LIMIT_S, Plain, asleep, holding, in_plain_thread, returned, until, wait


def test_rule2_a_wait_inside_released_leaves_the_lock_with_its_holder() -> None:
    """The main home, inside released(), waits while a worker holds the lock.

        home                             worker
        released()                       takes the lock
        io.call(): serves main, so
        it waits for the lock            ... its block goes on undisturbed, then lets go
        the call returns, lock away
    """
    async def main() -> list[Any]:
        lock, seen = homeloop.big_lock(), []
        with homeloop.IOThread() as io:
            with lock.released():
                with holding(lock):
                    release = io.spawn(returned(lambda: 1))
                    until(release.done)
                seen.append(io.call(returned(lambda: 2), LIMIT_S))
                seen.append(lock.held())
            seen.append(lock.held())
        return seen

    assert homeloop.run(main()) == [2, False, True]


def test_rule5_a_wake_inside_released_does_not_run_here() -> None:
    """The home without the lock is not entitled: the wake is queued, as from any worker without it."""
    ran: list[bool] = []

    async def parks() -> None:
        await homeloop.park()
        ran.append(homeloop.big_lock().held())

    async def main() -> None:
        co = homeloop.main_context().spawn(parks())
        await asyncio.sleep(0)
        with homeloop.big_lock().released():
            assert co.wake()
            assert not ran
        await co

    homeloop.run(main())
    assert ran == [True]


@pytest.mark.parametrize("act", ["wake", "cancel"])
def test_rule4_from_a_signal_handler_while_the_home_sleeps(act: str) -> None:
    """The handler runs on the home thread, inside its sleep: the sleep ends, and nothing runs in the handler."""
    handled = threading.Event()
    inside: list[bool] = []
    ran_inside: list[bool] = []

    def handler(_signum: int, _frame: Any) -> None:
        handled.set()
        inside.append(True)
        getattr(co, act)()
        inside.clear()

    async def parks() -> str:
        try:
            await homeloop.park()
        except asyncio.CancelledError:
            return "cancelled"
        finally:
            ran_inside.append(bool(inside))
        return "woken"

    async def main() -> str:
        nonlocal co
        co = homeloop.main_context().spawn(parks())
        sender = Plain(sends, homeloop.main_context(), threading.get_ident())
        answer = str(await co)
        await homeloop.to_worker(sender.result)
        return answer

    def sends(main: homeloop.AioContext, home: int) -> None:
        asleep(main)
        while not handled.is_set():     # CPython may miss one that comes just before the sleep
            signal.pthread_kill(home, signal.SIGUSR1)
            handled.wait(0.01)

    co: Any = None
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        assert homeloop.run(main()) == ("woken" if act == "wake" else "cancelled")
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert ran_inside == [False]


def test_rule8_a_guard_around_an_await_in_a_driven_coroutine() -> None:
    """It begins in the caller's thread and ends at home; the caller's own guard is still his."""
    async def guarded() -> int:
        with homeloop.big_lock():
            await asyncio.sleep(0.001)      # tidy: allow sleep: a timer moves the coroutine to its home
        return 1

    with homeloop.Runtime() as rt:
        assert rt.call(guarded(), LIMIT_S) == 1
        with rt.big_lock:
            assert rt.call(guarded(), LIMIT_S) == 1
            assert rt.big_lock.held()
        assert not rt.big_lock.held()


def test_rule8_a_timer_that_is_left_by_who_polled_beside_the_sleeping_home() -> None:
    """A worker polls for one timer and leaves a later one: the home learns of it."""
    fired = threading.Event()
    first: list[int] = []
    with homeloop.Runtime() as rt:
        asleep(rt.main)
        with rt.big_lock:
            rt.main.loop.call_later(0.002, first.append, 1)
            rt.main.loop.call_later(0.02, fired.set)
            while not first:
                rt.main.poll(True)
        wait(fired, rt.main)


def test_rule9_a_call_that_comes_after_the_end_is_refused() -> None:
    """It waited for the lock while the runtime ended: ContextClosed, its coroutine never ran. So is acquire()."""
    rt = homeloop.Runtime()
    ran: list[int] = []
    with rt:
        lock = rt.big_lock
    with pytest.raises(ContextClosed):
        rt.call(returned(ran.append, 1))
    with pytest.raises(ContextClosed):
        lock.acquire()
    assert not lock.held()
    assert not ran


@pytest.mark.parametrize("kind", ["the lock is held", "the coroutine spins"])
def test_rule9_the_timeout_counts_all_of_a_call(kind: str) -> None:
    """The wait for the big lock, and the part that the caller drives."""
    async def spins() -> None:
        while not end.is_set():         # noqa: ASYNC110    it spins on purpose
            await asyncio.sleep(0)

    end = threading.Event()
    with homeloop.Runtime() as rt:
        start = time.monotonic()
        if kind == "the coroutine spins":
            with pytest.raises(TimeoutError):
                rt.call(spins(), timeout=0.05)
        else:
            with holding(rt.big_lock), pytest.raises(TimeoutError):
                in_plain_thread(lambda: rt.call(returned(lambda: 1), timeout=0.05))
        assert time.monotonic() - start < LIMIT_S
        end.set()


def test_rule4_a_cancellation_taken_back_is_no_wake() -> None:
    """cancel(), then uncancel() before the next step: the park goes on."""
    async def parks() -> str:
        await homeloop.park()
        return "woken"

    async def main() -> list[Any]:
        co = homeloop.main_context().spawn(parks())
        await asyncio.sleep(0)
        co.cancel()
        co.uncancel()
        for _ in range(3):
            await asyncio.sleep(0)
        seen: list[Any] = [co.done()]
        co.wake()
        seen.append(await co)
        return seen

    assert homeloop.run(main()) == [False, "woken"]


def test_rule11_waits_that_time_out_and_looks_at_an_error_leave_nothing_behind() -> None:
    """result() in a loop with time-outs registers nothing for ever; an exception does not grow with each look."""
    async def fails() -> None:
        raise ValueError("once")

    async def parks() -> None:
        await homeloop.park()

    with homeloop.Runtime() as rt:
        co = rt.main.spawn(parks())
        for _ in range(5):
            with pytest.raises(TimeoutError):
                co.result(0.0)
        assert not co._callbacks
        co.cancel()
        failed = rt.main.spawn(fails())
        depths = []
        for _ in range(3):
            with pytest.raises(ValueError, match="once") as caught:
                failed.result(LIMIT_S)
            depths.append(len(caught.traceback))
        assert len(set(depths)) == 1, depths


def test_rule14_a_worker_of_a_thread_cannot_wait_for_its_end() -> None:
    """`await to_worker(io.stop)` in io's own coroutine: refused, and the thread goes on."""
    async def stops() -> None:
        await homeloop.to_worker(io.stop)

    with homeloop.IOThread() as io:
        with pytest.raises(WouldDeadlock, match="worker"):
            io.call(stops(), LIMIT_S)
        assert io.call(returned(lambda: 1), LIMIT_S) == 1


def test_rule9_an_error_is_reported_although_somebody_was_told_of_the_end() -> None:
    """A done callback looks at nothing: what nobody retrieved goes to the exception handler."""
    async def fails() -> None:
        raise ValueError("lost")

    reports: list[Any] = []
    with homeloop.Runtime() as rt:
        with rt.big_lock:
            rt.main.loop.set_exception_handler(lambda _loop, what: reports.append(what["exception"]))
        co = rt.main.spawn(fails())
        ended = threading.Event()
        co.add_done_callback(lambda _co: ended.set())
        wait(ended, rt.main)
        in_plain_thread(asleep, rt.main)
        del co
        gc.collect()
        until(lambda: reports, rt.main)
    assert [str(report) for report in reports] == ["lost"]
