"""The connect thread and who waits for it: the bug of 2021, one waiter, cancelling, closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from homeloop.core.context import AioContext
from homeloop.core.runtime import Runtime, run
from homeloop.core.waiting import kick
from homeloop.errors import WrongState
from homeloop.nbd.connector import BACKOFF_S, Connector, Pacing
from homeloop.nbd.session import Session
from tests.nbd.talking import soon, turns, until

LIMIT_S = 10.0


class FakeSession:
    """Stands in for a Session."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeAttempt:
    """Stands in for an Attempt: begins, and ends as the test says."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.outcome: Any = FakeSession()
        self.given_up = False

    def run(self) -> Session:
        self.begun.set()
        assert self.go_on.wait(LIMIT_S)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        session: Session = self.outcome
        return session

    def give_up(self) -> None:
        self.given_up = True
        self.outcome = ConnectionAbortedError("given up")
        self.go_on.set()

    def end(self, outcome: Any = None) -> None:
        if outcome is not None:
            self.outcome = outcome
        self.go_on.set()


class Attempts:
    """Makes them, and keeps them."""

    def __init__(self) -> None:
        self.made: list[FakeAttempt] = []

    def __call__(self) -> Any:
        self.made.append(FakeAttempt())
        return self.made[-1]

    async def begun(self, number: int) -> FakeAttempt:
        await until(lambda: len(self.made) > number and self.made[number].begun.is_set())
        return self.made[number]


class WatchedMutex:
    """A plain mutex that the connect thread keeps, once it has woken somebody, until the home wants it.

    A thread that takes it twice is not left to hang.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.connected = threading.Event()          # the connect thread is about to publish
        self.wanted_at_home = threading.Event()
        self.taken_twice = False

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            self.taken_twice = True
            raise AssertionError("the woken coroutine runs on the stack of who holds the mutex")
        if self.connected.is_set() and threading.current_thread().name != "nbd-connect":
            self.wanted_at_home.set()
        assert self._lock.acquire(timeout=LIMIT_S)
        self._owner = me

    def __exit__(self, *_: object) -> None:
        if self.connected.is_set() and threading.current_thread().name == "nbd-connect" and not self.taken_twice:
            assert self.wanted_at_home.wait(LIMIT_S), "the woken coroutine has not come to its next step at home"
        self._owner = None
        self._lock.release()


def wait_nested(main: Any, connector: Connector, attempts: Attempts, mutex: WatchedMutex) -> list[str]:
    """On the main context's home: start the waiter, then sit in a nested wait until it has its session."""
    ran_in: list[str] = []

    async def waiter() -> None:
        await connector.session()
        ran_in.append(threading.current_thread().name)

    async def sit() -> None:
        co = main.spawn(waiter())
        await attempts.begun(0)
        mutex.connected.set()
        attempts.made[0].end()
        co.when_done(lambda _co: kick())
        assert main.wait_while(lambda: not co.done(), timeout=LIMIT_S), "the session did not come"
        await co

    main.spawn(sit()).result(3 * LIMIT_S)
    return ran_in


@pytest.mark.parametrize("big_lock", [True, False])
def test_the_bug_of_2021(big_lock: bool) -> None:
    """
        main home                               thread "nbd-connect"
        1 the coroutine takes the mutex, is
          the waiter, parks
        2 the home sits in a nested wait
        3                                       takes the mutex, publishes the session
        4                                       wakes the waiter, under the mutex: it only schedules
        5 the nested wait runs the coroutine:
          its next step wants the mutex
        6                                       lets the mutex go
        7 the coroutine has it: the session

    With a thread that passes for the main one, 4 runs the coroutine there, and 5 takes the mutex on the stack of its
    holder; or it waits for the main context, whose home is in 2.
    """
    with Runtime(name="app", big_lock=big_lock) as rt:
        attempts, mutex = Attempts(), WatchedMutex()
        connector = Connector(attempts, Pacing())
        connector._mutex = mutex  # type: ignore[assignment]
        home = rt.main.spawn(name_of_thread()).result(LIMIT_S)
        assert wait_nested(rt.main, connector, attempts, mutex) == [home]
        assert not mutex.taken_twice
        connector.close()


async def name_of_thread() -> str:
    return threading.current_thread().name


def test_the_bug_of_2021_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a connect thread that passes for the main context's home: it takes the mutex twice."""
    truth = AioContext.may_enter
    monkeypatch.setattr(
        AioContext, "may_enter",
        lambda context: threading.current_thread().name == "nbd-connect" or truth(context),     # QEMU's, until 2021
    )
    with Runtime(name="app", big_lock=False) as rt:
        attempts, mutex = Attempts(), WatchedMutex()
        connector = Connector(attempts, Pacing())
        connector._mutex = mutex  # type: ignore[assignment]
        with pytest.raises(AssertionError, match="on the stack of who holds the mutex"):
            wait_nested(rt.main, connector, attempts, mutex)
        assert mutex.taken_twice


