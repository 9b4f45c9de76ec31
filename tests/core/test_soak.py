"""Lost-wake soak: four threads wake coroutines of three contexts; every wake is counted, none may be lost or doubled.

A wake() that returned True is one park that returns, now or later; one that returned False is none. So at the end, for
each coroutine, parks returned == wakes accepted. That holds only if no wake is lost (too few, and it parks for ever)
and none is doubled (too many).

Two of the threads wake as fast as they can, so that wakes meet the coroutine in every state; the other two wait for
each wake to arrive before they send the next, so that the homes go to sleep in between and every sleep must be ended.

HOMELOOP_SOAK_WAKES sets the number of wakes (50,000; a million takes about half a minute), HOMELOOP_SEED the moves.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from contextlib import ExitStack

import pytest

import homeloop
from tests.core.bounded import LIMIT_S, STRESS_S, asleep, snapshot, until

WAKES = int(os.environ.get("HOMELOOP_SOAK_WAKES") or 50_000 * STRESS_S)
TIME_LIMIT_S = 60 + WAKES // 2_000
THREADS = 4
PER_CONTEXT = 4                     # coroutines for the fast threads; each of the others has one of its own
MOVES = ("wake", "wake", "wake", "schedule", "wake under the big lock", "enter", "wake from home")


class Target:
    """A coroutine that counts the parks that return, and checks that it runs at home, alone."""

    def __init__(self, context: homeloop.AioContext, seed: int) -> None:
        self.context = context
        self.returned = 0                       # at home: parks that returned
        self.accepted_at_home = 0               # at home: wakes that home sent
        self.arrived = threading.Semaphore(0)   # for who waits for each wake
        self.stop = False                       # set before the last wake
        self._moves = random.Random(seed)
        self._inside = False
        self.co = context.spawn(self._run())

    async def _run(self) -> None:
        while not self.stop:
            await homeloop.park("soak")
            assert not self._inside, "two threads in one coroutine"
            self._inside = True
            assert homeloop.current_context() is self.context
            assert homeloop.current_coroutine() is self.co
            self.returned += 1
            self._inside = False
            self.arrived.release()
            if self._moves.random() < 0.1:      # be found running, ready and waiting too, not only parked
                await asyncio.sleep(0)

    def wake_at_home(self, posted: threading.Semaphore) -> None:
        self.accepted_at_home += self.co.wake()
        posted.release()

    def ends(self) -> None:
        """End the coroutine by one wake more."""
        self.stop = True
        assert self.co.wake(), self.co
        self.co.result(LIMIT_S)
        assert not self.co.wake()
        self.returned -= 1


class Waker:
    """A thread that sends its share of the wakes, and counts those accepted for each target."""

    def __init__(self, targets: list[Target], lock: homeloop.BigLock, seed: int, *, waits: bool) -> None:
        self.accepted = dict.fromkeys(targets, 0)
        self.sent = 0
        self.error: BaseException | None = None
        self._moves = random.Random(seed)
        self._targets = targets
        self._lock = lock
        self._waits = waits                     # for each wake to arrive, before it sends the next
        self._posts = 0
        self._posted = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, name=f"waker {waits=}", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        try:
            while self.sent < WAKES // THREADS:
                self.sent += 1
                self._one(self._moves.choice(self._targets), self._moves.choice(MOVES))
            for _ in range(self._posts):
                assert self._posted.acquire(timeout=LIMIT_S), "a post was lost"
        except BaseException as exc:
            self.error = exc

    def _one(self, target: Target, move: str) -> None:
        if move == "wake from home":
            self._posts += 1
            target.context.post(target.wake_at_home, self._posted)
        else:
            accepted = self._send(target, move)
            assert accepted or not self._waits, "refused, though nobody else wakes it"
            self.accepted[target] += accepted
        if self._waits and not target.arrived.acquire(timeout=LIMIT_S):
            about = snapshot(target.co, target.context, self._lock)
            raise AssertionError(f"wake {self.sent} ({move}) was lost\n{about}")

    def _send(self, target: Target, move: str) -> bool:
        if move == "schedule":
            return target.co.schedule()
        if move == "enter":
            return target.context.enter(target.co)
        if move == "wake under the big lock":
            with self._lock:
                return target.co.wake()
        return target.co.wake()


@pytest.mark.stress
@pytest.mark.timeout(TIME_LIMIT_S)
def test_soak_no_wake_is_lost_and_none_doubled(seed: int) -> None:
    """From 4 threads into 3 contexts; for each coroutine, parks returned == wakes accepted (rules 4 and 7)."""
    with ExitStack() as stack:
        rt = stack.enter_context(homeloop.Runtime())
        ios = [stack.enter_context(homeloop.IOThread()) for _ in range(2)]
        contexts = [rt.main, *(io.context for io in ios)]
        shared = [Target(context, seed + number) for number in range(PER_CONTEXT) for context in contexts]
        own = [[Target(context, seed - number) for context in contexts] for number in range(THREADS // 2)]
        wakers = [Waker(shared, rt.big_lock, seed + number, waits=False) for number in range(THREADS // 2)]
        wakers += [Waker(targets, rt.big_lock, seed - number, waits=True) for number, targets in enumerate(own)]
        for waker in wakers:
            waker.thread.join(TIME_LIMIT_S)
            assert not waker.thread.is_alive(), snapshot(rt.big_lock, *contexts)
            if waker.error is not None:
                raise waker.error
        for target in [*shared, *own[0], *own[1]]:
            accepted = target.accepted_at_home + sum(waker.accepted.get(target, 0) for waker in wakers)
            until(lambda target=target, accepted=accepted: target.returned >= accepted, target.co, *contexts)
            asleep(target.context)
            target.ends()
            assert target.returned == accepted, target.co
        returned = sum(target.returned for target in [*shared, *own[0], *own[1]])
        kicks = sum(context.statistics().kicks for context in contexts)
        print(f"{sum(waker.sent for waker in wakers)} wakes sent, {returned} accepted, {kicks} kicks")
        assert returned >= WAKES // THREADS * (THREADS // 2)
