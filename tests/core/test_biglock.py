"""The big lock: who holds it is the main context's home, and who gets it next. Rules 2, 5, 6 and 8."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

import homeloop
from homeloop.errors import WrongThread
from tests.core.bounded import (
    LIMIT_S,
    STRESS_S,
    Plain,
    acquired,
    asleep,
    holding,
    in_plain_thread,
    returned,
    until,
    usable,
    wait,
    waiting,
)


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    with homeloop.Runtime() as runtime:
        yield runtime


class NeverIdle:
    """A main loop that always has something ready, and counts its iterations."""

    def __init__(self, rt: homeloop.Runtime) -> None:
        self.context = rt.main
        self._lock = rt.big_lock
        self.turns = 0
        self.turns_with_waiters = 0     # in which somebody waited for the lock
        self._stop = False

    def __enter__(self) -> NeverIdle:
        self.context.post(self._turn)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True

    def _turn(self) -> None:
        self.turns += 1
        self.turns_with_waiters += waiting(self._lock) > 0
        if not self._stop:
            self.context.loop.call_soon(self._turn)


# Strict and guard


def test_rule8_acquire_is_strict(rt: homeloop.Runtime) -> None:
    """A second acquire() raises and changes nothing: one release() lets go."""
    def twice() -> None:
        lock = rt.big_lock
        assert lock.acquire() is True
        with pytest.raises(RuntimeError, match="already"):
            lock.acquire()
        assert lock.held()
        lock.release()
        assert not lock.held()

    in_plain_thread(twice)
    usable(rt)


def test_rule8_acquire_at_home_is_refused(rt: homeloop.Runtime) -> None:
    """The home of the main context holds it whenever it runs code."""
    def strict() -> None:
        assert rt.big_lock.held()
        with pytest.raises(RuntimeError):
            rt.big_lock.acquire()

    rt.main.spawn(returned(strict)).result(LIMIT_S)
    usable(rt)


def test_rule8_release_by_another_thread_is_refused(rt: homeloop.Runtime) -> None:
    """WrongThread, and the holder still holds it."""
    with holding(rt.big_lock):
        with pytest.raises(WrongThread):
            rt.big_lock.release()
        assert rt.big_lock.acquire(0) is False
    with pytest.raises(WrongThread):
        rt.big_lock.release()
    usable(rt)


def test_rule8_guard_locks_only_if_needed_and_unlocks_what_it_locked(rt: homeloop.Runtime) -> None:
    """Nested in a guard, in acquire() and at home, a guard changes nothing."""
    def nest() -> list[bool]:
        lock, seen = rt.big_lock, []
        with lock as bound:
            assert bound is lock
            with lock:
                seen.append(lock.held())
            seen.append(lock.held())
        seen.append(lock.held())
        lock.acquire()
        with lock:
            pass
        seen.append(lock.held())
        lock.release()
        return [*seen, lock.held()]

    def at_home() -> bool:
        with rt.big_lock:
            pass
        return rt.big_lock.held()

    assert in_plain_thread(nest) == [True, True, False, True, False]
    assert rt.main.spawn(returned(at_home)).result(LIMIT_S) is True
    usable(rt)


def test_rule8_guard_lets_go_when_the_block_raises(rt: homeloop.Runtime) -> None:
    def fails() -> bool:
        with pytest.raises(ZeroDivisionError):
            with rt.big_lock, rt.big_lock:
                raise ZeroDivisionError
        return rt.big_lock.held()

    assert in_plain_thread(fails) is False
    usable(rt)


def test_rule8_release_inside_a_guard_is_named(rt: homeloop.Runtime) -> None:
    """The guard finds its lock gone and says so; the guards around and behind it are none the worse."""
    def fails() -> None:
        with pytest.raises(RuntimeError, match="released"):
            with rt.big_lock:
                rt.big_lock.release()
        with rt.big_lock:
            assert rt.big_lock.held()
        assert not rt.big_lock.held()

    in_plain_thread(fails)
    usable(rt)


# Rule 6


def test_rule6_without_a_big_lock_nobody_holds_it() -> None:
    """held() is False in every thread, home included; acquire() and the guard are refused; call() submits."""
    with homeloop.Runtime(big_lock=False) as rt:
        lock = rt.big_lock

        def refused() -> None:
            assert not lock.held()
            with pytest.raises(RuntimeError, match="no big lock"):
                lock.acquire()
            with pytest.raises(RuntimeError, match="no big lock"):
                with lock:
                    pass
            with pytest.raises(WrongThread):
                lock.release()
            assert not lock.held()

        in_plain_thread(refused)
        rt.main.spawn(returned(refused)).result(LIMIT_S)
        home = rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S)
        assert in_plain_thread(rt.call, returned(threading.get_ident)) == home


# Rule 5


def test_rule5_a_worker_enters_directly_only_with_the_big_lock(rt: homeloop.Runtime) -> None:
    """Without it the wake is counted as scheduled and runs at home; with it as entered, on the worker."""
    idents: list[int] = []

    async def sleeper() -> None:
        for _ in range(2):
            await homeloop.park()
            idents.append(threading.get_ident())

    def wakes() -> tuple[int, int]:
        before = rt.main.statistics()
        co.wake()
        until(lambda: len(idents) == 1 and co.state is homeloop.CoroutineState.PARKED, co)
        between = rt.main.statistics()
        with rt.big_lock:
            co.wake()
            assert idents[1:] == [threading.get_ident()]
        after = rt.main.statistics()
        assert between.entered == before.entered
        assert after.scheduled == between.scheduled
        return between.scheduled - before.scheduled, after.entered - between.entered

    co = rt.main.spawn(sleeper())
    until(lambda: co.state is homeloop.CoroutineState.PARKED, co)
    worker = Plain(wakes)
    assert worker.result() == (1, 1)
    assert idents[0] == rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S) != idents[1]


# Timeouts


@pytest.mark.parametrize("timeout", [0, -1.0, 0.02])
def test_rule8_acquire_with_a_timeout(rt: homeloop.Runtime, timeout: float) -> None:
    """False when the time is over, holding nothing and queued nowhere; True at once when it is free."""
    asleep(rt.main)
    with holding(rt.big_lock):
        begun = time.monotonic()
        assert rt.big_lock.acquire(timeout) is False
        assert max(timeout, 0) <= time.monotonic() - begun < LIMIT_S
        assert not rt.big_lock.held()
        assert waiting(rt.big_lock) == 0
    asleep(rt.main)
    assert rt.big_lock.acquire(timeout) is True
    rt.big_lock.release()
    usable(rt)


# Order


def test_rule8_goes_to_who_waits_longest(rt: homeloop.Runtime) -> None:
    """Eight threads get it in the order in which they came."""
    order: list[int] = []

    def take(number: int) -> None:
        acquired(rt.big_lock)
        order.append(number)
        rt.big_lock.release()

    asleep(rt.main)
    threads: list[Plain] = []
    with holding(rt.big_lock):
        for number in range(8):
            threads.append(Plain(take, number))
            until(lambda: waiting(rt.big_lock) == len(threads), rt.big_lock)
    for thread in threads:
        thread.result(rt.big_lock)
    assert order == list(range(8))


def test_rule8_nobody_barges(rt: homeloop.Runtime) -> None:
    """A release with a waiter hands over: who lets go cannot take it again before him.

    The naive version, a threading.Lock, lets the releasing thread win again and again.
    """
    asleep(rt.main)
    let_go = threading.Event()

    def second() -> None:
        with rt.big_lock:
            wait(let_go)

    for _ in range(20):
        let_go.clear()
        acquired(rt.big_lock)
        thread = Plain(second)
        until(lambda: waiting(rt.big_lock) == 1, rt.big_lock)
        rt.big_lock.release()
        assert rt.big_lock.acquire(0) is False
        let_go.set()
        thread.result(rt.big_lock)


def test_rule8_a_never_idle_loop_lets_a_waiter_in_within_one_iteration(rt: homeloop.Runtime) -> None:
    """An iteration that sees a waiter is the last one before he is in.

    The naive version lets go and takes back around select() at once: he is in after some thousand iterations.
    """
    def work() -> list[int]:
        seen = []
        for _ in range(100):
            acquired(rt.big_lock)
            seen.append(loop.turns_with_waiters)
            rt.big_lock.release()
        return seen

    with NeverIdle(rt) as loop:
        until(lambda: loop.turns, rt.main)
        seen = in_plain_thread(work)
    assert max(after - before for before, after in pairwise([0, *seen])) == 1


def test_rule8_a_waiter_comes_in_at_a_select_of_0(rt: homeloop.Runtime) -> None:
    """The loop has something ready and does not sleep; it gives the lock up all the same, exactly once around.

        main loop                           worker
        ---------                           ------
        1 callback A: more is ready
                                            2 waits for the lock
        3 A ends; select(0)
                                            4 has it; logs
        5 callback B logs
    """
    log: list[str] = []

    def a() -> None:
        rt.main.loop.call_soon(b)
        begin.set()
        until(lambda: waiting(rt.big_lock) == 1, rt.big_lock)
        log.append("A")

    def b() -> None:
        log.append("B")

    def work() -> None:
        wait(begin)
        with rt.big_lock:
            log.append("worker")

    for _ in range(20):
        begin = threading.Event()
        worker = Plain(work)
        rt.main.post(a)
        worker.result(rt.big_lock)
        asleep(rt.main)
        assert log == ["A", "worker", "B"]
        log.clear()


@pytest.mark.parametrize("form", ["strict", "guard", "call"])
def test_rule8_a_greedy_worker_cannot_starve_the_loop(rt: homeloop.Runtime, form: str) -> None:
    """A worker that takes the lock again as soon as it lets go gets it after the loop has had it.

    The naive version hands the lock back to the thread that is running already: the loop stands still.
    """
    def again_strict() -> int:
        acquired(rt.big_lock)
        turns = loop.turns
        rt.big_lock.release()
        return turns

    def again_guard() -> int:
        with rt.big_lock:
            return loop.turns

    def again_call() -> int:
        return rt.call(returned(lambda: loop.turns))

    def greedy() -> None:
        again = {"strict": again_strict, "guard": again_guard, "call": again_call}[form]
        for _ in range(100):
            acquired(rt.big_lock)
            until(lambda: waiting(rt.big_lock) == 1, rt.big_lock)       # the loop wants it
            turns = loop.turns
            rt.big_lock.release()
            assert again() > turns

    with NeverIdle(rt) as loop:
        in_plain_thread(greedy)


@pytest.mark.parametrize("greedy_call", [False, True])
def test_rule8_greedy_workers_do_not_keep_posts_and_timers_waiting(rt: homeloop.Runtime, greedy_call: bool) -> None:
    """Three workers never leave the lock free; a sleeping loop still hears of a post, and its timer still fires."""
    stop, posted, fired = threading.Event(), threading.Event(), threading.Event()

    def greedy() -> None:
        while not stop.is_set():
            if greedy_call:
                rt.call(returned(lambda: None))
            else:
                with rt.big_lock:
                    pass

    asleep(rt.main)
    workers = [Plain(greedy) for _ in range(3)]
    try:
        for _ in range(5):
            rt.main.post(posted.set)
            wait(posted, rt.big_lock)
            with rt.big_lock:
                rt.main.loop.call_later(0.001, fired.set)
            wait(fired, rt.big_lock)
            posted.clear()
            fired.clear()
    finally:
        stop.set()
    for worker in workers:
        worker.result(rt.big_lock)


def test_rule8_two_coroutines_that_wake_each_other_for_ever_let_a_waiter_in(rt: homeloop.Runtime) -> None:
    """They never let the loop go idle; a worker gets the lock all the same, and can end them."""
    cos: list[homeloop.Coroutine[None]] = []

    async def wakes(other: int) -> None:
        while True:
            cos[other].wake()
            await homeloop.park()

    with rt.big_lock:
        cos += [rt.main.spawn(wakes(1)), rt.main.spawn(wakes(0))]
    acquired(rt.big_lock)
    for co in cos:
        co.cancel()
    rt.big_lock.release()
    for co in cos:
        with pytest.raises(asyncio.CancelledError):
            co.result(LIMIT_S)


# Rule 2


@pytest.mark.stress
def test_rule2_stress_one_thread_at_a_time(rt: homeloop.Runtime, seed: int) -> None:
    """Callbacks, coroutines entered by workers, calls and timed acquires: never two at once in the main context.

    `inside` is changed without any lock but the big one; a second thread in it at the same time is seen.
    """
    inside: list[int] = []
    count = [0, 0]                      # sections run; in the workers' own count

    def section() -> None:
        inside.append(threading.get_ident())
        assert homeloop.current_context() is rt.main
        count[0] += 1
        assert inside == [threading.get_ident()]
        inside.pop()

    async def parts() -> None:
        section()
        await asyncio.sleep(0)
        section()

    def work(who: int) -> int:
        moves = random.Random(seed * 31 + who)
        own = 0
        while time.monotonic() < end:
            move = moves.randrange(5)
            if move == 0:
                rt.main.post(section)
                own += 1
            elif move == 1:
                rt.call(parts(), LIMIT_S)
                own += 2
            elif move == 2:
                if rt.big_lock.acquire(moves.random() * 1e-4):      # times out now and then
                    section()
                    own += 1
                    rt.big_lock.release()
            elif move == 3:
                with rt.big_lock:
                    rt.main.enter(parts())
                    with rt.big_lock.released():
                        pass
                own += 2
            else:
                rt.main.spawn(parts()).result(LIMIT_S)
                own += 2
        return own

    end = time.monotonic() + 0.7 * STRESS_S
    workers = [Plain(work, who) for who in range(4)]
    for worker in workers:
        worker._thread.join(0.7 * STRESS_S + LIMIT_S)
        count[1] += worker.result(rt.big_lock, rt.main)
    asleep(rt.main)
    until(lambda: count[0] == count[1], rt.main)
    usable(rt)
