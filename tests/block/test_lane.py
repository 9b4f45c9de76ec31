"""Batches to workers and back: one wake, one message, nothing lost, and nobody waits for a slow neighbour."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import homeloop
from homeloop.block import lane as lane_module
from homeloop.block.lane import Job, Lane
from tests.block.answers import BOUND_S

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.run, homeloop.run], ids=["asyncio", "homeloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """A plain asyncio loop and its executor; and ours, with its pool."""
    return request.param    # type: ignore[no-any-return]


class Inbox:
    """Collects the jobs that are delivered."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.came = asyncio.Event()

    def __call__(self, job: Job) -> None:
        self.jobs.append(job)
        self.came.set()

    async def until(self, count: int) -> list[Job]:
        async with asyncio.timeout(BOUND_S):
            while len(self.jobs) < count:
                self.came.clear()
                await self.came.wait()
        return self.jobs


def starts_of(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Note each start of a drain."""
    starts: list[None] = []
    start = lane_module._Home.start

    def noting(self: Any, fn: Callable[[], None]) -> None:
        starts.append(None)
        start(self, fn)

    monkeypatch.setattr(lane_module._Home, "start", noting)
    return starts


@pytest.mark.parametrize("parallel", [False, True])
def test_one_turn_is_one_wake(run: Run, parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = starts_of(monkeypatch)

    async def main() -> None:
        lane, inbox = Lane(parallel=parallel), Inbox()
        for number in range(100):
            lane.put(Job(lambda number=number: number, (), inbox))
        assert starts == []                     # gathered until the turn's end, or push()
        lane.push()
        lane.push()                             # nothing is left: nothing more is started
        jobs = await inbox.until(100)
        assert [job.answer for job in jobs] == list(range(100))

    run(main())
    assert len(starts) == 1


def test_jobs_that_block_get_threads_of_their_own(run: Run) -> None:
    together = threading.Barrier(5)

    async def main() -> None:
        lane, inbox = Lane(parallel=True), Inbox()
        for _ in range(5):
            lane.put(Job(together.wait, (BOUND_S,), inbox))     # BrokenBarrierError if fewer than five ever run
        jobs = await inbox.until(5)
        assert [job.error for job in jobs] == [None] * 5

    run(main())


def test_a_done_job_does_not_wait_for_its_slow_neighbour(run: Run) -> None:
    """The drain is stuck in the second: nobody but the home's own look can deliver the first."""

    async def main() -> None:
        lane, inbox, let_go = Lane(parallel=False), Inbox(), threading.Event()
        lane.put(Job(lambda: "quick", (), inbox))
        lane.put(Job(let_go.wait, (BOUND_S,), inbox))
        (job,) = await inbox.until(1)
        assert job.answer == "quick"
        let_go.set()
        await inbox.until(2)

    run(main())


def test_withdraw(run: Run) -> None:
    async def main() -> None:
        lane, inbox = Lane(parallel=False), Inbox()
        begun, let_go = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            assert let_go.wait(BOUND_S)

        running, waiting, new = Job(hold, (), inbox), Job(hold, (), inbox), Job(hold, (), inbox)
        lane.put(running)
        lane.put(waiting)
        lane.push()
        lane.put(new)
        assert await asyncio.to_thread(begun.wait, BOUND_S)
        assert lane.withdraw(new)
        assert lane.withdraw(waiting)
        assert not lane.withdraw(waiting)
        assert not lane.withdraw(running)
        let_go.set()
        assert await inbox.until(1) == [running]

    run(main())


def test_a_drain_lets_others_have_its_thread(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one worker thread, a busy lane would starve every other device of the IOThread."""
    monkeypatch.setattr(lane_module, "_DRAIN_JOBS_MAX", 3)
    starts = starts_of(monkeypatch)

    async def main() -> None:
        lane, inbox = Lane(parallel=False), Inbox()
        for number in range(10):
            lane.put(Job(lambda number=number: number, (), inbox))
        jobs = await inbox.until(10)
        assert [job.answer for job in jobs] == list(range(10))

    run(main())
    assert len(starts) == 4


def test_no_thread_can_be_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs fail, the lane does not: later ones run again."""
    start = lane_module._Home.start

    def refuse(self: Any, fn: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        lane = Lane(parallel=False)
        monkeypatch.setattr(lane_module._Home, "start", refuse)
        both = await asyncio.gather(lane.run(int), lane.run(int), return_exceptions=True)
        assert [str(error) for error in both] == ["can't start new thread"] * 2
        monkeypatch.setattr(lane_module._Home, "start", start)
        assert await lane.run(int, "7") == 7

    run(main())


@pytest.mark.parametrize("parallel", [False, True])
def test_conservation(run: Run, parallel: bool, seed: int) -> None:
    """Every job is delivered exactly once, or was withdrawn and never called."""

    async def main() -> None:
        chance = random.Random(seed)
        lane, inbox = Lane(parallel=parallel), Inbox()
        called: list[int] = []                  # append is atomic with the GIL and without
        put = withdrawn = 0
        for number in range(2000):
            job = Job(called.append, (number,), inbox)
            lane.put(job)
            put += 1
            if chance.random() < 0.2:
                lane.push()
            if chance.random() < 0.1:
                withdrawn += lane.withdraw(job)
            if chance.random() < 0.05:
                await asyncio.sleep(0)
        jobs = await inbox.until(put - withdrawn)
        assert len(set(map(id, jobs))) == len(jobs) == put - withdrawn
        assert sorted(called) == sorted(job.args[0] for job in jobs)
        if not parallel:
            assert called == sorted(called)

    run(main())
