"""What the sleeping main loop learns when the big lock is let go: work, timers, descriptors. Rule 8."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import homeloop
from tests.core.bounded import (
    LIMIT_S,
    acquired,
    asleep,
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


# Letting go notifies the loop exactly when there is work


async def parks_for_ever() -> None:
    while True:
        await homeloop.park()


async def yields_once() -> None:
    await asyncio.sleep(0)


def nothing() -> None:
    pass


KICKS: dict[str, tuple[int, Callable[[homeloop.AioContext], object]]] = {
    "nothing": (0, lambda main: None),
    "call_soon": (1, lambda main: main.loop.call_soon(nothing)),
    "call_soon twice": (1, lambda main: [main.loop.call_soon(nothing), main.loop.call_soon(nothing)]),
    "call_soon_threadsafe": (1, lambda main: main.loop.call_soon_threadsafe(nothing)),
    "post": (1, lambda main: main.post(nothing)),
    "post and call_soon": (1, lambda main: [main.post(nothing), main.loop.call_soon(nothing)]),
    "earlier timer": (1, lambda main: main.loop.call_later(1800, nothing)),
    "later timer": (0, lambda main: main.loop.call_later(7200, nothing)),
    "created task": (1, lambda main: main.loop.create_task(yields_once())),
    "entered, ended": (0, lambda main: main.call(returned(nothing), LIMIT_S)),
    "entered, parked": (0, lambda main: main.enter(parks_for_ever())),
    "entered, yielded": (1, lambda main: main.enter(yields_once())),
    "future nobody awaits": (0, lambda main: main.loop.create_future().set_result(None)),
    "event nobody awaits": (0, lambda main: asyncio.Event().set()),
    "queued and polled": (0, lambda main: [main.loop.call_soon(nothing), main.poll(False)]),
}


@pytest.mark.parametrize("what", KICKS)
def test_rule8_letting_go_notifies_the_loop_exactly_when_there_is_work(rt: homeloop.Runtime, what: str) -> None:
    """One kick if something was queued or an earlier timer set, none otherwise, never two.

    The main loop sleeps towards a timer an hour away. The naive versions kick always (a system call and a thread
    switch per guard) or never (what a worker queues waits for the next I/O).
    """
    expected, act = KICKS[what]
    with rt.big_lock:
        hour = rt.main.loop.call_later(3600, nothing)
    asleep(rt.main)
    before = rt.main.statistics().kicks
    with rt.big_lock:
        with rt.big_lock:
            act(rt.main)
    assert rt.main.statistics().kicks - before == expected
    asleep(rt.main)
    before = rt.main.statistics().kicks
    with rt.big_lock:                   # what was left is done, or known: it is not notified again
        pass
    assert rt.main.statistics().kicks == before
    with rt.big_lock:
        hour.cancel()


def test_rule8_one_kick_however_many_take_the_lock_before_the_loop_is_up(rt: homeloop.Runtime) -> None:
    """The loop has been kicked and waits for the lock: who holds it meanwhile and queues more need not kick again."""
    ran: list[int] = []
    asleep(rt.main)
    before = rt.main.statistics().kicks
    with rt.big_lock:
        for number in range(3):
            with rt.big_lock.released():
                acquired(rt.big_lock)
                rt.main.loop.call_soon(ran.append, number)
                rt.big_lock.release()
    asleep(rt.main)
    assert ran == [0, 1, 2]
    # At most: the loop may have come up, run what there was, and slept again in between.
    assert rt.main.statistics().kicks - before <= 4


def test_rule8_what_a_worker_queues_runs_though_the_loop_sleeps(rt: homeloop.Runtime) -> None:
    """call_soon(), a task, a settled future and a set event: each is seen by the sleeping main loop, each time."""
    async def awaits(event: asyncio.Event) -> int:
        await event.wait()
        return threading.get_ident()

    home = rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S)
    for _ in range(20):
        event, ran = asyncio.Event(), threading.Event()
        co = rt.main.spawn(awaits(event))
        asleep(rt.main)
        with rt.big_lock:
            event.set()
        assert co.result(LIMIT_S) == home
        asleep(rt.main)
        with rt.big_lock:
            rt.main.loop.call_soon(ran.set)
        wait(ran, rt.main)


# asyncio under the lock


def test_rule8_get_running_loop_is_the_main_loop_while_held(rt: homeloop.Runtime) -> None:
    """asyncio's calls work under the lock, in every thread without a context; in one with another loop too."""
    async def in_another_loop() -> None:
        own = asyncio.get_running_loop()
        with rt.big_lock:
            assert asyncio.get_running_loop() is rt.main.loop
            task = asyncio.ensure_future(returned(threading.get_ident))
            assert task.get_loop() is rt.main.loop
        assert asyncio.get_running_loop() is own
        await asyncio.sleep(0)

    def plain() -> None:
        for _ in range(2):
            with rt.big_lock:
                assert asyncio.get_running_loop() is rt.main.loop
                future = asyncio.get_running_loop().create_future()
                assert future.get_loop() is rt.main.loop
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()

    in_plain_thread(plain)
    in_plain_thread(asyncio.run, in_another_loop())
    usable(rt)


