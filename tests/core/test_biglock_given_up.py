"""The big lock given up and taken back: released(), condition(), and Ctrl-C on the way. Rule 8."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

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
    until,
    usable,
    wait,
    waiting,
)


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    with homeloop.Runtime() as runtime:
        yield runtime


# released()


def test_rule8_released_gives_it_away_and_takes_it_back(rt: homeloop.Runtime) -> None:
    """In the block others get it and the thread is nowhere; afterwards, also by an exception, all is as before."""
    def others_turn() -> bool:
        with rt.big_lock:
            return True

    def work() -> None:
        lock = rt.big_lock
        with pytest.raises(WrongThread):
            with lock.released():
                pass
        with lock:
            with pytest.raises(ZeroDivisionError):
                with lock.released():
                    assert not lock.held()
                    assert homeloop.current_context() is None
                    with pytest.raises(RuntimeError):
                        asyncio.get_running_loop()
                    assert in_plain_thread(others_turn)
                    with lock:                      # a guard inside is one of its own
                        assert lock.held()
                    assert not lock.held()
                    raise ZeroDivisionError
            assert lock.held()
            assert homeloop.current_context() is rt.main
            assert asyncio.get_running_loop() is rt.main.loop
        assert not lock.held()

    in_plain_thread(work)
    usable(rt)


def test_rule8_released_at_home_lets_others_run_the_main_context(rt: homeloop.Runtime) -> None:
    """A coroutine at home gives it up for a blocking call; a worker enters another one meanwhile; each is itself."""
    seen: list[Any] = []

    async def other() -> None:
        seen.append((homeloop.current_coroutine(), asyncio.current_task(), threading.get_ident()))

    def work() -> None:
        with rt.big_lock:
            co = rt.main.create(other())
            co.wake()
            assert co.done()
            assert seen == [(co, co, threading.get_ident())]

    async def gives_up() -> None:
        me = homeloop.current_coroutine()
        with rt.big_lock.released():
            assert not rt.big_lock.held()
            in_plain_thread(work)
        assert rt.big_lock.held()
        assert homeloop.current_coroutine() is me
        assert asyncio.current_task() is me
        await asyncio.sleep(0)
        assert homeloop.current_coroutine() is me

    rt.main.spawn(gives_up()).result(LIMIT_S)
    assert len(seen) == 1
    usable(rt)


def test_rule8_the_end_of_released_wakes_a_waiter_that_stands_in(rt: homeloop.Runtime) -> None:
    """A thread that waits for the coroutine serves the main loop while the home is away; the end reaches it.

        home                                plain thread
        ----                                ------------
        1 released(): blocks
                                            2 co.result(): serves the main loop, sleeps in it
        3 goes on; the coroutine ends
        4 sleeps in the same loop
                                            5 must be woken, though the home may see the kick first
    """
    gone, back = threading.Event(), threading.Event()

    async def gives_up() -> str:
        with rt.big_lock.released():
            gone.set()
            wait(back)
        return "ended"

    for _ in range(10):
        gone.clear()
        back.clear()
        co = rt.main.spawn(gives_up())
        wait(gone)
        waiter = Plain(co.result)
        until(rt.main.inbox.sleeping, rt.main)
        back.set()
        assert waiter.result(rt.main, rt.big_lock) == "ended"


def test_rule8_a_poll_of_the_holder_ends_when_the_home_does_the_work(rt: homeloop.Runtime) -> None:
    """A worker polls the main context under the lock until something has happened; the home may be the one to do it.

    Both sleep in the same loop. Each post wakes both: one runs it, and the worker looks again.
    """
    happened: list[int] = []

    def serve(number: int) -> None:
        with rt.big_lock:
            while number not in happened:
                rt.main.poll(True)

    for number in range(20):
        asleep(rt.main)
        worker = Plain(serve, number)
        until(lambda: waiting(rt.big_lock) == 0 and rt.main.inbox.sleeping(), rt.main)
        rt.main.post(happened.append, number)
        worker.result(rt.main, rt.big_lock)


# condition()


def test_rule8_held_is_truthful_in_a_condition(rt: homeloop.Runtime) -> None:
    """A thread that waits on condition() does not hold the lock, and held() says so; then it does again.

    The predicate of wait_for() runs with the lock; the thread is asked while it waits by a signal handler of its own.
    """
    condition = rt.big_lock.condition()
    asked: list[tuple[bool, Any]] = []
    goes_on = False

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.append((rt.big_lock.held(), homeloop.current_context()))

    def notify() -> None:
        nonlocal goes_on
        with rt.big_lock:               # only when the waiter is inside
            pass
        signalled(signal.SIGUSR1, lambda: asked)
        with rt.big_lock:
            goes_on = True
            condition.notify()

    old = signal.signal(signal.SIGUSR1, ask)
    try:
        with rt.big_lock:
            notifier = Plain(notify)
            until(lambda: waiting(rt.big_lock) >= 1, rt.big_lock)
            assert condition.wait_for(lambda: rt.big_lock.held() and goes_on, LIMIT_S)
            assert rt.big_lock.held()
            assert homeloop.current_context() is rt.main
        notifier.result()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert set(asked) == {(False, None)}


def test_rule8_condition_wakes_those_that_wait_longest_and_as_many_as_asked(rt: homeloop.Runtime) -> None:
    """notify(n) wakes the n that wait longest, notify_all() the rest; each goes on with the lock held."""
    condition = rt.big_lock.condition()
    came: list[int] = []
    went: list[int] = []

    def waiter(number: int) -> None:
        with rt.big_lock:
            came.append(number)
            assert condition.wait(LIMIT_S)
            assert rt.big_lock.held()
            went.append(number)

    def notify(how: Callable[[], None]) -> None:
        with rt.big_lock:
            how()

    threads: list[Plain] = []
    for number in range(5):
        threads.append(Plain(waiter, number))
        until(lambda: len(came) == len(threads), rt.big_lock)
    notify(condition.notify)
    threads[0].result(rt.big_lock)
    assert went == [0]
    notify(lambda: condition.notify(2))
    threads[1].result(rt.big_lock)
    threads[2].result(rt.big_lock)
    assert sorted(went) == [0, 1, 2]            # those two race for the lock
    notify(condition.notify_all)
    for thread in threads:
        thread.result(rt.big_lock)
    assert sorted(went) == [0, 1, 2, 3, 4]
    notify(condition.notify)            # nobody waits: remembered by nobody
    with rt.big_lock:
        assert condition.wait(0.001) is False


def test_rule8_condition_times_out_with_the_lock(rt: homeloop.Runtime) -> None:
    """wait() is False, wait_for() its predicate's truth; held again, and the time is spent once, not per look."""
    condition = rt.big_lock.condition()
    with rt.big_lock:
        assert condition.wait(0) is False
        assert rt.big_lock.held()
        assert condition.wait_for(lambda: False, 0.01) is False
        assert condition.wait_for(lambda: True, 0) is True
        assert rt.big_lock.held()
    usable(rt)


