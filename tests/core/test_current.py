"""Rule 1: which context a thread is in. None is an answer, equals no context, and is nobody's home."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import NoRuntime, WrongState
from tests.core.bounded import LIMIT_S, Plain, in_plain_thread, until

Seen = tuple[Any, bool, Any]


def look(lock: homeloop.BigLock) -> Seen:
    """The current context, is the big lock held, and the loop that asyncio sees."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    return homeloop.current_context(), lock.held(), loop


def look_without_and_with(lock: homeloop.BigLock) -> tuple[Seen, Seen, Seen]:
    """For a thread that does not hold it: without, with, and without again."""
    before = look(lock)
    with lock:
        inside = look(lock)
    return before, inside, look(lock)


def look_with_and_without(lock: homeloop.BigLock) -> tuple[Seen, Seen]:
    """For a home of the main context, which holds it."""
    with lock.released():
        without = look(lock)
    return look(lock), without


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    with homeloop.Runtime() as runtime:
        yield runtime


async def returned(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)


# The four rows


def test_rule1_row_home_of_the_main_context(rt: homeloop.Runtime) -> None:
    """It is in main with the big lock and, inside released(), without it."""
    inside, without = rt.main.spawn(returned(look_with_and_without, rt.big_lock)).result(LIMIT_S)
    assert inside == (rt.main, True, rt.main.loop)
    assert without[:2] == (rt.main, False)


def test_rule1_row_iothread(rt: homeloop.Runtime) -> None:
    """It is in its own context, whether it holds the big lock or not; so is asyncio."""
    with homeloop.IOThread() as io:
        before, inside, after = io.spawn(returned(look_without_and_with, rt.big_lock)).result(LIMIT_S)
        own, loop = io.context, io.context.loop
    assert before == after == (own, False, loop)
    assert inside == (own, True, loop)


def test_rule1_row_plain_thread(rt: homeloop.Runtime) -> None:
    """It is nowhere; while it holds the big lock it is in main, and asyncio's loop is the main loop."""
    before, inside, after = in_plain_thread(look_without_and_with, rt.big_lock)
    assert before == after == (None, False, None)
    assert inside == (rt.main, True, rt.main.loop)


@pytest.mark.parametrize("at", ["main", "iothread"])
def test_rule1_row_worker_of_a_pool(rt: homeloop.Runtime, at: str) -> None:
    """A worker is a plain thread, whosever worker it is; it has not its context's context."""
    async def hop() -> Any:
        return await homeloop.to_worker(look_without_and_with, rt.big_lock)

    with homeloop.IOThread() as io:
        context = rt.main if at == "main" else io.context
        before, inside, after = context.spawn(hop()).result(LIMIT_S)
    assert before == after == (None, False, None)
    assert inside == (rt.main, True, rt.main.loop)


def test_rule1_without_a_big_lock_only_homes_are_anywhere() -> None:
    """big_lock=False: plain threads are nowhere, and a refused acquire() does not change that."""
    def refused(lock: homeloop.BigLock) -> tuple[Seen, Seen]:
        before = look(lock)
        with pytest.raises(RuntimeError):
            lock.acquire()
        with pytest.raises(RuntimeError):
            with lock:
                pass
        return before, look(lock)

    with homeloop.Runtime(big_lock=False) as rt:
        assert rt.main.spawn(returned(look, rt.big_lock)).result(LIMIT_S) == (rt.main, False, rt.main.loop)
        assert in_plain_thread(refused, rt.big_lock) == ((None, False, None), (None, False, None))


# None is nobody's home


def test_rule1_none_matches_none_nowhere(rt: homeloop.Runtime) -> None:
    """Two threads without a context are not in the same one: what one makes, the other does not run.

    The naive version stamps a coroutine with the maker's current context, None; the waker, in None too, then finds
    the two equal and runs it on its own thread.
    """
    async def where() -> int:
        await homeloop.park()
        return threading.get_ident()

    assert homeloop.current_context() is None
    co = rt.main.create(where())                    # made in one thread without a context
    assert co.context is rt.main
    assert in_plain_thread(co.wake) is True         # started from another
    assert in_plain_thread(co.wake) in (True, False)
    home = rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S)
    assert co.result(LIMIT_S) == home
    assert homeloop.current_context() is None


def test_rule1_none_is_current_for_no_context(rt: homeloop.Runtime) -> None:
    """In a plain thread is_current() is False for every context, also those that have no home thread now."""
    idle = homeloop.Runtime(name="idle")
    try:
        with homeloop.IOThread() as io:
            contexts = [rt.main, io.context, idle.main]
            assert in_plain_thread(lambda: [c.is_current() for c in contexts]) == [False, False, False]
    finally:
        idle.close()


def test_rule1_none_cannot_park_and_has_no_coroutine(rt: homeloop.Runtime) -> None:
    """Outside every context there is no current coroutine, and park() is refused by name."""
    parked = homeloop.park()
    with pytest.raises(WrongState, match="park"):
        parked.send(None)
    assert homeloop.current_coroutine() is None
    with pytest.raises(NoRuntime):
        homeloop.AioContext.of()


# Precedence, and what changes it


def test_rule1_own_context_comes_before_the_big_lock(rt: homeloop.Runtime) -> None:
    """An IOThread that holds the big lock is not main's home: what it wakes there is scheduled, not run here."""
    ran = threading.Event()

    async def sleeper() -> int:
        await homeloop.park()
        ran.set()
        return threading.get_ident()

    async def waker() -> tuple[bool, int]:
        with rt.big_lock:
            woken = co.wake()
            assert not ran.is_set()
            return woken, threading.get_ident()

    co = rt.main.spawn(sleeper())
    with homeloop.IOThread() as io:
        woken, waker_ident = io.spawn(waker()).result(LIMIT_S)
    assert woken
    assert co.result(LIMIT_S) != waker_ident


