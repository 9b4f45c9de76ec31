"""RwLock: tickets in order, downgrade without a gap, upgrade that says whether there was one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import homeloop
from homeloop.errors import WouldBlock, WouldBlockLoop, WouldDeadlock, WrongState
from homeloop.sync import Barrier, RwLock
from tests.core.bounded import LIMIT_S, Plain, until
from tests.sync.parties import Parties, Script


def ticket(lock: RwLock, log: list[str], name: str) -> Script:
    side = lock.write if name[0] == "w" else lock.read
    yield side.acquire
    log.append(name)
    yield side.release


def test_tickets_in_order(parties: Parties) -> None:
    """A writer who waits keeps readers out who come later, though a reader has the lock."""
    lock, log = RwLock(), []
    lock.read.acquire()
    names = ["w1", "r2", "r3", "w4", "r5", "w6"]
    for count, name in enumerate(names, 1):
        parties.start(ticket(lock, log, name))
        until(lambda count=count: len(lock.waiters()) == count, lock)
    lock.release()
    parties.results()
    assert [sorted(log[:1]), sorted(log[1:3]), log[3:]] == [["w1"], ["r2", "r3"], ["w4", "r5", "w6"]]


def test_writers_exclude_everybody(parties: Parties) -> None:
    lock, state = RwLock(), [0, 0]

    def reading() -> Script:
        for _ in range(20):
            yield lock.read.acquire
            before = state[0]
            yield lambda: None
            assert (state[0], state[1]) == (before, 0)
            yield lock.release

    def writing() -> Script:
        for _ in range(20):
            yield lock.write.acquire
            state[0] += 1
            state[1] += 1
            yield lambda: None
            state[1] -= 1
            assert state[1] == 0
            yield lock.release

    for number in range(8):
        parties.start(writing() if number % 3 == 0 else reading())
    parties.results()
    assert state == [60, 0]
    assert lock.readers == 0
    assert lock.writer is None


def test_readers_are_together(parties: Parties) -> None:
    lock, all_in = RwLock(), Barrier(4)

    def meet() -> Script:
        yield lock.read.acquire
        yield all_in.wait
        yield lock.release

    for _ in range(4):
        parties.start(meet())
    parties.results()
    assert lock.readers == 0


def test_downgrade_has_no_gap() -> None:
    lock = RwLock()
    lock.write.acquire()
    log: list[str] = []
    reader = Plain(lambda: (lock.read.acquire(), log.append("r"), lock.release()))
    until(lambda: len(lock.waiters()) == 1, lock)
    writer = Plain(lambda: (lock.write.acquire(), log.append("w"), lock.release()))
    until(lambda: len(lock.waiters()) == 2, lock)
    lock.downgrade()
    reader.result(lock)                     # the reader at the head joins
    assert log == ["r"]
    assert writer.running()                 # the writer waits for us
    lock.release()
    writer.result(lock)


def test_upgrade_says_whether_others_may_have_written() -> None:
    lock = RwLock()
    with lock.read:
        assert lock.upgrade() is True
        assert lock.write.held()
    assert lock.writer is None
    value = [0]

    def other() -> bool:
        with lock.read:
            taken.append(1)
            until(lambda: len(taken) == 2, lock)
            again = lock.upgrade()
            value[0] += 1
            return again

    taken: list[int] = []
    both = [Plain(other), Plain(other)]     # two who upgrade: no deadlock
    assert sum(who.result(lock) for who in both) <= 1
    assert value == [2]


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_cancelled_upgrade_is_a_reader_again(run: Any) -> None:
    async def main() -> None:
        lock = RwLock()
        cancelled = []

        async def upgrading() -> None:
            async with lock.read:
                try:
                    await lock.upgrade()
                except asyncio.CancelledError:
                    cancelled.append(lock.read.held())
                    raise

        async with lock.read:
            task = asyncio.create_task(upgrading())
            for _ in range(2):
                await asyncio.sleep(0)
            assert len(lock.waiters()) == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert cancelled == [True]
        assert lock.readers == 0

    run(main())


def test_cancelled_writer_lets_the_readers_behind_it_go(parties: Parties) -> None:
    async def main() -> None:
        lock = RwLock()
        async with lock.read:
            writer = asyncio.create_task(lock.write.acquire())
            await asyncio.sleep(0)
            reader = asyncio.create_task(lock.read.acquire())
            await asyncio.sleep(0)
            assert len(lock.waiters()) == 2
            writer.cancel()
            assert await reader
            assert lock.readers == 2

    asyncio.run(main())
    lock = RwLock()
    lock.read.acquire()
    writer = Plain(lock.write.acquire, 0.05)
    until(lambda: lock.waiters(), lock)
    handle = parties.start(ticket(lock, [], "r"))
    assert writer.result(lock) is False
    handle.result(LIMIT_S)


def test_mistakes() -> None:
    lock = RwLock("image")
    for wrong in (lock.release, lock.downgrade, lock.upgrade):
        with pytest.raises(WrongState, match="image"):
            wrong()
    with lock.read:
        with pytest.raises(WouldDeadlock):
            lock.read.acquire()
        with pytest.raises(WouldDeadlock):
            lock.write.acquire()
        with pytest.raises(WouldBlock):
            Plain(lock.write.acquire_nowait).result()

    async def main() -> None:
        with pytest.raises(WouldBlockLoop):
            with lock.read:
                pass

    asyncio.run(main())
    homeloop.run(main())
