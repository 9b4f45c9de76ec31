"""Cycles of waits for a Mutex or RwLock, mixed with the runtime's own waits: refused where asked for, else shown."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.core import waitgraph
from homeloop.errors import WouldDeadlock
from homeloop.sync import Condition, Mutex, RwLock
from homeloop.testing import deadlocks_refused, snapshot
from tests.core.bounded import LIMIT_S, Plain, in_plain_thread, until, wait


@pytest.fixture
def ios() -> Iterator[list[homeloop.IOThread]]:
    with homeloop.Runtime(name="rt"), homeloop.IOThread("io-0") as one, homeloop.IOThread("io-1") as two:
        yield [one, two]
    assert waitgraph._stacks == {}
    assert waitgraph._awaits == {}
    assert waitgraph._owner_waits == 0


def in_line(*primitives: Any) -> None:
    """Return once somebody waits for each."""
    until(lambda: all(primitive.waiters() for primitive in primitives), *primitives)


async def nested(outer: Any, inner: Any, both: Callable[[], None]) -> str:
    """Take one lock, then the other. A coroutine."""
    async with outer:
        both()
        await homeloop.park()
        async with inner:
            return "went on"


def ring(ios: list[homeloop.IOThread], locks: list[Any]) -> list[homeloop.Coroutine[str]]:
    """Coroutines that each hold one lock; woken, each wants the next."""
    has = [threading.Event() for _ in locks]
    cos = [
        ios[number % 2].spawn(nested(lock, locks[(number + 1) % len(locks)], has[number].set), name=f"co-{number}")
        for number, lock in enumerate(locks)
    ]
    for event in has:
        wait(event)
    return cos


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["Mutex", "write", "read and write"])
def test_coroutines_that_take_locks_in_a_ring(ios: list[homeloop.IOThread], kind: str, size: int) -> None:
    """The last is refused, and lets go what it has: the others go on."""
    rw = [RwLock(f"lock-{number}") for number in range(size)]
    locks: list[Any] = [Mutex(f"lock-{number}") for number in range(size)] if kind == "Mutex" else [x.write for x in rw]
    with deadlocks_refused():
        cos = ring(ios, locks)
        for number, co in enumerate(cos[:-1]):
            co.wake()
            in_line(locks[number + 1] if kind == "Mutex" else rw[number + 1])
        cos[-1].wake()
        with pytest.raises(WouldDeadlock) as caught:
            cos[-1].result(LIMIT_S)
        assert [co.result(LIMIT_S) for co in cos[:-1]] == ["went on"] * (size - 1)
    lines = str(caught.value).split("\n")[1:]
    assert len(lines) == size
    for number in range(size):
        wanted = (number + 1) % size
        link = re.compile(f"coroutine co-{number} of io-. waits for .*lock-{wanted}.*, held by coroutine co-{wanted} ")
        assert any(link.search(line) for line in lines), lines


def test_threads_that_take_mutexes_in_a_ring() -> None:
    mutexes = [Mutex("a"), Mutex("b")]
    both = threading.Barrier(2)

    def take(number: int) -> str:
        with mutexes[number]:
            wait(both)
            try:
                with mutexes[1 - number]:
                    return "went on"
            except WouldDeadlock as error:
                return str(error)

    with deadlocks_refused():
        texts = [thread.result() for thread in [Plain(take, 0), Plain(take, 1)]]
    assert any("waits for acquire of <Mutex" in text and "held by thread 'plain take'" in text for text in texts), texts
    assert not any(mutex.locked() for mutex in mutexes)


def test_a_reader_behind_a_writer_behind_who_awaits_the_reader(ios: list[homeloop.IOThread]) -> None:
    """The reader could join, but a writer stands before it, who waits for the first reader, who awaits it."""
    lock = RwLock("rw")
    has, go = threading.Event(), threading.Event()

    async def first() -> None:
        async with lock.read:
            has.set()
            await homeloop.to_worker(wait, go)
            await second

    async def reads() -> str:
        async with lock.read:
            return "read"

    async def writes() -> str:
        async with lock.write:
            return "wrote"

    second = ios[1].context.create(reads(), name="second")
    with deadlocks_refused():
        one = ios[0].spawn(first(), name="first")
        wait(has)
        writer = ios[0].spawn(writes(), name="writer")
        in_line(lock)
        second.wake()
        until(lambda: len(lock.waiters()) == 2, lock)
        go.set()
        with pytest.raises(WouldDeadlock, match=r"(?s)second .*where coroutine writer of io-0 stands before it"):
            one.result(LIMIT_S)
        assert writer.result(LIMIT_S) == "wrote"
        assert second.result(LIMIT_S) == "read"


@pytest.mark.parametrize("how", ["call", "result", "job"])
def test_who_owns_a_mutex_waits_for_who_waits_for_it(ios: list[homeloop.IOThread], how: str) -> None:
    """The runtime's own wait closes the cycle: refused whatever was asked for."""
    mutex = Mutex("m")

    async def locks() -> str:
        async with mutex:
            return "locked"

    async def owner() -> str:
        async with mutex:
            await homeloop.to_worker(in_line, mutex)
            return await ios[1].run(homeloop_await(co))

    co = ios[0].spawn(locks()) if how == "result" else ios[0].context.create(locks(), name="locks")

    async def homeloop_await(co: homeloop.Coroutine[str]) -> str:
        return await co

    def thread() -> str:
        with mutex:
            co = ios[0].spawn(locks())
            in_line(mutex)
            if how == "call":
                return ios[1].call(homeloop_await(co))
            return co.result()

    if how == "job":
        holder = ios[0].spawn(owner())
        until(mutex.locked, mutex)
        co.wake()
        with pytest.raises((WouldDeadlock, asyncio.CancelledError), match="this wait would close a cycle"):
            holder.result(LIMIT_S)
    else:
        if how == "result":
            assert co.result(LIMIT_S) == "locked"
        with pytest.raises(WouldDeadlock, match="waits for acquire of <Mutex 'm'"):
            in_plain_thread(thread)
    until(lambda: not mutex.locked(), mutex)
    co.cancel()