@pytest.mark.parametrize("before", [None, 3600.0])
def test_rule8_a_timer_that_a_worker_sets_fires_in_time(rt: homeloop.Runtime, before: float | None) -> None:
    """The main loop sleeps for ever, or for an hour; a timer of 20 ms set under the lock fires after 20 ms.

    The naive version leaves the loop asleep until something else ends its sleep.
    """
    fired = threading.Event()
    on: list[int] = []

    def fire() -> None:
        on.append(threading.get_ident())
        fired.set()

    with rt.big_lock:
        hour = rt.main.loop.call_later(before, nothing) if before else None
    asleep(rt.main)
    with rt.big_lock:
        begun = rt.main.loop.time()
        rt.main.loop.call_later(0.02, fire)
    wait(fired, rt.main)
    assert time.monotonic() - begun + 0.001 >= 0.02
    assert on == [rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S)]
    if hour is not None:
        with rt.big_lock:
            hour.cancel()


def test_rule8_asyncio_sleep_begun_by_a_worker_ends_in_time(rt: homeloop.Runtime) -> None:
    """call() begins on the worker and sleeps; the sleeping main loop learns of the timer and ends it."""
    async def naps() -> int:
        await asyncio.sleep(0.005)      # tidy: allow sleep: the timer is what is tested
        return threading.get_ident()

    home = rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S)
    asleep(rt.main)
    assert in_plain_thread(rt.call, naps(), LIMIT_S) == home


# File descriptors that change under a sleeping loop


class Pipe:
    """A socket pair: `ours` is watched by the main loop, `theirs` makes it readable."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.seen: list[bytes] = []
        self.calls = 0

    def read(self) -> None:
        self.calls += 1
        with contextlib.suppress(BlockingIOError):
            self.seen.append(self.ours.recv(100))

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def replace(loop: asyncio.AbstractEventLoop, old: Pipe, new: Pipe) -> int:
    """Close what the loop watches and watch `new` under the same number (holder)."""
    fd = old.ours.fileno()
    loop.remove_reader(fd)
    old.close()
    number = new.ours.detach()
    if number != fd:
        os.dup2(number, fd)
        os.close(number)
    new.ours = socket.socket(fileno=fd)
    new.ours.setblocking(False)
    loop.add_reader(fd, new.read)
    return fd


@pytest.fixture
def pipes(rt: homeloop.Runtime) -> Iterator[tuple[Pipe, Pipe]]:
    """The first is watched; whichever has its number at the end is watched no more."""
    old, new = Pipe(), Pipe()
    with rt.big_lock:
        fd = old.ours.fileno()
        rt.main.loop.add_reader(fd, old.read)
    asleep(rt.main)
    yield old, new
    with rt.big_lock:
        rt.main.loop.remove_reader(fd)
    old.close()
    new.close()


def test_rule8_a_reader_that_a_worker_adds_is_seen_by_the_sleeping_loop(
    rt: homeloop.Runtime, pipes: tuple[Pipe, Pipe]
) -> None:
    """The sleep does not end, and yet the new descriptor ends it when it is ready."""
    _old, new = pipes
    with rt.big_lock:
        rt.main.loop.add_reader(new.ours, new.read)
    new.theirs.send(b"new")
    until(lambda: new.seen, rt.main)
    assert new.seen == [b"new"]
    with rt.big_lock:
        assert rt.main.loop.remove_reader(new.ours)


def test_rule8_a_descriptor_closed_and_reused_while_the_loop_sleeps(
    rt: homeloop.Runtime, pipes: tuple[Pipe, Pipe]
) -> None:
    """The number goes on with another socket: the loop calls the new reader, once, and never the old one."""
    old, new = pipes
    with rt.big_lock:
        replace(rt.main.loop, old, new)
    new.theirs.send(b"new")
    until(lambda: new.seen, rt.main)
    asleep(rt.main)
    assert (old.calls, new.seen, new.calls) == (0, [b"new"], 1)


def test_rule8_what_the_sleep_saw_is_only_a_hint(rt: homeloop.Runtime, pipes: tuple[Pipe, Pipe]) -> None:
    """The loop saw the old socket ready; while it waited for the lock the number went to a new one, which is not.

        main loop                           worker (holds the lock)
        ---------                           -----------------------
                                            1 the old socket becomes readable
        2 epoll: number 7 is readable
        3 waits for the lock
                                            4 closes 7; 7 is another socket now
                                            5 lets go
        6 must not call 7's reader

    The naive version calls the new reader with the old socket's event.
    """
    old, new = pipes
    with rt.big_lock:
        old.theirs.send(b"old")
        until(lambda: waiting(rt.big_lock) == 1, rt.big_lock)
        replace(rt.main.loop, old, new)
    asleep(rt.main)
    assert (old.calls, new.calls) == (0, 0)
    new.theirs.send(b"new")
    until(lambda: new.seen, rt.main)
    assert new.seen == [b"new"]


def test_rule8_a_reader_removed_while_the_loop_waits_for_the_lock(
    rt: homeloop.Runtime, pipes: tuple[Pipe, Pipe]
) -> None:
    """Seen ready, then removed by the holder: it is not called any more."""
    old, _new = pipes
    with rt.big_lock:
        old.theirs.send(b"old")
        until(lambda: waiting(rt.big_lock) == 1, rt.big_lock)
        rt.main.loop.remove_reader(old.ours)
    asleep(rt.main)
    assert old.calls == 0
