"""Coroutines: enter, schedule, wake, park, cancel. Rules 3 and 4; rule 5 is in test_biglock.py.

What runs in what order is written to a log by everything that runs, and compared whole.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed, UsageError
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, in_plain_thread, returned, until, wait

LINKS = 25_000
PARKED = homeloop.CoroutineState.PARKED


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    with homeloop.Runtime() as runtime:
        yield runtime


@pytest.fixture(params=["main", "iothread"])
def context(request: pytest.FixtureRequest, rt: homeloop.Runtime) -> Iterator[homeloop.AioContext]:
    """A context with a thread of its own: what holds at home holds in each."""
    if request.param == "main":
        yield rt.main
    else:
        with homeloop.IOThread() as io:
            yield io.context


def at_home(context: homeloop.AioContext, fn: Callable[[], Any]) -> Any:
    """Run fn() in a plain callback of the context: at home, outside any coroutine."""
    done = threading.Event()
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(fn())
        except BaseException as exc:
            outcome.append(exc)
        done.set()

    context.post(call)
    wait(done, context)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def run(context: homeloop.AioContext, coro: Any) -> Any:
    return context.spawn(coro).result(LIMIT_S)


def parked(*cos: homeloop.Coroutine[Any]) -> None:
    for co in cos:
        until(lambda co=co: co.state is PARKED, co)


async def settled() -> None:
    """Let everything that is ready run, and what that makes ready."""
    for _ in range(5):
        await asyncio.sleep(0)


class Log(list[str]):
    """What ran, in order."""

    def sleeper(self, context: homeloop.AioContext, name: str, then: Callable[[], object] = bool) -> Any:
        """A started coroutine that parks once, logs its name, and calls then()."""
        async def sleep() -> None:
            await homeloop.park(name)
            self.append(name)
            then()
        return context.spawn(sleep(), name=name)


# Rule 3, current and outside any coroutine: now, on this stack


def test_rule3_enter_outside_any_coroutine_runs_it_now(context: homeloop.AioContext) -> None:
    """In a plain callback at home, enter() returns when the coroutine has parked; wake() runs it on from there."""
    log = Log()

    async def two_parts() -> None:
        log.append("first part")
        await homeloop.park()
        log.append("second part")

    def callback() -> None:
        co = context.create(two_parts())
        assert co.state is homeloop.CoroutineState.CREATED
        context.enter(co)
        log.append("entered")
        assert co.state is PARKED
        assert co.wake()
        log.append("woken")
        assert co.done()

    at_home(context, callback)
    assert log == ["first part", "entered", "second part", "woken"]


def test_rule3_enter_takes_a_coroutine_object_too(context: homeloop.AioContext) -> None:
    """enter() and schedule() start a coroutine object as they start a Coroutine; another context's is refused."""
    ran = threading.Event()
    context.enter(returned(ran.set))
    wait(ran)
    ran.clear()
    context.schedule(returned(ran.set))
    wait(ran)
    with homeloop.IOThread() as other:
        co = other.context.create(returned(ran.set))
        for refused in (context.enter, context.schedule):
            with pytest.raises(UsageError, match="home"):
                refused(co)
        co.cancel()


def test_rule3_wakes_of_one_entered_now_run_before_enter_returns(context: homeloop.AioContext) -> None:
    """What the entered coroutine wakes runs on the same stack, once it has parked, before enter() returns."""
    log = Log()
    a = log.sleeper(context, "a")
    b = log.sleeper(context, "b", then=lambda: a.wake())
    parked(a, b)

    def callback() -> None:
        b.wake()
        log.append("returned")

    at_home(context, callback)
    assert log == ["b", "a", "returned"]


# Rule 3, inside a running coroutine: right after it parks or ends


async def parks() -> None:
    await homeloop.park()


async def awaits() -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, None)
    await future


async def yields() -> None:
    await asyncio.sleep(0)


async def ends() -> None:
    pass


@pytest.mark.parametrize("then", [parks, awaits, yields, ends])
def test_rule3_wakes_run_right_after_the_waker_and_before_what_was_ready(
    context: homeloop.AioContext, then: Callable[[], Awaitable[None]]
) -> None:
    """However the waker stops, the woken run next, in the order of the wakes; then what was ready before them."""
    log = Log()
    cos = [log.sleeper(context, name) for name in "abc"]
    parked(*cos)

    async def waker() -> None:
        context.loop.call_soon(log.append, "was ready")
        for co in (cos[1], cos[0], cos[2]):
            assert co.wake()
        log.append("waker")
        await then()

    co = context.spawn(waker())
    until(lambda: "was ready" in log, co)
    assert log == ["waker", "b", "a", "c", "was ready"]
    co.cancel()


