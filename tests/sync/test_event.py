"""Event and OneShot: one sets, many wait, wherever they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import homeloop
from homeloop.errors import WouldBlockLoop
from homeloop.sync import Event
from tests.core.bounded import LIMIT_S, Plain, until
from tests.sync.parties import Parties, Script


def waiting(event: Event) -> Script:
    return (yield event.wait)


def test_set_lets_everybody_go(parties: Parties) -> None:
    event = Event()
    for _ in range(6):
        parties.start(waiting(event))
    until(lambda: len(event.waiters()) == 6, event)
    event.set()
    event.clear()                       # at once: it was for those who waited then
    assert parties.results() == [True] * 6
    assert not event.is_set()


def test_set_before_the_wait(parties: Parties) -> None:
    event = Event()
    event.set()
    for _ in range(3):
        parties.start(waiting(event))
    assert parties.results() == [True] * 3


def test_set_by_any_of_them(parties: Parties) -> None:
    event = Event()
    waiter = Plain(event.wait)

    def setting() -> Script:
        yield event.set

    parties.start(setting())
    parties.results()
    assert waiter.result(event) is True


def test_timeout_and_cancellation_leave_the_line() -> None:
    event = Event("ready")
    assert event.wait(timeout=0) is False
    assert event.wait(timeout=0.001) is False

    async def main() -> None:
        task = asyncio.create_task(event.wait())
        await asyncio.sleep(0)
        assert "ready" in repr(event)
        assert "waits for wait" in event.waiters()[0]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert event.waiters() == ()


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_synchronous_form_in_a_thread_that_serves_a_loop(run: Any) -> None:
    event = Event()
    event.set()

    async def main() -> None:
        with pytest.raises(WouldBlockLoop):
            event.wait(timeout=1)
        assert await event.wait() is True

    run(main())


def test_rule11_the_big_lock_is_let_go_while_its_holder_waits() -> None:
    event = Event()

    async def setting() -> None:
        event.set()

    with homeloop.Runtime() as rt:
        with rt.big_lock:
            rt.main.spawn(setting())
            assert event.wait(timeout=LIMIT_S)
            assert rt.big_lock.held()
            event.clear()
            assert not event.wait(timeout=0.01)