def test_rule1_home_of_one_runtime_holds_the_lock_of_another(rt: homeloop.Runtime) -> None:
    """The thread's own context comes first, also before another runtime's big lock."""
    with homeloop.Runtime(name="other") as other:
        before, inside, after = rt.main.spawn(returned(look_without_and_with, other.big_lock)).result(LIMIT_S)
    assert before == after == (rt.main, False, rt.main.loop)
    assert inside == (rt.main, True, rt.main.loop)


@pytest.mark.parametrize("first_out", ["first in", "last in"])
def test_rule1_locks_of_two_runtimes_are_let_go_in_any_order(rt: homeloop.Runtime, first_out: str) -> None:
    """A thread that held two big locks is in the context of the one it still holds; then it is nowhere."""
    def take_both(first: homeloop.BigLock, second: homeloop.BigLock) -> list[Any]:
        seen: list[Any] = []
        for lock in (first, second):
            assert lock.acquire(LIMIT_S)
        seen.append(homeloop.current_context())
        order = (first, second) if first_out == "first in" else (second, first)
        for lock in order:
            lock.release()
            seen.append(homeloop.current_context())
        seen.append(look(first))
        return seen

    with homeloop.Runtime(name="other") as other:
        both, one, none, end = in_plain_thread(take_both, rt.big_lock, other.big_lock)
        assert both in (rt.main, other.main)
        assert one is (other.main if first_out == "first in" else rt.main)
        assert none is None
        assert end == (None, False, None)


def test_rule1_a_waiter_of_a_condition_is_nowhere(rt: homeloop.Runtime) -> None:
    """current_context() follows the lock away and back while a thread waits on condition()."""
    condition = rt.big_lock.condition()
    seen: list[Any] = []

    def waiter() -> None:
        with rt.big_lock:
            seen.append(homeloop.current_context())
            assert condition.wait(LIMIT_S)
            seen.append(homeloop.current_context())
        seen.append(homeloop.current_context())

    def notify() -> bool:
        with rt.big_lock:           # with the lock in our hands, a waiter that came this far is in wait()
            condition.notify()
            return bool(seen)

    thread = Plain(waiter)
    until(notify, rt.big_lock)
    thread.result()
    assert seen == [rt.main, rt.main, None]


def test_rule1_a_home_serves_one_context_only(rt: homeloop.Runtime) -> None:
    """The first answer never changes while the thread serves: it cannot host a second context meanwhile."""
    async def host_another() -> Any:
        here = homeloop.current_context()
        other = homeloop.Runtime(name="other")
        with pytest.raises(RuntimeError):
            other.run(returned(lambda: None))
        other_loop = homeloop.new_event_loop()
        with pytest.raises(RuntimeError):
            other_loop.run_forever()
        assert homeloop.current_context() is here
        return here, other, other_loop

    here, other, other_loop = rt.main.spawn(host_another()).result(LIMIT_S)
    assert here is rt.main
    other_loop.close()
    other.close()


def test_rule1_serving_ends_with_the_context() -> None:
    """The thread that hosted a runtime is nowhere again afterwards, and may host the next."""
    for _ in range(2):
        seen = homeloop.run(returned(homeloop.current_context))
        assert seen is not None
        assert seen.closed
        assert homeloop.current_context() is None


def test_rule1_worker_holds_through_an_await_free_nest(rt: homeloop.Runtime) -> None:
    """Nested guards change nothing; only the outermost one brings the answer and takes it away."""
    def nest() -> list[Any]:
        lock, seen = rt.big_lock, [homeloop.current_context()]
        with lock:
            with lock:
                seen.append(homeloop.current_context())
            seen.append(homeloop.current_context())
        seen.append(homeloop.current_context())
        return seen

    assert in_plain_thread(nest) == [None, rt.main, rt.main, None]


def test_rule1_an_adopted_loop_is_current_while_it_runs() -> None:
    """A foreign loop's thread is in the adopted context inside that loop, and nowhere outside."""
    async def adopt() -> tuple[Any, Any]:
        return homeloop.AioContext.of(), homeloop.current_context()

    adopted, current = asyncio.run(adopt())
    assert adopted is current
    assert homeloop.current_context() is None


# Which runtime is meant


def test_main_context_is_of_this_threads_runtime_else_the_only_one(rt: homeloop.Runtime) -> None:
    """main_context() and big_lock(): of the thread's runtime, else of the only one, else NoRuntime."""
    def both() -> tuple[Any, Any]:
        return homeloop.main_context(), homeloop.big_lock()

    def both_under(lock: homeloop.BigLock) -> tuple[Any, Any]:
        with lock:
            return both()

    assert in_plain_thread(both) == (rt.main, rt.big_lock)
    with homeloop.Runtime(name="other") as other:
        with pytest.raises(NoRuntime, match="2 runtimes"):
            in_plain_thread(both)
        assert rt.main.spawn(returned(both)).result(LIMIT_S) == (rt.main, rt.big_lock)
        assert other.main.spawn(returned(both)).result(LIMIT_S) == (other.main, other.big_lock)
        assert in_plain_thread(both_under, other.big_lock) == (other.main, other.big_lock)


def test_main_context_without_a_runtime() -> None:
    """No runtime is open: NoRuntime, which says how to get one."""
    with pytest.raises(NoRuntime, match=r"homeloop\.run"):
        homeloop.main_context()
    with pytest.raises(NoRuntime):
        homeloop.big_lock()
