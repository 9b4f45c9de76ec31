"""Condition: on any of our locks; a notification is neither lost nor doubled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import homeloop
from homeloop.errors import WouldBlockLoop, WrongState
from homeloop.sync import Condition, Mutex, RwLock
from tests.core.bounded import Plain, until
from tests.sync.parties import Parties, Script


def waiting(condition: Condition) -> Script:
    yield condition.acquire
    result = yield condition.wait
    yield condition.release
    return result


@pytest.mark.parametrize("lock", ["own", "mutex", "rwlock"])
def test_notify(parties: Parties, lock: str) -> None:
    condition = Condition({"own": None, "mutex": Mutex(), "rwlock": RwLock().write}[lock])
    for _ in range(4):
        parties.start(waiting(condition))
    until(lambda: len(condition.waiters()) == 4, condition)
    with condition:
        condition.notify(2)
    until(lambda: sum(handle.done() for handle in parties.handles) == 2, condition)
    assert len(condition.waiters()) == 2
    with condition:
        condition.notify_all()
    assert parties.results() == [True] * 4


def test_hand_a_number_round(parties: Parties) -> None:
    """Each of 4 waits for its turn, 10 times: every turn comes once, in order."""
    condition, turn, log = Condition(), [0], []

    def playing(number: int) -> Script:
        for _ in range(10):
            yield condition.acquire
            yield lambda: condition.wait_for(lambda: turn[0] % 4 == number)
            log.append(turn[0])
            turn[0] += 1
            condition_notify = condition.notify_all
            yield condition_notify
            yield condition.release

    for number in range(4):
        parties.start(playing(number))
    parties.results()
    assert log == list(range(40))


def test_timeout_takes_the_lock_again() -> None:
    condition = Condition()
    with condition:
        assert condition.wait(timeout=0.001) is False
        assert condition.lock.held()
        assert condition.wait_for(lambda: False, timeout=0.001) is False
    assert condition.waiters() == ()


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_notified_and_cancelled_passes_it_on(run: Any) -> None:
    async def main() -> None:
        condition = Condition()

        async def wait() -> bool:
            async with condition:
                return bool(await condition.wait())

        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(condition.waiters()) == 2
        async with condition:
            condition.notify()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second
        assert not condition.lock.locked()      # type: ignore[attr-defined]

    run(main())


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_cancelled_while_it_takes_the_lock_again(run: Any) -> None:
    """It gets the lock before CancelledError is raised, and passes the notification on."""

    async def main() -> None:
        condition = Condition()
        held = []

        async def wait() -> None:
            async with condition:
                try:
                    await condition.wait()
                except asyncio.CancelledError:
                    held.append(condition.lock.held())
                    raise

        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        for _ in range(3):
            await asyncio.sleep(0)
        async with condition:
            condition.notify()
            for _ in range(3):
                await asyncio.sleep(0)          # first waits for the lock now
            first.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
            assert not first.done()
        await asyncio.wait_for(second, 10)
        assert first.cancelled()
        assert held == [True]

    run(main())


def test_mistakes() -> None:
    condition = Condition()
    for wrong in (condition.wait, condition.notify, condition.notify_all):
        with pytest.raises(WrongState, match="does not own its lock"):
            wrong()
    with condition:
        with pytest.raises(WrongState):
            Plain(condition.notify).result()

    async def main() -> None:
        async with condition:
            with pytest.raises(WouldBlockLoop):
                condition.wait(timeout=1)

    asyncio.run(main())
    homeloop.run(main())
