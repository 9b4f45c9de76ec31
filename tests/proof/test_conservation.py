"""Stress with conservation: nothing lost, nothing twice, counters agree, nothing left behind.

Hoppers are coroutines that run() visits in random contexts, visits in visits, park, yield and use workers. Threads wake
and cancel them from everywhere; others start IOThreads, send visits there and stop them in the middle of it. At the end

    for each hopper     hops sent == returned + cancelled + ended over there + refused
                        wakes accepted == parks returned, and one if a wake is still remembered
    for each context    visits entered == visits left; callbacks accepted == callbacks run; home only, one at a time
    for the process     no thread, file descriptor, coroutine or context is left

HOMELOOP_STRESS_S makes it minutes, HOMELOOP_SEED repeats the moves (not the timing).
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import ExitStack

import pytest

import homeloop
from homeloop.testing.leaks import leak_check
from homeloop.testing.snapshots import snapshot
from tests.core.bounded import STRESS_S

THREADS = 3
HOPPERS = 12
MOVES = ("wake", "wake", "schedule", "with lock", "from there", "cancel", "post", "call")
END_WITHIN_S = 30.0


class Place:
    """A context and what was counted there, by its home."""

    def __init__(self, context: homeloop.AioContext) -> None:
        self.context = context
        self.entered = 0
        self.left = 0
        self.ran = 0                                    # posted callbacks
        self.woken: Counter[Hopper] = Counter()         # wakes that posted callbacks sent and had accepted
        self._busy = False

    async def visit(self, onward: list[Place]) -> int:
        """Be here; perhaps go on from here. Returns how many places it has been in."""
        self.check_alone()
        self.entered += 1
        try:
            await asyncio.sleep(0)
            assert homeloop.current_context() is self.context
            if onward:
                return 1 + await onward[0].context.run(onward[0].visit(onward[1:]))
            return 1
        finally:
            self.left += 1

    def check_alone(self) -> None:
        assert not self._busy, "two threads in one context"
        self._busy = True
        assert homeloop.current_context() is self.context
        self._busy = False

    def count(self) -> None:
        self.check_alone()
        self.ran += 1

    def wake(self, hopper: Hopper) -> None:
        self.woken[hopper] += hopper.co.wake()


class World:
    """The places that stay, and the one that comes and goes."""

    def __init__(self, rt: homeloop.Runtime, places: list[Place], with_lock: bool) -> None:
        self.rt = rt
        self.with_lock = with_lock
        self.places = places
        self.passing: Place | None = None               # set by the thread that starts and stops it
        self.stop = False

    def any_place(self, moves: random.Random) -> Place:
        passing = self.passing
        return passing if passing is not None and moves.random() < 0.2 else moves.choice(self.places)


class Hopper:
    """A coroutine that counts what it does; its fields are its home's."""

    def __init__(self, world: World, home: Place, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._world = world
        self._moves = random.Random(seed)
        self.co = home.context.spawn(self._run(), name=f"hopper {seed}")

    async def _run(self) -> None:
        co = homeloop.current_coroutine()
        assert co is not None
        while not self._world.stop:
            try:
                await self._move()
            except asyncio.CancelledError:
                self.counts["cancellations"] += 1
                while co.uncancel():
                    pass

    async def _move(self) -> None:
        move = self._moves.choice(("hop", "hop", "park", "yield", "worker"))
        if move == "hop":
            await self._hop()
        elif move == "park":
            await homeloop.park("conservation")
            self.counts["parks"] += 1
        elif move == "yield":
            await asyncio.sleep(0)
        else:
            assert await homeloop.to_worker(threading.get_ident) != threading.get_ident()

    async def _hop(self) -> None:
        places = [self._world.any_place(self._moves) for _ in range(self._moves.choice((1, 1, 2, 3)))]
        self.counts["sent"] += 1
        try:
            been = await places[0].context.run(places[0].visit(places[1:]))
        except homeloop.ContextClosed:
            self.counts["refused"] += 1
        except asyncio.CancelledError:
            if homeloop.current_coroutine().cancelling():           # type: ignore[union-attr]
                self.counts["cancelled"] += 1
                raise
            self.counts["ended there"] += 1
        else:
            assert been == len(places)
            self.counts["returned"] += 1

    def check(self, accepted: int) -> None:
        counts = self.counts
        ends = counts["returned"] + counts["cancelled"] + counts["ended there"] + counts["refused"]
        assert counts["sent"] == ends, counts
        assert accepted == counts["parks"] + self.co._permit, (accepted, counts, self.co)


class Meddler:
    """A thread that wakes, cancels, posts and calls at random."""

    def __init__(self, world: World, hoppers: list[Hopper], seed: int) -> None:
        self.accepted: Counter[Hopper] = Counter()
        self.posted: Counter[Place] = Counter()
        self.done: Counter[str] = Counter()
        self.error: BaseException | None = None
        self._world = world
        self._hoppers = hoppers
        self._moves = random.Random(seed)
        self.thread = threading.Thread(target=self._main, name=f"meddler {seed}", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        try:
            while not self._world.stop:
                move = self._moves.choice(MOVES)
                self.done[move] += 1
                self._one(move, self._moves.choice(self._hoppers), self._moves.choice(self._world.places))
        except BaseException as exc:
            self.error = exc

    def _one(self, move: str, hopper: Hopper, place: Place) -> None:
        if move == "wake":
            self.accepted[hopper] += hopper.co.wake()
        elif move == "schedule":
            self.accepted[hopper] += hopper.co.schedule()
        elif move == "with lock" and self._world.with_lock:
            with self._world.rt.big_lock:
                self.accepted[hopper] += hopper.co.wake()
        elif move in ("from there", "with lock"):
            place.context.post(place.wake, hopper)
        elif move == "cancel":
            hopper.co.cancel()
        elif move == "post":
            place.context.post(place.count)
            self.posted[place] += 1
        else:
            assert place.context.call(place.visit([])) == 1


class Churner:
    """A thread that starts IOThreads, lets visitors in, and stops them in the middle of it."""

    def __init__(self, world: World, seed: int) -> None:
        self.gone: list[tuple[Place, int]] = []         # places that have ended, callbacks that they accepted
        self.error: BaseException | None = None
        self._world = world
        self._moves = random.Random(seed)
        self.thread = threading.Thread(target=self._main, name="churner", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        try:
            while not self._world.stop:
                self._one()
        except BaseException as exc:
            self.error = exc
        finally:
            self._world.passing = None

    def _one(self) -> None:
        posted = 0
        with homeloop.IOThread("passing") as io:
            place = Place(io.context)
            self._world.passing = place
            for _ in range(self._moves.randrange(20)):
                io.post(place.count)
                posted += 1
                place.context.spawn(place.visit([self._moves.choice(self._world.places)]))
        self._world.passing = None
        self.gone.append((place, posted))


def drained(place: Place) -> None:
    """What was posted there before has run."""
    seen = threading.Event()
    place.context.post(seen.set)
    assert seen.wait(END_WITHIN_S), snapshot()


def ends(hopper: Hopper, main: Counter[Hopper]) -> None:
    """Wake it until it ends: it may be parked, or on its way to one more park."""
    end = time.monotonic() + END_WITHIN_S
    while not hopper.co.done():
        main[hopper] += hopper.co.schedule()
        assert time.monotonic() < end, f"{hopper.co!r} does not end\n{snapshot()}"
        threading.Event().wait(0.0002)
    hopper.co.outcome()


@pytest.mark.stress
@pytest.mark.timeout(120 + 2 * STRESS_S)
@pytest.mark.parametrize("big_lock", [True, False], ids=["big lock", "no big lock"])
def test_nothing_is_lost_and_nothing_doubled(seed: int, big_lock: bool) -> None:
    with leak_check(within_s=END_WITHIN_S), ExitStack() as stack:
        rt = stack.enter_context(homeloop.Runtime(big_lock=big_lock))
        ios = [stack.enter_context(homeloop.IOThread(f"io-{number}")) for number in range(2)]
        world = World(rt, [Place(rt.main), *(Place(io.context) for io in ios)], big_lock)
        hoppers = [Hopper(world, world.places[number % 3], seed + number) for number in range(HOPPERS)]
        meddlers = [Meddler(world, hoppers, seed - number) for number in range(1, THREADS + 1)]
        churner = Churner(world, seed)
        threading.Event().wait(STRESS_S)                # the stress itself, not a wait for anything
        world.stop = True
        for helper in (*meddlers, churner):
            helper.thread.join(END_WITHIN_S)
            assert not helper.thread.is_alive(), f"{helper.thread.name} does not end\n{snapshot()}"
            if helper.error is not None:
                raise helper.error
        from_main: Counter[Hopper] = Counter()
        for hopper in hoppers:
            ends(hopper, from_main)
        for place in world.places:
            drained(place)
        check(world, hoppers, meddlers, churner, from_main)


def check(
    world: World, hoppers: list[Hopper], meddlers: list[Meddler], churner: Churner, from_main: Counter[Hopper]
) -> None:
    for hopper in hoppers:
        by_threads = sum(meddler.accepted[hopper] for meddler in meddlers)
        hopper.check(from_main[hopper] + by_threads + sum(place.woken[hopper] for place in world.places))
    for place in world.places:
        assert place.entered == place.left, place.context
        assert place.ran == sum(meddler.posted[place] for meddler in meddlers), place.context
    for place, posted in churner.gone:
        assert place.entered == place.left
        assert place.ran == posted, "stop() runs what was posted before"
    total = sum((hopper.counts for hopper in hoppers), Counter[str]())
    print(dict(total), f"{len(churner.gone)} IOThreads came and went")
    assert min(total["returned"], total["parks"], total["cancellations"], len(churner.gone)) > 0, "nothing happened"
