"""Mutex: exclusion, the order of arrival, one owner; and hand-off against cancellation, forced."""

from __future__ import annotations

import asyncio
import os
import sysconfig
import threading
from collections.abc import Callable
from typing import Any

import pytest

import homeloop
from homeloop.errors import WouldBlock, WouldBlockLoop, WouldDeadlock, WrongState
from homeloop.sync import Mutex
from homeloop.sync import mutex as mutex_module
from homeloop.sync.mutex import TokenInList
from tests.core.bounded import LIMIT_S, Plain, until, wait
from tests.sync.parties import Parties, Script
from tests.sync.parties import parties as parties_of


class MutexWithoutGil(Mutex):
    """Its token is where it is in an interpreter without a GIL."""

    __slots__ = ()
    _token = TokenInList(vars(Mutex)["_token"])     # type: ignore[assignment]


KINDS = [Mutex] if sysconfig.get_config_var("Py_GIL_DISABLED") else [Mutex, MutexWithoutGil]


@pytest.fixture(autouse=True, params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test here runs with each of them as `Mutex`."""
    monkeypatch.setitem(globals(), "Mutex", request.param)
    return request.param


def locked_counting(mutex: Mutex, box: list[int], rounds: int) -> Script:
    for _ in range(rounds):
        yield mutex.acquire
        seen = box[0]
        yield lambda: None
        box[0] = seen + 1
        yield mutex.release


def test_exclusion(parties: Parties) -> None:
    mutex, box = Mutex(), [0]
    for _ in range(6):
        parties.start(locked_counting(mutex, box, 40))
    parties.results()
    assert box == [240]
    assert not mutex.locked()
    assert mutex.owner is None


def entering(mutex: Mutex, log: list[int], number: int) -> Script:
    yield mutex.acquire
    log.append(number)
    yield mutex.release


def test_order_of_arrival_under_a_greedy_holder(parties: Parties) -> None:
    """8 waiters of mixed kind; the holder lets go and wants it again at once. A lock that lets him in fails."""
    mutex, log = Mutex(), []
    mutex.acquire()
    for number in range(8):
        parties.start(entering(mutex, log, number))
        until(lambda number=number: len(mutex.waiters()) == number + 1, mutex)
    mutex.release()
    mutex.acquire()                     # behind them all
    assert log == list(range(8))
    log.append(8)
    mutex.release()
    parties.results()
    assert log == list(range(9))


def test_equal_shares_under_a_greedy_holder() -> None:
    """One party in each kind of place, each greedy: they take turns exactly. A barging lock fails."""
    mutex, turns = Mutex(), [0] * 4

    def taking(number: int) -> Script:
        while sum(turns) < 200:
            yield mutex.acquire
            turns[number] += 1
            # With the lock held, so that whoever wants it is in line before we ask again.
            until(lambda: len(mutex.waiters()) == 3 or sum(turns) >= 197, mutex)
            yield mutex.release

    with parties_of("one of each") as parties:
        mutex.acquire()
        for number in range(4):
            parties.start(taking(number))
            until(lambda number=number: len(mutex.waiters()) == number + 1, mutex)
        mutex.release()
        parties.results()
    assert sum(turns) >= 200
    assert max(turns) - min(turns) <= 2, turns
    assert sum(turns) ** 2 / (4 * sum(turn * turn for turn in turns)) > 0.95      # Jain's index


def test_owner_is_the_coroutine_or_the_thread() -> None:
    mutex = Mutex("disk")
    with mutex:
        assert mutex.owner == threading.get_ident()
        assert mutex.held()
        with pytest.raises(WouldDeadlock, match="not recursive"):
            mutex.acquire()
        assert "MainThread" in repr(mutex)
        assert "'disk'" in repr(mutex)

    async def main() -> None:
        me = asyncio.current_task()
        async with mutex:
            assert mutex.owner is me
            with pytest.raises(WouldDeadlock):
                await mutex.acquire()
            with pytest.raises(WouldDeadlock):
                async with mutex:
                    pass

    asyncio.run(main())
    homeloop.run(main())


def test_only_the_owner_releases() -> None:
    mutex = Mutex()
    with pytest.raises(WrongState):
        mutex.release()

    async def other() -> None:
        assert not mutex.held()
        with pytest.raises(WrongState, match="does not own it"):
            mutex.release()

    async def main() -> None:
        async with mutex:
            await asyncio.create_task(other())
            assert mutex.held()

    asyncio.run(main())
    with mutex:
        with pytest.raises(WrongState):
            Plain(mutex.release).result()
    with pytest.raises(WrongState):
        with mutex:
            mutex.release()
    assert not mutex.locked()


async def in_callback(fn: Callable[[], object]) -> Exception:
    """What fn() raises in a callback of the running loop, outside any task."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Exception] = loop.create_future()

    def call() -> None:
        try:
            fn()
        except Exception as error:
            outcome.set_result(error)

    loop.call_soon(call)
    return await outcome


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
@pytest.mark.parametrize("now", ["nobody", "a thread", "a task"])
def test_leaving_a_block_does_not_release_what_is_anothers(run: Any, now: str) -> None:
    mutex = Mutex()

    async def main() -> None:
        with pytest.raises(WrongState, match="does not own it"):
            async with mutex:
                mutex.release()
                if now == "a thread":
                    Plain(mutex.acquire).result()
                elif now == "a task":
                    await asyncio.create_task(mutex.acquire())
        assert mutex.locked() == (now != "nobody")

    run(main())


@pytest.mark.parametrize("form", ["with", "acquire", "callback"])
@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_synchronous_form_in_a_thread_that_serves_a_loop(run: Any, form: str) -> None:
    """At once, free or not, and it says who holds it and who asks."""
    mutex = Mutex()

    def enter() -> None:
        with mutex:
            raise AssertionError("got it")

    async def ask() -> None:
        with pytest.raises(WouldBlockLoop, match="MainThread") as info:
            if form == "with":
                enter()
            elif form == "acquire":
                mutex.acquire(timeout=1)
            else:
                raise await in_callback(mutex.acquire)
        assert "held by coroutine" in str(info.value) or not mutex.locked()

    async def main() -> None:
        await ask()
        async with mutex:
            await asyncio.create_task(ask())

    run(main())


def test_rule11_who_holds_the_big_lock_serves_the_main_loop_meanwhile() -> None:
    """Thread T holds the big lock and waits; the owner is a coroutine of the main context, which must run."""
    mutex = Mutex()
    go = threading.Event()

    async def owner() -> None:
        async with mutex:
            go.set()
            await homeloop.park()

    with homeloop.Runtime() as rt:
        co = rt.main.spawn(owner())
        wait(go, mutex)
        with rt.big_lock:
            rt.main.loop.call_soon(co.wake)
            with mutex:
                assert mutex.owner == threading.get_ident()
                assert co.done()
                assert rt.big_lock.held()
            assert not mutex.acquire(timeout=0.01) or mutex.release() is None
        co.result(LIMIT_S)
    assert not mutex.locked()


def test_an_idle_one_has_no_lock_of_its_own() -> None:
    """It is made when somebody waits, by whoever comes first."""
    mutex = Mutex()
    with mutex:
        assert mutex._plain_lock is None
        assert not Plain(mutex.acquire, 0.001).result()
    made = mutex._plain_lock
    assert made is not None
    assert mutex._lock is made
    mutex = Mutex()
    barrier = threading.Barrier(8)

    def look() -> Any:
        wait(barrier)
        return mutex._lock

    assert len({id(lock) for lock in [thread.result() for thread in [Plain(look) for _ in range(8)]]}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_usable_in_a_child_that_was_forked_while_a_lock_was_made() -> None:
    with mutex_module._making.lock:
        pid = os.fork()
        if not pid:
            try:
                os._exit(0 if Mutex().waiters() == () else 1)       # waiters() takes the lock
            finally:
                os._exit(2)
    until(lambda: ended(pid))


def ended(pid: int) -> bool:
    found, status = os.waitpid(pid, os.WNOHANG)
    assert status == 0
    return found == pid


def test_nowait() -> None:
    mutex = Mutex()
    mutex.acquire_nowait()
    with pytest.raises(WouldBlock):
        mutex.acquire_nowait()
    mutex.release()

    async def main() -> None:
        mutex.acquire_nowait()
        assert mutex.owner is asyncio.current_task()
        mutex.release()

    asyncio.run(main())


def test_timeout_leaves_the_line() -> None:
    mutex = Mutex()
    with mutex:
        assert Plain(mutex.acquire, 0.01).result() is False
        assert mutex.waiters() == ()
    assert Plain(lambda: mutex.acquire(0.01) and mutex.release() is None).result()


# Hand-off against cancellation


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_woken_and_cancelled_in_the_same_turn_hands_on(run: Any) -> None:
    """
    holder              first               second
    1 release()         (owner)
    2 first.cancel()
                        3 CancelledError
                                            4 owns it
    """
    mutex = Mutex()
    log: list[str] = []

    async def taking(name: str) -> None:
        async with mutex:
            log.append(name)

    async def main() -> None:
        await mutex.acquire()
        first = asyncio.create_task(taking("first"))
        second = asyncio.create_task(taking("second"))
        await asyncio.sleep(0)
        assert len(mutex.waiters()) == 2
        mutex.release()
        assert mutex.owner is first
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.wait_for(second, LIMIT_S)
        assert log == ["second"]
        assert not mutex.locked()

    run(main())


def test_cancelled_before_the_hand_over_reaches_it() -> None:
    """The grant is on its way to another loop, which runs a cancellation first.

    this thread         home of a                       home of b
    1 block a
    2 release()         (owner; the wake is in the inbox behind the block)
    3 a.cancel()
                        4 CancelledError, hand on
                                                        5 owns it
    """
    mutex = Mutex()
    entered, unblock = threading.Event(), threading.Event()

    async def taking() -> str:
        async with mutex:
            return "owned"

    def block() -> None:
        entered.set()
        wait(unblock)

    with homeloop.IOThread() as a, homeloop.IOThread() as b:
        mutex.acquire()
        first = a.spawn(taking())
        until(lambda: len(mutex.waiters()) == 1, mutex)
        second = b.spawn(taking())
        until(lambda: len(mutex.waiters()) == 2, mutex)
        a.post(block)
        wait(entered)
        first.cancel()
        mutex.release()
        assert mutex.owner is first
        unblock.set()
        assert second.result(LIMIT_S) == "owned"
        with pytest.raises(asyncio.CancelledError):
            first.result(LIMIT_S)
    assert not mutex.locked()


def test_cancelled_waiter_leaves_the_line(parties: Parties) -> None:
    mutex = Mutex()
    log: list[int] = []
    mutex.acquire()
    handles = []
    for number in range(4):
        handles.append(parties.start(entering(mutex, log, number)))
        until(lambda number=number: len(mutex.waiters()) == number + 1, mutex)
    gone = [number for number in (0, 2) if handles[number].cancel()]
    until(lambda: len(mutex.waiters()) == 4 - len(gone), mutex)
    mutex.release()
    mutex.acquire()
    assert log == [number for number in range(4) if number not in gone]
    mutex.release()
    for number in range(4):
        if number not in gone:
            handles[number].result(LIMIT_S)


def test_waiter_whose_loop_has_ended_is_passed_over() -> None:
    """A stock loop is closed under a task that waits; the hand-over goes to the next."""
    mutex = Mutex()
    loop = asyncio.SelectorEventLoop()

    async def taking() -> None:
        await mutex.acquire()

    mutex.acquire()
    task = loop.create_task(taking())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    second = Plain(mutex.acquire)
    until(lambda: len(mutex.waiters()) == 2, mutex)
    mutex.release()
    second.result(mutex)
    assert mutex.owner == second.ident
    task._log_destroy_pending = False       # type: ignore[attr-defined]
    task.get_coro().close()                 # type: ignore[union-attr]


def test_timeouts_of_asyncio() -> None:
    mutex = Mutex()

    async def impatient() -> None:
        async with asyncio.timeout(0.01):
            await mutex.acquire()

    mutex.acquire()
    with homeloop.IOThread() as io:
        with pytest.raises(TimeoutError):
            io.call(impatient())
        assert mutex.waiters() == ()
        mutex.release()
        with pytest.raises(WrongState):         # it ended as the owner: nobody else may release
            io.call(impatient())
            mutex.release()
    assert mutex.locked()


@pytest.mark.stress
def test_stress_cancellation_conserves_the_lock(parties: Parties) -> None:
    """Waiters are cancelled at any moment; the lock is never lost, and never had by two."""
    mutex, inside = Mutex(), [0]

    def taking() -> Script:
        for _ in range(20):
            yield mutex.acquire
            inside[0] += 1
            assert inside[0] == 1
            yield lambda: None
            inside[0] -= 1
            yield mutex.release

    def careful() -> Script:
        script = taking()
        value: Any = None
        try:
            while True:
                value = yield script.send(value)
        except StopIteration:
            return
        except BaseException:
            if mutex.held():
                inside[0] = 0
                mutex.release()
            raise

    handles = [parties.start(careful()) for _ in range(12)]
    for handle in handles[::2]:
        handle.cancel()
    for handle in handles[1::2]:
        handle.result(LIMIT_S)
    until(lambda: not mutex.waiters() and not mutex.locked(), mutex)
    with mutex:
        assert mutex.held()