def waiting(test: Callable[..., Any]) -> Callable[[], None]:
    """Run a test as a coroutine with a connector; closed at its end."""
    def run_it() -> None:
        async def main() -> None:
            attempts = Attempts()
            pauses: list[float] = []
            connector = Connector(attempts, Pacing(pause=lambda _stop, seconds: pauses.append(seconds)))
            try:
                await test(connector, attempts, pauses)
            finally:
                connector.close()

        run(main())

    run_it.__name__, run_it.__doc__ = test.__name__, test.__doc__
    return run_it


@waiting
async def test_one_waiter_at_a_time(connector: Connector, attempts: Attempts, pauses: list[float]) -> None:
    first = asyncio.ensure_future(spawned(connector.session()))
    attempt = await attempts.begun(0)
    with pytest.raises(WrongState, match="waits for the session already"):
        await soon(spawned(connector.session()))
    attempt.end()
    assert await soon(first) is attempt.outcome
    assert len(attempts.made) == 1


async def spawned(coro: Any) -> Any:
    """In a homeloop coroutine of its own, as the client does."""
    return await AioContext.of().spawn(coro)


@waiting
async def test_cancelling_the_waiter_leaves_the_thread(
    connector: Connector, attempts: Attempts, pauses: list[float]
) -> None:
    """Its session is the next waiter's; nothing is connected twice."""
    first = asyncio.ensure_future(spawned(connector.session()))
    attempt = await attempts.begun(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(first)
    second = asyncio.ensure_future(spawned(connector.session()))
    await turns()
    attempt.end()
    assert await soon(second) is attempt.outcome
    third = asyncio.ensure_future(spawned(connector.session()))
    attempt = await attempts.begun(1)
    third.cancel()
    await turns()
    attempt.end()                                   # while nobody waits
    await until(lambda: connector._session is not None)
    assert await soon(spawned(connector.session())) is attempt.outcome
    assert len(attempts.made) == 2


@waiting
async def test_attempts_and_pauses(connector: Connector, attempts: Attempts, pauses: list[float]) -> None:
    waiter = asyncio.ensure_future(spawned(connector.session()))
    for number in range(7):
        (await attempts.begun(number)).end(OSError(f"no {number}"))
        await until(lambda number=number: str(connector.failure) == f"no {number}")
        assert not waiter.done()
    (await attempts.begun(7)).end()
    await soon(waiter)
    assert pauses == [*BACKOFF_S, 16, 16]
    connector.works()
    waiter = asyncio.ensure_future(spawned(connector.session()))
    (await attempts.begun(8)).end()
    await soon(waiter)
    assert len(pauses) == 7


@waiting
async def test_without_retries(connector: Connector, attempts: Attempts, pauses: list[float]) -> None:
    """The waiter has the error of the first attempt; the thread goes on."""
    waiter = asyncio.ensure_future(spawned(connector.session(retry=False)))
    (await attempts.begun(0)).end(OSError("no"))
    with pytest.raises(OSError, match="no"):
        await soon(waiter)
    (await attempts.begun(1)).end()
    assert await soon(spawned(connector.session(retry=False))) is attempts.made[1].outcome


@waiting
async def test_close(connector: Connector, attempts: Attempts, pauses: list[float]) -> None:
    """The attempt is given up and the waiter told; a session that nobody took is closed."""
    waiter = asyncio.ensure_future(spawned(connector.session()))
    attempt = await attempts.begun(0)
    connector.close()
    with pytest.raises(WrongState, match="closed"):
        await soon(waiter)
    assert attempt.given_up
    with pytest.raises(WrongState, match="closed"):
        await soon(spawned(connector.session()))
    other = Connector(attempts, Pacing())
    waiter = asyncio.ensure_future(spawned(other.session()))
    attempt = await attempts.begun(1)
    waiter.cancel()
    await turns()
    attempt.end()
    await until(lambda: other._session is not None)
    other.close()
    assert attempt.outcome.closed


@waiting
async def test_close_in_a_callback_at_home(connector: Connector, attempts: Attempts, pauses: list[float]) -> None:
    """Outside any coroutine a wake would run the waiter at once, on the stack of close(), which has the mutex."""
    mutex = WatchedMutex()
    connector._mutex = mutex  # type: ignore[assignment]
    waiter = asyncio.ensure_future(spawned(connector.session()))
    await attempts.begun(0)
    asyncio.get_running_loop().call_soon(connector.close)
    with pytest.raises(WrongState, match="closed"):
        await soon(waiter)
    assert not mutex.taken_twice