def test_rule3_enter_of_fresh_coroutines_inside_one_is_deferred(context: homeloop.AioContext) -> None:
    """A fresh coroutine entered by a running one does not run in the middle of it."""
    log = Log()

    async def fresh(name: str) -> None:
        log.append(name)

    async def enters() -> None:
        for name in "ab":
            context.enter(fresh(name))
        log.append("enterer")
        await settled()

    run(context, enters())
    assert log == ["enterer", "a", "b"]


def test_rule3_depth_first(context: homeloop.AioContext) -> None:
    """What a woken coroutine wakes runs before those that were woken earlier and have not run yet."""
    log = Log()
    a1, a2 = log.sleeper(context, "a1"), log.sleeper(context, "a2")
    a11 = log.sleeper(context, "a11")
    a = log.sleeper(context, "a", then=lambda: [a1.wake(), a2.wake()])
    b = log.sleeper(context, "b")
    parked(a1, a2, a11, a, b)

    async def waker() -> None:
        a.wake()
        b.wake()
        log.append("waker")

    run(context, waker())
    assert log == ["waker", "a", "a1", "a2", "b"]
    a11.wake()


def test_rule3_schedule_never_runs_anything_now(context: homeloop.AioContext) -> None:
    """In a callback and in a coroutine alike, schedule() queues: behind what was ready, in the order of the calls."""
    log = Log()
    cos = [log.sleeper(context, name) for name in "abcd"]
    parked(*cos)

    def callback() -> None:
        context.loop.call_soon(log.append, "was ready")
        assert cos[0].schedule()
        assert context.schedule(cos[1])
        log.append("callback")

    async def scheduler() -> None:
        context.loop.call_soon(log.append, "was ready")
        assert cos[2].schedule()
        assert cos[3].schedule()
        log.append("scheduler")
        await homeloop.park()

    at_home(context, callback)
    until(lambda: len(log) == 4, context)
    co = context.spawn(scheduler())
    until(lambda: len(log) == 8, context)
    co.cancel()
    assert log == ["callback", "was ready", "a", "b", "scheduler", "was ready", "c", "d"]


def test_rule3_wakes_inside_an_asyncio_task(context: homeloop.AioContext) -> None:
    """A plain task wakes: the woken run right after its step, in order, before what was ready."""
    log = Log()
    cos = [log.sleeper(context, name) for name in "ab"]
    parked(*cos)

    async def task() -> None:
        assert homeloop.current_coroutine() is None
        context.loop.call_soon(log.append, "was ready")
        for co in cos:
            assert co.wake()
        log.append("task")
        await asyncio.sleep(0)
        log.append("task again")

    async def main() -> None:
        await asyncio.create_task(task())

    run(context, main())
    assert log == ["task", "a", "b", "was ready", "task again"]


def test_rule3_wakes_inside_tasks_do_not_wait_for_other_tasks(context: homeloop.AioContext) -> None:
    """Two tasks are ready and each wakes one: woken and tasks alternate, each right behind its waker."""
    log = Log()
    cos = [log.sleeper(context, name) for name in "ab"]
    parked(*cos)

    async def task(number: int) -> None:
        cos[number].wake()
        log.append(f"task {number}")

    async def main() -> None:
        await asyncio.gather(task(0), task(1))

    run(context, main())
    assert log == ["task 0", "a", "task 1", "b"]


@pytest.mark.parametrize("way", ["wake", "enter fresh"])
def test_rule3_chain_of_25000_wakes_with_a_constant_stack(context: homeloop.AioContext, way: str) -> None:
    """Each link wakes (or makes and enters) the next; none stands deeper than the first."""
    depths: set[int] = set()
    ran = threading.Event()
    cos: list[Any] = []

    def depth() -> int:
        depth, frame = 0, sys._getframe()
        while frame.f_back is not None:
            depth, frame = depth + 1, frame.f_back
        return depth

    async def link(number: int) -> None:
        if way == "wake":
            await homeloop.park()
        depths.add(depth())
        if number == LINKS - 1:
            ran.set()
        elif way == "wake":
            cos[number + 1].wake()
        else:
            context.enter(link(number + 1))

    cos += [context.spawn(link(number)) for number in range(LINKS if way == "wake" else 1)]
    if way == "wake":
        parked(*cos[-1:])
        at_home(context, cos[0].wake)
    wait(ran, context)
    assert len(depths) == 1


def test_rule3_chain_gives_way_to_the_loop_now_and_then(context: homeloop.AioContext) -> None:
    """Two coroutines that wake each other for ever: posts run all the same."""
    cos: list[homeloop.Coroutine[None]] = []

    async def wakes(other: int) -> None:
        while True:
            await homeloop.park()
            cos[other].wake()

    cos += [context.spawn(wakes(1)), context.spawn(wakes(0))]
    parked(*cos)
    cos[0].wake()
    for _ in range(3):
        assert at_home(context, lambda: "ran") == "ran"
    for co in cos:
        co.cancel()