def test_rule8_condition_needs_the_lock(rt: homeloop.Runtime) -> None:
    condition = rt.big_lock.condition()
    for call in (condition.wait, condition.notify, condition.notify_all):
        with pytest.raises(WrongThread):
            call()


def test_rule8_ctrl_c_on_a_condition_hands_the_notification_on(rt: homeloop.Runtime) -> None:
    """Notified and interrupted in the same moment: the notification goes to the next waiter.

        main thread (waits first)       second          notifier
        -------------------------       ------          --------
        1 wait()                        2 wait()
        3 Ctrl-C: the handler waits
                                                        4 notify(): the main thread
        5 the handler raises
        6 hands it on                   7 goes on
    """
    condition = rt.big_lock.condition()
    came: list[str] = []
    notified = threading.Event()

    def second() -> bool:
        with rt.big_lock:
            came.append("second")
            return condition.wait(LIMIT_S)

    def notify(send: Callable[[], None]) -> None:
        until(lambda: "main" in came)
        with rt.big_lock:
            pass                        # the main thread waits
        second_thread.append(Plain(second))
        until(lambda: "second" in came)
        with rt.big_lock:
            send()
            condition.notify()
        notified.set()

    second_thread: list[Plain] = []
    with ctrl_c(lambda: wait(notified)) as send:
        notifier = Plain(notify, send)
        with rt.big_lock:
            came.append("main")
            with pytest.raises(Interrupted):
                condition.wait(LIMIT_S)
            assert rt.big_lock.held()
        notifier.result()
    assert second_thread[0].result(rt.big_lock) is True
    usable(rt)


# Ctrl-C


class Interrupted(KeyboardInterrupt):
    """What our Ctrl-C raises."""


def signalled(signum: int, handled: Callable[[], object]) -> None:
    """Send the main thread a signal until its handler has begun.

    One is not enough: it may come between the interpreter's last look and the system call that waits, which it then
    does not end.
    """
    main = threading.main_thread().ident
    assert main is not None

    def send() -> object:
        signal.pthread_kill(main, signum)
        return handled()

    until(send)


@contextlib.contextmanager
def ctrl_c(on_signal: Callable[[], object] = lambda: None) -> Iterator[Callable[[], None]]:
    """One Ctrl-C that runs on_signal() in the main thread and raises Interrupted there; yields what sends it."""
    handled: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        handled.append(signum)
        if len(handled) == 1:
            on_signal()
            raise Interrupted

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: signalled(signal.SIGINT, lambda: handled)
    finally:
        signal.signal(signal.SIGINT, old)


def send_when_waiting(lock: homeloop.BigLock, send: Callable[[], None]) -> None:
    until(lambda: waiting(lock) == 1, lock)
    send()


