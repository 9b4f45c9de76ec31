"""The behaviour that gave the project its reason, each beside the naive version that it replaces.

A behaviour is a function that takes the way of waking as its argument and returns what it saw. It is run with
homeloop's and must see the right thing; where that is cheap it is also run with the naive way, and must see the
wrong one: a test that cannot fail proves nothing.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import homeloop
from homeloop.errors import WrongThread
from tests.core.bounded import LIMIT_S, Plain, asleep, in_plain_thread, until, wait
from tests.core.naive import AlwaysScheduled, RunsWhereWoken, SaysWhenItSleeps, SetsAFuture

LINKS = 25_000
NAIVE_LIMIT_S = 0.05        # how long the naive version may stand in a deadlock that we know of


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    with homeloop.Runtime() as runtime:
        yield runtime


def home_ident(context: homeloop.AioContext) -> int:
    """The thread that runs the context."""
    async def ident() -> int:
        return threading.get_ident()

    return int(context.spawn(ident()).result(LIMIT_S))


def parked(co: homeloop.Coroutine[Any]) -> None:
    """Return once co is parked and its home sleeps."""
    until(lambda: co.state is homeloop.CoroutineState.PARKED, co)
    asleep(co.context)


# 1. A plain thread without the big lock, holding a mutex that the coroutine takes next


@dataclass
class MutexSeen:
    took_mutex: bool = False
    ran_on: int = 0


async def waits_then_locks(mutex: threading.Lock, seen: MutexSeen, park: Callable[[], Any], limit: float) -> None:
    await park()
    seen.ran_on = threading.get_ident()
    seen.took_mutex = mutex.acquire(timeout=limit)
    if seen.took_mutex:
        mutex.release()


def wake_holding(mutex: threading.Lock, wake: Callable[[], object]) -> int:
    with mutex:
        wake()
    return threading.get_ident()


def test_wake_from_a_plain_thread_that_holds_the_mutex_taken_next(rt: homeloop.Runtime) -> None:
    """The waker only schedules; the coroutine takes the mutex on the main thread, once the waker has let go.

        plain thread                    main thread
        ------------                    -----------
                                        1 await park()
        2 takes mutex
        3 co.wake(): queued
                                        4 runs; mutex.acquire() waits
        5 lets mutex go
                                        6 has it

    The naive version takes the plain thread for the main one: step 3 runs the coroutine right there, which takes a
    mutex that its own stack holds, and stands for ever (QEMU's connection thread, iotest 058).
    """
    mutex, seen = threading.Lock(), MutexSeen()
    co = rt.main.spawn(waits_then_locks(mutex, seen, homeloop.park, LIMIT_S))
    parked(co)
    waker = in_plain_thread(wake_holding, mutex, co.wake)
    co.result(LIMIT_S)
    assert seen.took_mutex
    assert seen.ran_on == home_ident(rt.main) != waker


def test_naive_wake_from_a_plain_thread_deadlocks() -> None:
    """The test above sees it: the naive waker runs the coroutine itself and cannot get its own mutex."""
    mutex, seen = threading.Lock(), MutexSeen()
    co = RunsWhereWoken(waits_then_locks(mutex, seen, RunsWhereWoken.park, NAIVE_LIMIT_S))
    waker = in_plain_thread(wake_holding, mutex, co.wake)
    assert not seen.took_mutex
    assert seen.ran_on == waker


def test_wake_while_the_main_thread_waits_for_the_waker(rt: homeloop.Runtime) -> None:
    """A wake never waits for the main thread, which here waits for the waker.

    The naive version takes the main context's lock in order to run the coroutine there, while the main thread holds it
    for the whole of its wait: neither goes on (mechanism A of QEMU's report).
    """
    woken = threading.Event()

    async def sleeper() -> int:
        await homeloop.park()
        return threading.get_ident()

    async def stands_in_the_way() -> int:
        waker = Plain(lambda: (co.wake(), woken.set()))
        wait(woken, rt.big_lock)                # blocks the main loop; holds the big lock
        waker.result()
        return threading.get_ident()

    co = rt.main.spawn(sleeper())
    parked(co)
    main = rt.main.spawn(stands_in_the_way()).result(LIMIT_S)
    assert co.result(LIMIT_S) == main


# 2. A worker that holds the big lock


@dataclass
class DirectSeen:
    run_when_woken: bool = False
    ran_on: int = 0
    context: Any = None
    loop: Any = None
    coroutine: Any = None
    settled_by: Any = None


async def waits_then_looks(seen: DirectSeen, queue: asyncio.Queue[str]) -> int:
    await homeloop.park()
    seen.ran_on = threading.get_ident()
    seen.context = homeloop.current_context()
    seen.loop = asyncio.get_running_loop()
    seen.coroutine = homeloop.current_coroutine()
    queue.put_nowait("from the worker")             # an object of the main loop, with a task waiting on it
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, "the main loop")
    seen.settled_by = await future
    return threading.get_ident()


def wake_under(lock: homeloop.BigLock, wake: Callable[[], object], seen: DirectSeen) -> int:
    with lock:
        wake()
        seen.run_when_woken = seen.ran_on != 0
    return threading.get_ident()


def see_direct(rt: homeloop.Runtime, way: Callable[[homeloop.Coroutine[Any]], Any]) -> tuple[DirectSeen, Any, int]:
    seen, queue = DirectSeen(), rt.call(made(asyncio.Queue))
    getter = rt.main.spawn(queue.get())
    co = rt.main.spawn(waits_then_looks(seen, queue))
    parked(co)
    waker = in_plain_thread(wake_under, rt.big_lock, way(co).wake, seen)
    assert co.result(LIMIT_S) == home_ident(rt.main)        # where it went on, whoever ran its first step
    assert seen.settled_by == "the main loop"
    assert getter.result(LIMIT_S) == "from the worker"
    return seen, co, waker


async def made(what: Callable[[], Any]) -> Any:
    return what()


def test_wake_from_a_worker_with_the_big_lock_runs_it_at_once_there(rt: homeloop.Runtime) -> None:
    """wake() returns when the coroutine has run: on the worker, in main, with the main loop and its asyncio objects.

    The naive version sends every wake from another thread through the loop: right, but it has not run when wake()
    returns, and it costs two thread switches.
    """
    seen, co, waker = see_direct(rt, lambda co: co)
    assert seen.run_when_woken
    assert seen.ran_on == waker != home_ident(rt.main)
    assert seen.context is rt.main
    assert seen.loop is rt.main.loop
    assert seen.coroutine is co


def test_naive_wake_under_the_big_lock_is_only_scheduled(rt: homeloop.Runtime) -> None:
    """The test above sees it: scheduled, it has not run when wake() returns, and runs elsewhere."""
    seen, _co, waker = see_direct(rt, AlwaysScheduled)
    assert not seen.run_when_woken
    assert seen.ran_on == home_ident(rt.main) != waker


def test_main_objects_are_refused_without_the_big_lock(rt: homeloop.Runtime) -> None:
    """What the worker may do under the big lock, a plain thread is refused; the naive version lets it, and hangs."""
    future = rt.call(made(rt.main.loop.create_future))
    with pytest.raises(WrongThread):
        in_plain_thread(future.set_result, None)
    assert not future.done()
    with rt.big_lock:
        future.set_result("mine")
    assert rt.call(awaited(future)) == "mine"


async def awaited(thing: Any) -> Any:
    return await thing


# 3. big_lock=False


def test_wake_without_a_big_lock_is_always_scheduled() -> None:
    """Nobody but the main thread runs it, whatever the waker believes to hold.

    The naive version answers "held" in every thread where there is no big lock (QEMU's old stub): the waker then runs
    the coroutine itself, on the wrong thread.
    """
    idents: list[int] = []

    async def sleeper() -> None:
        for _ in range(3):
            await homeloop.park()
            idents.append(threading.get_ident())

    def waker() -> int:
        assert not rt.big_lock.held()
        for woken in range(3):
            parked(co)
            assert len(idents) == woken
            assert co.wake()
        return threading.get_ident()

    with homeloop.Runtime(big_lock=False) as rt:
        co = rt.main.spawn(sleeper())
        ident = in_plain_thread(waker)
        co.result(LIMIT_S)
        assert idents == [home_ident(rt.main)] * 3
        assert ident not in idents
        assert rt.main.statistics().entered == 0


# 4. A plain thread enters a fresh coroutine and ends


@pytest.mark.parametrize("big_lock", [True, False])
def test_plain_thread_enters_a_fresh_coroutine_and_ends(big_lock: bool) -> None:
    """Nothing has run; poll(True) is True and has run it on the main thread; poll(False) is then False.

    The naive version runs it in the thread that enters it, or, scheduled, reports the bare notification as progress and
    a second poll as well.
    """
    ran_on: list[int] = []

    async def fresh() -> None:
        ran_on.append(threading.get_ident())
        assert homeloop.current_context() is rt.main

    async def main() -> tuple[list[bool], int]:
        polls_left = 100
        while rt.main.poll(False):                  # what starting up has left
            polls_left -= 1
            assert polls_left, "poll(False) never says that there is nothing to do"
        in_plain_thread(lambda: rt.main.enter(fresh()))
        assert ran_on == []
        return [rt.main.poll(True), bool(ran_on), rt.main.poll(False)], threading.get_ident()

    rt = homeloop.Runtime(big_lock=big_lock)
    polls, ident = rt.run(main())
    assert polls == [True, True, False]
    assert ran_on == [ident]


def test_naive_enter_runs_it_in_the_entering_thread() -> None:
    """The test above sees it: entered naively, the coroutine has run before anybody polled."""
    ran_on: list[int] = []

    async def fresh() -> None:
        ran_on.append(threading.get_ident())

    plain = Plain(RunsWhereWoken, fresh())
    plain.result()
    assert ran_on == [plain.ident]


# 5. Wakes from an IOThread, from the same context, before the park, twice, after the end


def test_wake_from_an_iothread_runs_it_at_home(rt: homeloop.Runtime) -> None:
    """In both directions: each runs on its own thread, never on the waker's.

    The naive version sets the other loop's future: it is done, its waiter sleeps on.
    """
    async def sleeper() -> int:
        await homeloop.park()
        return threading.get_ident()

    async def wake(co: homeloop.Coroutine[int]) -> tuple[bool, int]:
        return co.wake(), threading.get_ident()

    with homeloop.IOThread() as io:
        for target, source in ((rt.main, io.context), (io.context, rt.main)):
            co = target.spawn(sleeper())
            parked(co)
            woken, waker = source.spawn(wake(co)).result(LIMIT_S)
            assert woken
            assert co.result(LIMIT_S) == home_ident(target) != waker


def test_naive_future_set_from_elsewhere_does_not_wake() -> None:
    """The test above sees it: asyncio's own future, set from a plain thread, leaves a sleeping loop asleep."""
    selector = SaysWhenItSleeps()
    loop = asyncio.SelectorEventLoop(selector)
    thread = Plain(loop.run_forever)

    async def look_again() -> None:
        selector.sleeping.clear()

    try:
        naive = SetsAFuture()
        parking = asyncio.run_coroutine_threadsafe(naive.park(), loop)
        until(lambda: naive.waiter is not None)
        asyncio.run_coroutine_threadsafe(look_again(), loop).result(LIMIT_S)
        wait(selector.sleeping)
        in_plain_thread(naive.wake)
        assert naive.waiter is not None
        assert naive.waiter.done()
        assert not parking.done()                   # until something else wakes the loop:
        loop.call_soon_threadsafe(lambda: None)
        parking.result(LIMIT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.result()
        loop.close()


def test_wake_from_the_same_context_runs_after_the_waker_parks(rt: homeloop.Runtime) -> None:
    """The waker goes on undisturbed; the woken one runs once it parks, before the waker is asked again.

    The naive version runs it inside wake(), in the middle of the waker's step.
    """
    assert rt.call(wake_from_same(rt.main.spawn, homeloop.park)) == ["waker", "waker parks", "woken"]


async def wake_from_same(start: Callable[[Any], Any], park: Callable[[], Any]) -> list[str]:
    log: list[str] = []

    async def sleeper() -> None:
        await park()
        log.append("woken")

    async def waker() -> None:
        co.wake()
        log.append("waker")
        log.append("waker parks")
        await park()

    co = start(sleeper())
    await asyncio.sleep(0)
    other = start(waker())
    await asyncio.sleep(0)
    other.wake()
    return log


def test_naive_wake_from_the_same_context_interrupts_the_waker() -> None:
    """The test above sees it."""
    log = asyncio.run(wake_from_same(RunsWhereWoken, RunsWhereWoken.park))
    assert log == ["woken", "waker", "waker parks"]


async def chain(links: int, start: Callable[[Any], Any], park: Callable[[], Any]) -> tuple[int, int]:
    """Each link wakes the next; returns how many ran, and how much deeper the deepest stood than the first."""
    depths: list[int] = []
    cos: list[Any] = []

    async def link(number: int) -> None:
        await park()
        depths.append(stack_depth())
        if number + 1 < links:
            cos[number + 1].wake()

    cos += [start(link(number)) for number in range(links)]
    await asyncio.sleep(0)
    cos[0].wake()
    await asyncio.sleep(0)
    return len(depths), max(depths) - depths[0]


def stack_depth() -> int:
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth


def test_wake_chain_of_25000_links_has_a_constant_stack(rt: homeloop.Runtime) -> None:
    """Every link runs, the last no deeper than the first; the naive version nests a frame or more for each."""
    co = rt.main.spawn(chain(LINKS, rt.main.spawn, homeloop.park))
    assert co.result(LIMIT_S) == (LINKS, 0)


def test_naive_wake_chain_exhausts_the_stack() -> None:
    """The test above sees it: the naive chain grows with each link, and ends in a RecursionError."""
    ran, deeper = asyncio.run(chain(50, RunsWhereWoken, RunsWhereWoken.park))
    assert ran == 50
    assert deeper >= 49
    with pytest.raises(RecursionError):
        asyncio.run(chain(5 * sys.getrecursionlimit(), RunsWhereWoken, RunsWhereWoken.park))


def test_wake_before_the_park_is_remembered(rt: homeloop.Runtime) -> None:
    """A wake that comes while the coroutine still runs lets its next park return at once.

        plain thread                    main thread
        ------------                    -----------
                                        1 runs, looks, decides to park
        2 co.wake(): True
                                        3 await park(): returns at once

    The naive version, a future made by the park, loses step 2 and sleeps for ever.
    """
    running, woken = threading.Event(), threading.Event()

    async def late() -> str:
        running.set()
        wait(woken)
        await homeloop.park()
        return "went on"

    co = rt.main.spawn(late())
    wait(running)
    assert in_plain_thread(co.wake) is True
    woken.set()
    assert co.result(LIMIT_S) == "went on"


def test_naive_wake_before_the_park_is_lost() -> None:
    """The test above sees it: the future that the park makes after the wake is never set."""
    async def main() -> bool:
        loop = asyncio.get_running_loop()
        naive = SetsAFuture()
        naive.wake()
        parking = loop.create_task(naive.park())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        lost = not parking.done()
        parking.cancel()
        return lost

    assert asyncio.run(main())


async def nothing() -> None:
    pass


def test_wake_twice_counts_once(rt: homeloop.Runtime) -> None:
    """The second wake before one park returns False, and the park after that one waits.

    The naive version queues both, and runs the coroutine out of a park that nobody woke; or, with a future, raises
    InvalidStateError in the second waker.
    """
    running, woken = threading.Event(), threading.Event()
    parks: list[int] = []

    async def twice() -> None:
        running.set()
        wait(woken)
        for number in range(2):
            await homeloop.park()
            parks.append(number)

    co = rt.main.spawn(twice())
    wait(running)
    assert [in_plain_thread(co.wake), in_plain_thread(co.wake)] == [True, False]
    woken.set()
    parked(co)                                          # in its second park
    assert parks == [0]
    assert co.wake() is True
    co.result(LIMIT_S)
    assert parks == [0, 1]


def test_naive_second_wake_runs_it_out_of_a_park_that_nobody_woke() -> None:
    """The test above sees it: each of the naive wakes steps the coroutine once, or fails in the waker."""
    parks: list[int] = []

    async def twice() -> None:
        for number in range(2):
            await RunsWhereWoken.park()
            parks.append(number)

    co = RunsWhereWoken(twice())
    co.wake()
    co.wake()
    assert parks == [0, 1]

    async def main() -> None:
        naive = SetsAFuture()
        parking = asyncio.ensure_future(naive.park())
        await asyncio.sleep(0)
        naive.wake()
        with pytest.raises(asyncio.InvalidStateError):
            naive.wake()
        await parking

    asyncio.run(main())


def test_wake_after_the_end_is_refused(rt: homeloop.Runtime) -> None:
    """False, from every kind of thread, and nothing happens; the naive version resumes what has ended and raises."""
    co = rt.main.spawn(nothing())
    co.result(LIMIT_S)
    before = rt.main.statistics()

    async def from_home() -> bool:
        return co.wake()

    def under_lock() -> bool:
        with rt.big_lock:
            return co.wake()

    with homeloop.IOThread() as io:
        answers = [
            in_plain_thread(co.wake),
            in_plain_thread(co.schedule),
            in_plain_thread(under_lock),
            io.spawn(from_home()).result(LIMIT_S),
            rt.main.spawn(from_home()).result(LIMIT_S),
        ]
    assert answers == [False] * 5
    assert co.done()
    assert rt.main.statistics().entered == before.entered

    finished = nothing()
    with pytest.raises(StopIteration):
        finished.send(None)
    with pytest.raises(RuntimeError, match="cannot reuse"):      # what the naive waker meets
        finished.send(None)


# 6. The four rows; None never matches None


def test_the_four_rows(rt: homeloop.Runtime) -> None:
    """Rule 1's table: main home, IOThread, pool worker and plain thread, without and with the big lock.

    The naive version answers "main" wherever no context was set (QEMU before June 2021): the third and fourth row
    without the lock. tests/core/test_current.py has the rest of rule 1.
    """
    def row() -> tuple[Any, Any]:
        with rt.big_lock:
            held = homeloop.current_context()
        return homeloop.current_context(), held

    def home_row() -> tuple[Any, Any]:
        held = homeloop.current_context()
        with rt.big_lock.released():
            return homeloop.current_context(), held

    async def worker_row() -> Any:
        return await homeloop.to_worker(row)

    with homeloop.IOThread() as io:
        rows = [
            rt.main.spawn(made(home_row)).result(LIMIT_S),
            io.spawn(made(row)).result(LIMIT_S),
            rt.main.spawn(worker_row()).result(LIMIT_S),
            in_plain_thread(row),
        ]
        assert rows == [(rt.main, rt.main), (io.context, io.context), (None, rt.main), (None, rt.main)]


def test_none_never_matches_none(rt: homeloop.Runtime) -> None:
    """A coroutine that one thread without a context makes and another wakes runs at its home, on neither.

    The naive version stamps it with the maker's current context, None, and finds it equal to the waker's.
    """
    async def where() -> list[int]:
        idents = [threading.get_ident()]
        await homeloop.park()
        return [*idents, threading.get_ident()]

    co = in_plain_thread(lambda: rt.main.create(where()))
    assert in_plain_thread(co.wake)
    parked(co)
    assert in_plain_thread(co.wake)
    assert co.result(LIMIT_S) == [home_ident(rt.main)] * 2
