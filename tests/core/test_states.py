"""The table of a coroutine's moves: what coroutines do is in it, and all that is in it they do."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import homeloop
from homeloop.core import context as context_module
from homeloop.core.coroutine import Coroutine
from homeloop.core.states import NEXT, CoroutineState
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, until

S = CoroutineState
moves: Counter[tuple[CoroutineState | None, CoroutineState]] = Counter()


class Checked(Coroutine[Any]):
    """A coroutine whose moves are counted."""

    __slots__ = ("_now",)

    @property
    def _state(self) -> CoroutineState:
        return self._now

    @_state.setter
    def _state(self, new: CoroutineState) -> None:      # type: ignore[override]
        moves[getattr(self, "_now", None), new] += 1
        self._now = new


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(context_module, "Coroutine", Checked)
    moves.clear()
    yield
    assert sum(moves.values()) > 0
    illegal = {(old, new) for old, new in moves if new not in (NEXT[old] if old is not None else {S.CREATED})}
    assert not illegal


async def parks() -> None:
    await homeloop.park()


async def waits() -> None:
    await asyncio.get_running_loop().create_future()


def test_every_move_of_the_table() -> None:
    """One after the other, each in the way that it comes about."""
    with homeloop.IOThread() as io:
        context = io.context
        never = context.create(parks())
        never.cancel()                                          # CREATED -> SCHEDULED -> DONE
        until(never.done)

        async def yields() -> None:
            await asyncio.sleep(0)

        io.call(yields())                                       # RUNNING -> SCHEDULED -> RUNNING -> DONE
        parked, waiting, queued = io.spawn(parks()), io.spawn(waits()), context.create(parks())
        until(lambda: parked.state is S.PARKED)
        until(lambda: waiting.state is S.WAITING)
        queued.schedule()
        parked.wake()
        waiting.cancel()
        until(waiting.done)
        io.spawn(parks())
    seldom = {(S.PARKED, S.DONE), (S.WAITING, S.DONE)}         # only by a second Ctrl-C at the end of a context
    for old, nexts in NEXT.items():
        for new in nexts:
            assert moves[old, new] or (old, new) in seldom, f"{old} -> {new} was not seen: {moves}"


def test_moves_under_stress(seed: int) -> None:
    """Wakes, schedules, cancellations from three threads and from home, over coroutines that park, wait and yield."""
    end = time.monotonic() + STRESS_S / 2
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        contexts = [rt.main, io.context]

        async def lives(moves: random.Random) -> None:
            for _ in range(moves.randrange(1, 6)):
                how = moves.randrange(4)
                if how == 0:
                    await homeloop.park()
                elif how == 1:
                    await asyncio.sleep(0)
                elif how == 2:
                    await asyncio.sleep(0.001)      # tidy: allow sleep: a timer is one of the ways to wait
                else:
                    await homeloop.to_worker(int)

        def disturbs(seed: int) -> None:
            moves = random.Random(seed)
            while time.monotonic() < end:
                cos = [moves.choice(contexts).create(lives(random.Random(moves.random()))) for _ in range(10)]
                while not all(co.done() for co in cos):
                    co = moves.choice(cos)
                    moves.choice([co.wake, co.wake, co.schedule, co.cancel])()
                for co in cos:
                    assert co.cancelled() or co.result(LIMIT_S) is None

        threads = [Plain(disturbs, seed + number) for number in range(3)]
        for thread in threads:
            thread.result()


def test_moves_at_the_end_of_a_context() -> None:
    """What has begun is cancelled, what has not is abandoned."""
    io = homeloop.IOThread().start()
    cos = [io.spawn(coro()) for coro in (parks, waits) for _ in range(3)]
    created = [io.context.create(parks()) for _ in range(3)]
    go = threading.Event()
    io.post(go.wait, LIMIT_S)
    cos += [io.spawn(parks()) for _ in range(3)]
    go.set()
    io.stop()
    assert all(co.done() for co in cos)
    for co in created:
        assert not co.schedule()
        assert co.done()