# Rule 4


def test_rule4_park_takes_one_permit_and_does_not_yield(context: homeloop.AioContext) -> None:
    """A remembered wake lets one park return at once, before anything else runs; the next park waits."""
    log = Log()

    async def permits() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        context.loop.call_soon(log.append, "was ready")
        answers = [me.wake(), me.wake(), me.schedule()]
        await homeloop.park()
        log.append(f"{answers}")
        await homeloop.park()
        log.append("second park")

    co = context.spawn(permits())
    parked(co)
    until(lambda: len(log) == 2, co)
    assert log == ["[True, False, False]", "was ready"]
    assert co.wake()
    co.result(LIMIT_S)
    assert log[2:] == ["second park"]


def test_rule4_second_wake_of_a_parked_one_counts_once(context: homeloop.AioContext) -> None:
    """Woken and not run yet: a further wake is refused, from everywhere, and leaves no permit behind."""
    async def sleeper() -> int:
        await homeloop.park()
        await homeloop.park()
        return 2

    co = context.spawn(sleeper())
    parked(co)
    in_the_way, go = threading.Event(), threading.Event()
    context.post(lambda: (in_the_way.set(), wait(go)))
    wait(in_the_way)                                    # home is busy: nothing runs
    assert [co.wake(), co.wake(), co.schedule(), in_plain_thread(co.wake)] == [True, False, False, False]
    go.set()
    parked(co)
    assert at_home(context, lambda: co.state) is PARKED
    assert co.wake()
    assert co.result(LIMIT_S) == 2


def test_rule4_wake_while_it_awaits_a_future_is_remembered(context: homeloop.AioContext) -> None:
    """It waits for something else than a wake: that goes on, and the next park returns at once."""
    log = Log()
    futures: list[asyncio.Future[str]] = []

    async def waiter() -> None:
        futures.append(asyncio.get_running_loop().create_future())
        log.append(await futures[0])
        await homeloop.park()
        log.append("parked through")

    co = context.spawn(waiter())
    until(lambda: co.state is homeloop.CoroutineState.WAITING, co)
    assert [co.wake(), co.wake()] == [True, False]
    assert not co.done()
    at_home(context, lambda: futures[0].set_result("future"))
    co.result(LIMIT_S)
    assert log == ["future", "parked through"]


def test_rule4_wake_starts_one_that_was_only_created(context: homeloop.AioContext) -> None:
    """wake() of a fresh coroutine starts it; a second one before it ran is a permit for its first park."""
    in_the_way, go = threading.Event(), threading.Event()
    context.post(lambda: (in_the_way.set(), wait(go)))
    wait(in_the_way)
    co = context.create(parks())
    first, second, third = co.wake(), co.wake(), co.wake()
    go.set()
    assert (first, third) == (True, False)
    if second:
        co.result(LIMIT_S)
    else:
        parked(co)
        co.wake()
        co.result(LIMIT_S)


def test_rule4_wake_of_one_that_ended_is_refused(context: homeloop.AioContext) -> None:
    """However it ended, and also once its context has."""
    async def raises() -> None:
        raise ZeroDivisionError

    returned_one, raised, cancelled = context.spawn(ends()), context.spawn(raises()), context.create(ends())
    cancelled.cancel()
    returned_one.result(LIMIT_S)
    with pytest.raises(ZeroDivisionError):
        raised.result(LIMIT_S)
    until(cancelled.done, cancelled)
    for co in (returned_one, raised, cancelled):
        assert [co.wake(), co.schedule(), at_home(context, co.wake)] == [False] * 3


def test_rule4_wake_after_the_context_has_ended() -> None:
    """What parked in a context that ends is cancelled; waking it is refused, starting more raises ContextClosed."""
    with homeloop.IOThread() as io:
        co = io.spawn(parks())
        parked(co)
        context = io.context
    assert co.cancelled()
    assert [co.wake(), co.schedule()] == [False, False]
    late = parks()
    with pytest.raises(ContextClosed):
        context.spawn(late)
    assert late.cr_frame is None            # closed: no "never awaited" warning follows


def test_rule4_stress_every_wake_accepted_is_one_park(context: homeloop.AioContext, seed: int) -> None:
    """Threads wake one coroutine that parks and yields at random: as many parks return as wakes were accepted."""
    moves = random.Random(seed)
    end = time.monotonic() + 0.3 * STRESS_S
    returns = 0

    async def parker() -> None:
        nonlocal returns
        while True:
            await homeloop.park()
            returns += 1
            if moves.random() < 0.3:
                await asyncio.sleep(0)

    def waker() -> int:
        return sum(co.wake() for _ in iter(lambda: time.monotonic() < end, False))

    co = context.spawn(parker())
    wakers = [Plain(waker) for _ in range(3)]
    accepted = sum(waker.result(co) for waker in wakers)
    until(lambda: returns == accepted and co.state is PARKED, co)
    assert accepted > 3                         # under the GIL a home that is not alone gets few turns


