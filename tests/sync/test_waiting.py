"""The wait queue under all of them, driven directly: who is woken, who is passed over, what is said about it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

import homeloop
from homeloop.errors import WouldBlockLoop
from homeloop.sync.waiting import (
    LoopWaiter,
    ThreadWaiter,
    Waitable,
    Waiter,
    caller,
    in_coroutine,
    name_of,
    plain_thread,
)
from tests.core.bounded import LIMIT_S, Plain, until, wait


class Ticket(Waitable):
    """Grants as many as there are tickets."""

    __slots__ = ("tickets",)

    def __init__(self) -> None:
        super().__init__("tickets")
        self.tickets = 0

    def __repr__(self) -> str:
        return self._describe(f"tickets={self.tickets}")

    def add(self) -> None:
        with self._lock:
            self.tickets += 1
            woken = self._grant_locked()
        self._wake(woken)

    def _grant_locked(self) -> Sequence[Waiter]:
        woken = []
        while self._line and self.tickets:
            self.tickets -= 1
            woken.append(self._pop_locked())
        return woken

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        self.tickets += 1
        return self._grant_locked()


class Dead(Waiter):
    """A waiter that nobody can wake any more."""

    __slots__ = ()

    def wake(self) -> bool:
        return False


def test_whom_nobody_can_wake_is_passed_over() -> None:
    ticket = Ticket()
    for _ in range(2000):               # one behind the other, without recursion
        assert not ticket._line_up(Dead(None, "nothing"))
    alive = ThreadWaiter(threading.get_ident(), "ticket")
    assert not ticket._line_up(alive)
    ticket.add()
    assert ticket._block(alive, LIMIT_S)
    assert ticket.tickets == 0
    assert ticket.waiters() == ()


def test_grant_in_the_last_moment_of_a_timeout_counts() -> None:
    """The time is over, and before the waiter gets the lock it is granted: it has it."""
    ticket = Ticket()

    class Late(ThreadWaiter):
        __slots__ = ()

        def sleep(self, timeout: float | None) -> bool:
            ticket.add()
            return False

    waiter = Late(threading.get_ident(), "ticket")
    ticket._line_up(waiter)
    assert ticket._block(waiter, 0.0) is True
    assert ticket.tickets == 0


def test_interrupted_thread_passes_it_on() -> None:
    ticket = Ticket()

    class Interrupted(ThreadWaiter):
        __slots__ = ()

        def sleep(self, timeout: float | None) -> bool:
            ticket.add()
            raise KeyboardInterrupt

    waiter = Interrupted(threading.get_ident(), "ticket")
    ticket._line_up(waiter)
    with pytest.raises(KeyboardInterrupt):
        ticket._block(waiter, None)
    assert ticket.tickets == 1


def test_who_calls() -> None:
    assert caller() == threading.get_ident()
    assert not in_coroutine()
    assert name_of(None) == "nobody"
    assert "MainThread" in name_of(caller())

    async def main() -> None:
        assert in_coroutine()
        assert caller() is asyncio.current_task()

    asyncio.run(main())
    homeloop.run(main())


def test_a_reason_per_wait() -> None:
    async def main() -> tuple[str, ...]:
        ticket = Ticket()
        waiter = LoopWaiter(caller(), "a good reason")
        ticket._line_up(waiter)
        told = ticket.waiters()
        ticket.add()
        await ticket._sleep(waiter)
        return told

    (told,) = asyncio.run(main())
    assert "a good reason" in told
    assert "Task-" in told


def test_plain_thread_says_both_sides() -> None:
    ticket = Ticket()
    assert plain_thread(ticket, "wait") is None

    async def main() -> None:
        with pytest.raises(WouldBlockLoop, match=r"tickets=0.*coroutine.*serves"):
            plain_thread(ticket, "wait")

    with homeloop.IOThread("disk") as io, homeloop.Runtime() as rt:
        io.call(main())
        rt.call(main())
        with rt.big_lock:
            assert plain_thread(ticket, "wait") is rt.main
            assert Plain(plain_thread, ticket, "wait").result() is None
    asyncio.run(main())


def test_direct_entry_from_another_thread() -> None:
    """The waiter runs as its wake is taken, before what was ready behind it; the loop need not go round again."""
    log: list[str] = []
    ticket = Ticket()
    entered, unblock = threading.Event(), threading.Event()

    async def waiting() -> None:
        waiter = LoopWaiter(caller(), "ticket")
        ticket._line_up(waiter)
        await ticket._sleep(waiter)
        log.append("waiter")

    def block() -> None:
        entered.set()
        wait(unblock)

    with homeloop.IOThread() as io:
        co = io.spawn(waiting())
        until(ticket.waiters, ticket)
        io.post(block)
        wait(entered)
        ticket.add()
        io.post(log.append, "post")
        unblock.set()
        co.result(LIMIT_S)
        io.call(asyncio.sleep(0))
    assert log == ["waiter", "post"]


def test_wake_at_home_does_not_interrupt_the_caller() -> None:
    log: list[str] = []
    ticket = Ticket()

    async def waiting() -> None:
        waiter = LoopWaiter(caller(), "ticket")
        ticket._line_up(waiter)
        await ticket._sleep(waiter)
        log.append("waiter")

    def add() -> None:
        ticket.add()
        log.append("caller")

    with homeloop.IOThread() as io:
        co = io.spawn(waiting())
        until(ticket.waiters, ticket)
        io.post(add)
        co.result(LIMIT_S)
    assert log == ["caller", "waiter"]


@pytest.mark.parametrize("granted", ["before", "behind", "never"])
def test_cancelled_at_every_point(granted: str) -> None:
    """In one callback at home: granted before the cancellation, behind it, or not at all."""
    ticket = Ticket()

    async def waiting() -> None:
        waiter = LoopWaiter(caller(), "ticket")
        ticket._line_up(waiter)
        await ticket._sleep(waiter)

    with homeloop.IOThread() as io:
        co = io.spawn(waiting())
        until(ticket.waiters, ticket)

        def both() -> None:
            if granted == "before":
                ticket.add()
            co.cancel("enough")
            if granted == "behind":
                ticket.add()

        io.post(both)
        with pytest.raises(asyncio.CancelledError, match="enough"):
            co.result(LIMIT_S)
    assert ticket.waiters() == ()
    assert ticket.tickets == (granted != "never")


def test_cancelled_before_it_waits() -> None:
    ticket = Ticket()

    async def waiting() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        waiter = LoopWaiter(caller(), "ticket")
        ticket._line_up(waiter)
        me.cancel()
        await ticket._sleep(waiter)

    with homeloop.IOThread() as io:
        with pytest.raises(asyncio.CancelledError):
            io.call(waiting(), timeout=LIMIT_S)
    assert ticket.waiters() == ()