def test_otherwise_a_snapshot_shows_the_cycle(ios: list[homeloop.IOThread]) -> None:
    mutexes = [Mutex("a"), Mutex("b")]
    cos = ring(ios, mutexes)
    assert "a cycle of waits" not in snapshot(threads=False)
    for co in cos:
        co.wake()
    in_line(*mutexes)
    until(lambda: "a cycle of waits" in snapshot(threads=False))
    text = snapshot(threads=False)
    assert text.count("a cycle of waits") == 1
    assert re.search("coroutine co-0 of io-0 waits for acquire of <Mutex 'b' .*, held by coroutine co-1 of io-1", text)
    assert re.search("coroutine co-1 of io-1 waits for acquire of <Mutex 'a' .*, held by coroutine co-0 of io-0", text)
    cos[0].cancel()
    assert cos[1].result(LIMIT_S) == "went on"
    assert "a cycle of waits" not in snapshot(threads=False)


def test_a_loop_in_debug_mode_refuses() -> None:
    mutexes = [Mutex("a"), Mutex("b")]

    async def take(one: Mutex, two: Mutex) -> str:
        async with one:
            await asyncio.sleep(0)
            async with two:
                return "went on"

    async def main() -> list[Any]:
        return await asyncio.gather(take(*mutexes), take(*reversed(mutexes)), return_exceptions=True)

    one, two = asyncio.run(main(), debug=True)
    assert "went on" in (one, two)
    assert isinstance(two if one == "went on" else one, WouldDeadlock)


@pytest.mark.parametrize("how", ["thread", "asyncio.timeout", "timer"])
def test_who_leaves_in_time_is_no_deadlock(ios: list[homeloop.IOThread], how: str) -> None:
    """A timed wait in a thread, and a coroutine with a timeout around it: the cycle ends by itself."""
    if how == "asyncio.timeout" and not hasattr(asyncio, "timeout"):
        pytest.skip("no asyncio.timeout")
    mutexes = [Mutex("a"), Mutex("b")]
    has = [threading.Event(), threading.Event()]

    async def patient() -> str:
        async with mutexes[0]:
            has[0].set()
            await homeloop.to_worker(wait, has[1])
            async with mutexes[1]:
                return "went on"

    async def hasty() -> None:
        async with mutexes[1]:
            has[1].set()
            await homeloop.to_worker(in_line, mutexes[1])
            if how == "asyncio.timeout":
                async with asyncio.timeout(0.02):
                    await mutexes[0].acquire()
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_later(0.02, task.cancel)
            await mutexes[0].acquire()

    def hasty_thread() -> None:
        with mutexes[1]:
            has[1].set()
            in_line(mutexes[1])
            if not mutexes[0].acquire(0.02):
                raise TimeoutError

    with deadlocks_refused():
        other = ios[0].spawn(patient())
        wait(has[0])
        with pytest.raises((TimeoutError, asyncio.CancelledError)):
            in_plain_thread(hasty_thread) if how == "thread" else ios[1].spawn(hasty()).result(LIMIT_S)
        assert other.result(LIMIT_S) == "went on"


def test_a_wait_that_follows_a_cancellation_is_no_false_alarm(ios: list[homeloop.IOThread]) -> None:
    """call() has timed out and waits for what it has cancelled: that is on its way out, although it may not know yet.

        caller                              co, at home
        1 owns a mutex, calls with a timeout
                                            2 stands in line for the mutex
        3 time-out: cancels, and waits
                                            4 leaves the line
    """
    mutex = Mutex("m")

    async def locks() -> None:
        async with mutex:
            pass

    def caller() -> None:
        for _ in range(20):
            with mutex, pytest.raises(TimeoutError):
                ios[0].call(locks(), 0.001)

    with deadlocks_refused():
        in_plain_thread(caller)


def test_a_condition_that_cannot_take_its_lock_again_says_so(ios: list[homeloop.IOThread]) -> None:
    """The lock went to who waits for the waiter: an error, and no endless attempt."""
    condition = Condition()
    waits = threading.Event()

    async def waiter() -> None:
        async with condition:
            asyncio.get_running_loop().call_soon(waits.set)
            await condition.wait()

    async def notifier(co: homeloop.Coroutine[None]) -> None:
        async with condition:
            condition.notify()
            await homeloop.to_worker(in_line, condition.lock)
            await co

    with deadlocks_refused():
        co = ios[0].spawn(waiter(), name="waiter")
        wait(waits)
        in_line(condition)
        other = ios[1].spawn(notifier(co), name="notifier")
        with pytest.raises(WouldDeadlock):
            other.result(LIMIT_S)
        co.result(LIMIT_S)