def test_rule8_ctrl_c_in_acquire_leaves_the_queue(rt: homeloop.Runtime) -> None:
    """The waiter is gone, holds nothing, and the lock goes to the next; the naive one is granted it and never knows."""
    asleep(rt.main)
    with ctrl_c() as send, holding(rt.big_lock):
        sender = Plain(send_when_waiting, rt.big_lock, send)
        with pytest.raises(Interrupted):
            rt.big_lock.acquire(LIMIT_S)
        sender.result()
        assert not rt.big_lock.held()
        assert waiting(rt.big_lock) == 0
        assert homeloop.current_context() is None
    usable(rt)


def test_rule8_ctrl_c_that_comes_with_the_grant_hands_it_on(rt: homeloop.Runtime) -> None:
    """Granted and interrupted in the same moment: the lock is not left with a thread that thinks it has none.

        main thread                     holder
        -----------                     ------
        1 acquire() waits
        2 Ctrl-C: the handler runs
                                        3 release(): grants it to the main thread
        4 the handler raises
        5 hands it on
    """
    asleep(rt.main)
    taken, let_go, gone = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        acquired(rt.big_lock)
        taken.set()
        wait(let_go)
        rt.big_lock.release()
        gone.set()

    def grant() -> None:
        let_go.set()
        wait(gone)

    holder = Plain(hold)
    wait(taken)
    with ctrl_c(grant) as send:
        sender = Plain(send_when_waiting, rt.big_lock, send)
        with pytest.raises(Interrupted):
            rt.big_lock.acquire(LIMIT_S)
        sender.result()
    holder.result()
    assert not rt.big_lock.held()
    assert homeloop.current_context() is None
    usable(rt)


def test_rule8_ctrl_c_while_released_takes_it_back_is_raised_with_the_lock(rt: homeloop.Runtime) -> None:
    """released() ends with the lock held whatever happens: the code around it relies on that."""
    asleep(rt.main)
    taken, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        acquired(rt.big_lock)
        taken.set()
        wait(let_go)
        rt.big_lock.release()

    with ctrl_c(let_go.set) as send, rt.big_lock:
        with pytest.raises(Interrupted):
            with rt.big_lock.released():
                holder = Plain(hold)
                wait(taken)
                sender = Plain(send_when_waiting, rt.big_lock, send)
        assert rt.big_lock.held()
        assert homeloop.current_context() is rt.main
        sender.result()
    holder.result()
    usable(rt)


INTERRUPTED_CALLS = """
import asyncio, random, signal, sys, threading
import homeloop

pause = random.Random(int(sys.argv[1]))
main = threading.main_thread().ident
armed = False

class Interrupted(KeyboardInterrupt):
    pass

def handler(signum, frame):
    global armed
    if armed:
        armed = False
        handled.set()
        raise Interrupted

async def nothing():
    pass

async def yields():
    await asyncio.sleep(0)

def call_until_interrupted(rt, coro):
    global armed
    try:
        armed = True
        while True:
            rt.call(coro(), 10)
    except Interrupted:
        pass

def send(after):
    asked.wait(after)
    while not handled.is_set():         # the first ones may come before it is armed
        signal.pthread_kill(main, signal.SIGINT)
        handled.wait(after)

def look(found):
    found.append(rt.big_lock.acquire(2))
    if found[0]:
        rt.big_lock.release()

signal.signal(signal.SIGINT, handler)
asked = threading.Event()           # never set: a wait of a given length
handled = threading.Event()
rt = homeloop.Runtime()
rt.__enter__()
for number in range(int(sys.argv[2])):
    handled.clear()
    sender = threading.Thread(target=send, args=(pause.random() * 0.002,))
    sender.start()
    call_until_interrupted(rt, (nothing, yields)[number % 2])
    sender.join()
    found = []
    looker = threading.Thread(target=look, args=(found,))
    looker.start()
    looker.join()
    assert not rt.big_lock.held(), (number, rt.big_lock)
    assert homeloop.current_context() is None, number
    assert found == [True], (number, rt.big_lock)
    assert rt.main.spawn(nothing()).result(2) is None, number
    assert rt.call(yields(), 2) is None, number
rt.__exit__(None, None, None)
print("done")
"""


@pytest.mark.stress
@pytest.mark.timeout(int(60 + 60 * STRESS_S))
def test_rule8_stress_ctrl_c_in_call_leaves_nothing_held(seed: int) -> None:
    """Ctrl-C at any moment of a call(): the lock is not left with the caller, and the main loop goes on.

    In a process of its own, which may hang or die. Python runs signal handlers at calls, so one may come between any
    two steps of taking and leaving the lock; a script that calls in a loop spends most of its time there.
    """
    options = ["-X", "faulthandler", "-W", "ignore"]
    argv = [sys.executable, *options, "-c", INTERRUPTED_CALLS, str(seed), str(int(150 * STRESS_S))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, errors = process.communicate(timeout=30 + 30 * STRESS_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        out, errors = process.communicate()
        pytest.fail(f"hangs:\n{errors}")
    assert out == "done\n", errors