# Cancel, wake and park


def hears(log: Log) -> Any:
    """A coroutine that logs how its parks ended, and goes on."""
    async def listen() -> None:
        for number in range(2):
            try:
                await homeloop.park()
                log.append(f"park {number} returned")
            except asyncio.CancelledError:
                log.append(f"park {number} cancelled")
    return listen()


@pytest.mark.parametrize("from_home", [True, False])
def test_cancel_of_a_parked_coroutine_is_raised_in_its_park(context: homeloop.AioContext, from_home: bool) -> None:
    """At home or from elsewhere: CancelledError comes out of park(), with its message; no permit is left."""
    async def sleeper() -> str:
        try:
            await homeloop.park()
        except asyncio.CancelledError as exc:
            return str(exc)
        return "not cancelled"

    co = context.spawn(sleeper())
    parked(co)
    assert (at_home(context, lambda: co.cancel("why")) if from_home else co.cancel("why")) is True
    assert co.result(LIMIT_S) == "why"
    assert co.cancel() is False


@pytest.mark.parametrize("first", ["schedule", "cancel"])
def test_rule4_wake_and_cancel_before_it_runs(context: homeloop.AioContext, first: str) -> None:
    """Woken and cancelled in one turn, in either order: the park is cancelled, the wake is kept for the next one.

    The naive version drops the wake with the park that it meant to end.
    """
    log = Log()
    co = context.spawn(hears(log))
    parked(co)
    both = ("schedule", "cancel") if first == "schedule" else ("cancel", "schedule")
    assert at_home(context, lambda: [getattr(co, way)() for way in both]) == [True, True]
    co.result(LIMIT_S)
    assert log == ["park 0 cancelled", "park 1 returned"]


def test_cancel_while_it_runs_is_raised_at_its_next_park(context: homeloop.AioContext) -> None:
    """It goes on to its park, which raises; without a permit and with one that came before (raised one wait later)."""
    log = Log()

    async def cancels_itself() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        me.cancel()
        log.append("goes on")
        try:
            await homeloop.park()
        except asyncio.CancelledError:
            log.append("cancelled")
        assert me.cancelling() == 1
        assert me.uncancel() == 0

    run(context, cancels_itself())
    assert log == ["goes on", "cancelled"]


def test_cancel_before_the_first_step_runs_nothing(context: homeloop.AioContext) -> None:
    """Created or scheduled: the coroutine never runs, is closed, and ends as cancelled."""
    ran = threading.Event()
    created = context.create(returned(ran.set))
    assert created.cancel()

    def scheduled_and_cancelled() -> homeloop.Coroutine[Any]:
        co = context.spawn(returned(ran.set))
        assert co.cancel()
        return co

    for co in (created, at_home(context, scheduled_and_cancelled)):
        with pytest.raises(asyncio.CancelledError):
            co.result(LIMIT_S)
        assert co.cancelled()
        with pytest.raises(asyncio.CancelledError):
            co.exception()
    assert not ran.is_set()


def test_cancelled_at_home_and_started_by_another_thread_in_the_same_moment(context: homeloop.AioContext) -> None:
    """
    home                                    another thread
    1 cancel(): it has not begun
                                            2 schedule()
    3 it ends, cancelled; not stepped then
    """
    class Raced(homeloop.Coroutine[None]):
        __slots__ = ()

        def abandon(self, error: BaseException) -> None:
            in_plain_thread(self.schedule)
            super().abandon(error)

    co = Raced(context, returned(lambda: None))
    at_home(context, co.cancel)
    with pytest.raises(asyncio.CancelledError):
        co.result(LIMIT_S)
    at_home(context, lambda: None)              # were it queued, it would be stepped before this
    assert co.cancelled()


def test_cancel_of_a_coroutine_that_awaits_a_future_cancels_the_future(context: homeloop.AioContext) -> None:
    """As with an asyncio task."""
    futures: list[asyncio.Future[None]] = []

    async def waiter() -> None:
        futures.append(asyncio.get_running_loop().create_future())
        await futures[0]

    co = context.spawn(waiter())
    until(lambda: co.state is homeloop.CoroutineState.WAITING, co)
    assert co.cancel()
    with pytest.raises(asyncio.CancelledError):
        co.result(LIMIT_S)
    assert futures[0].cancelled()
