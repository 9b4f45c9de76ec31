"""Semaphore and SharedResource: never more than there is, and in the order of arrival."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import homeloop
from homeloop.errors import UsageError, WouldBlock, WouldBlockLoop, WrongState
from homeloop.sync import Semaphore, SharedResource
from tests.core.bounded import Plain, until
from tests.sync.parties import Parties, Script


def test_never_more_than_there_are(parties: Parties) -> None:
    semaphore = Semaphore(3, limit=3)
    inside: list[int] = []
    most = [0]

    def using(number: int) -> Script:
        for _ in range(20):
            yield semaphore.acquire
            inside.append(number)
            most[0] = max(most[0], len(inside))
            yield lambda: None
            inside.remove(number)
            yield semaphore.release

    for number in range(8):
        parties.start(using(number))
    parties.results()
    assert most[0] <= 3
    assert semaphore.value == 3


def test_a_large_request_is_not_starved(parties: Parties) -> None:
    """3 units free: 5 are asked for, then 1. The small one waits behind the large one."""
    resource = SharedResource(5)
    resource.acquire(2)
    log: list[int] = []

    def taking(units: int) -> Script:
        yield lambda: resource.acquire(units)
        log.append(units)
        yield lambda: resource.release(units)

    for count, units in enumerate((5, 1), 1):
        parties.start(taking(units))
        until(lambda count=count: len(resource.waiters()) == count, resource)
    with pytest.raises(WouldBlock):
        resource.acquire_nowait(1)
    assert log == []
    resource.release(2)
    parties.results()
    assert log == [5, 1]
    assert resource.available == resource.total == 5


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_cancelled_with_its_unit_passes_it_on(run: Any) -> None:
    async def main() -> None:
        semaphore = Semaphore(0)
        first = asyncio.create_task(semaphore.acquire())
        second = asyncio.create_task(semaphore.acquire())
        await asyncio.sleep(0)
        semaphore.release()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second
        assert semaphore.value == 0

    run(main())


def test_large_request_that_gives_up_lets_the_small_ones_go() -> None:
    resource = SharedResource(4)
    resource.acquire(3)
    large = Plain(resource.acquire, 4, 0.05)
    until(resource.waiters, resource)
    small = Plain(resource.acquire, 1)
    assert large.result(resource) is False
    assert small.result(resource) is True
    assert resource.available == 0


def test_forms() -> None:
    semaphore, resource = Semaphore(2), SharedResource(3)
    with semaphore, resource.take(2):
        assert (semaphore.value, resource.available) == (1, 1)
        assert resource.acquire(2, timeout=0.001) is False

    async def main() -> None:
        async with semaphore, resource.take(3):
            assert resource.available == 0
            with pytest.raises(WouldBlockLoop):
                with resource.take():
                    pass
            with pytest.raises(WouldBlockLoop):
                with semaphore:
                    pass

    asyncio.run(main())
    homeloop.run(main())
    assert (semaphore.value, resource.available) == (2, 3)


def test_resize_lets_go_and_holds_back(parties: Parties) -> None:
    """As anyio.CapacityLimiter.total_tokens: larger at once, smaller as it comes back; at 0 everybody waits."""
    limiter = Semaphore(1, limit=1)
    inside: list[int] = []

    def using(number: int) -> Script:
        yield limiter.acquire
        inside.append(number)

    limiter.acquire()
    for number in range(4):
        parties.start(using(number))
        until(lambda number=number: len(limiter.waiters()) == number + 1, limiter)
    limiter.resize(3)
    until(lambda: len(inside) == 2, limiter)
    assert (limiter.limit, limiter.value, len(limiter.waiters())) == (3, 0, 2)
    limiter.resize(0)
    assert limiter.value == -3
    assert limiter.locked()
    limiter.release(2)
    limiter.resize(2)               # one is taken still
    until(lambda: len(inside) == 3, limiter)
    assert len(limiter.waiters()) == 1
    limiter.release()
    parties.results()
    assert sorted(inside) == list(range(4))
    assert limiter.value == 0


def test_on_behalf_of_another() -> None:
    """A unit has no owner: who takes it need not be who gives it back, be it another task or thread."""
    limiter = Semaphore(1, limit=1)

    async def main() -> None:
        await limiter.acquire()
        await asyncio.create_task(give_back())
        async with limiter:
            await asyncio.to_thread(Plain(lambda: limiter.value).result)

    async def give_back() -> None:
        limiter.release()

    asyncio.run(main())
    Plain(limiter.acquire).result()
    limiter.release()
    assert limiter.value == 1


def test_resource_that_becomes_smaller(parties: Parties) -> None:
    """Nobody loses units; a request for more than there are is refused at its turn, those behind it go."""
    resource = SharedResource(8)
    resource.acquire(6)

    def taking(units: int) -> Script:
        try:
            yield lambda: resource.acquire(units)
        except WrongState as refusal:
            return str(refusal)
        return units

    handles = []
    for count, units in enumerate((5, 3), 1):
        handles.append(parties.start(taking(units)))
        until(lambda count=count: len(resource.waiters()) == count, resource)
    resource.resize(4)
    assert "smaller" in handles[0].result()
    assert resource.available == -2
    resource.release(6)             # more than there are now
    assert handles[1].result() == 3
    assert (resource.available, resource.total) == (1, 4)
    with pytest.raises(UsageError):
        resource.acquire(5)


def test_mistakes() -> None:
    for wrong in (lambda: Semaphore(-1), lambda: Semaphore(2, limit=1), lambda: SharedResource(0),
                  lambda: SharedResource(2).acquire(3), lambda: SharedResource(2).take(0),
                  lambda: Semaphore().release(0)):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(WrongState, match="3 of 2"):
        Semaphore(2, limit=2).release()
    with pytest.raises(WrongState):
        SharedResource(2).release(1)
    for wrong in (lambda: Semaphore(1, limit=1).resize(-1), lambda: SharedResource(1).resize(0),
                  lambda: SharedResource(1).release(0)):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(WrongState, match="no limit"):
        Semaphore(1).resize(2)
    empty = Semaphore(0)
    assert empty.locked()
    with pytest.raises(WouldBlock):
        empty.acquire_nowait()
