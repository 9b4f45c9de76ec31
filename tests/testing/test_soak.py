"""The soak passes over what is right, and finds a wake that is lost, one that is doubled, one that raises."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import homeloop
from homeloop.testing.soak import lost_wake_soak

Pair = tuple[Callable[[], Awaitable[object]], Callable[[], object]]


class Parked:
    """park() and wake(), as the contract has them."""

    def __init__(self, returns: int = 1) -> None:
        self.co: homeloop.Coroutine[object] | None = None
        self.returns = returns
        self._extra = 0

    async def wait(self) -> None:
        self.co = homeloop.current_coroutine()
        if self._extra:
            self._extra -= 1
            return
        await homeloop.park("soak")
        self._extra = self.returns - 1

    def wake(self) -> None:
        while self.co is None:
            pass
        self.co.wake()


def parked() -> Pair:
    pair = Parked()
    return pair.wait, pair.wake


def test_what_is_right_passes(seed: int) -> None:
    report = lost_wake_soak(parked, wakes=1_000, threads=2, seed=seed)
    assert report.wakes == 1_000
    assert report.seed == seed


def test_in_a_context_of_the_callers(seed: int) -> None:
    with homeloop.Runtime() as rt:
        assert lost_wake_soak(parked, context=rt.main, wakes=300, threads=1, seed=seed).wakes == 300


def test_a_future_set_from_the_wrong_thread_is_lost() -> None:
    """asyncio's own loop lets any thread set an event, and sleeps on."""
    def naive() -> Pair:
        event = asyncio.Event()

        async def wait() -> None:
            await event.wait()
            event.clear()

        return wait, event.set

    with homeloop.IOThread(loop_factory=asyncio.SelectorEventLoop) as io:
        with pytest.raises(AssertionError, match="was lost") as failure:
            lost_wake_soak(naive, context=io.context, wakes=2_000, threads=1, limit_s=0.3)
        assert "soaked" in str(failure.value)           # the snapshot shows who waits
        assert any("seed" in note for note in failure.value.__notes__)


def test_the_same_on_our_loop_raises_in_the_waker() -> None:
    def naive() -> Pair:
        event = asyncio.Event()

        async def wait() -> None:
            await event.wait()
            event.clear()

        return wait, event.set

    with pytest.raises(homeloop.WrongThread):
        lost_wake_soak(naive, wakes=200, threads=1, limit_s=5)


def test_a_doubled_wake_is_found(seed: int) -> None:
    def doubled() -> Pair:
        pair = Parked(returns=2)
        return pair.wait, pair.wake

    with pytest.raises(AssertionError, match="times for"):
        lost_wake_soak(doubled, wakes=500, threads=1, limit_s=5, seed=seed)
    assert lost_wake_soak(doubled, wakes=100, threads=1, exact=False, seed=seed).wakes == 100


def test_what_the_waiter_raises_is_raised() -> None:
    async def wait() -> None:
        raise LookupError("of the waiter")

    with pytest.raises(LookupError, match="of the waiter"):
        lost_wake_soak(lambda: (wait, lambda: None), wakes=10, threads=1)
