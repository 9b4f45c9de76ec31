"""Barrier: all or nobody, again and again."""

from __future__ import annotations

import asyncio

import pytest

from homeloop.errors import BarrierBroken, UsageError, WouldBlockLoop
from homeloop.sync import Barrier
from tests.core.bounded import LIMIT_S, until
from tests.sync.parties import Parties, Script


def test_rounds(parties: Parties) -> None:
    barrier, rounds = Barrier(4), [0] * 4

    def meeting(number: int) -> Script:
        places = []
        for _ in range(10):
            rounds[number] += 1
            places.append((yield barrier.wait))
            assert min(rounds) >= len(places)       # nobody goes before all have come
        return places

    for number in range(4):
        parties.start(meeting(number))
    for places in zip(*parties.results(), strict=True):
        assert sorted(places) == [0, 1, 2, 3]
    assert barrier.n_waiting == 0


def test_abort_and_reset(parties: Parties) -> None:
    barrier = Barrier(3)

    def meeting() -> Script:
        try:
            return (yield barrier.wait)
        except BarrierBroken:
            return "broken"

    handles = [parties.start(meeting()) for _ in range(2)]
    until(lambda: barrier.n_waiting == 2, barrier)
    barrier.abort()
    assert [handle.result(LIMIT_S) for handle in handles] == ["broken"] * 2
    assert barrier.broken
    assert parties.start(meeting()).result(LIMIT_S) == "broken"
    barrier.reset()
    handles = [parties.start(meeting()) for _ in range(3)]
    assert sorted(handle.result(LIMIT_S) for handle in handles) == [0, 1, 2]


def test_who_leaves_does_not_count() -> None:
    barrier = Barrier(2)
    with pytest.raises(TimeoutError):
        barrier.wait(timeout=0.001)
    assert barrier.n_waiting == 0

    async def main() -> None:
        gone = asyncio.create_task(barrier.wait())
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert barrier.n_waiting == 0
        assert sorted(await asyncio.gather(barrier.wait(), barrier.wait())) == [0, 1]
        with pytest.raises(WouldBlockLoop):
            barrier.wait(timeout=1)

    asyncio.run(main())
    with pytest.raises(UsageError):
        Barrier(0)
