"""Bottom halves (rule 13): callbacks that any thread schedules and the home runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, asleep, in_plain_thread, until, wait
from tests.core.places import in_callback, returned


@pytest.fixture(params=["main", "iothread", "asyncio loop"])
def context(request: pytest.FixtureRequest) -> Iterator[homeloop.AioContext]:
    if request.param == "main":
        with homeloop.Runtime() as rt:
            yield rt.main
    else:
        factory = asyncio.SelectorEventLoop if request.param == "asyncio loop" else None
        with homeloop.Runtime(), homeloop.IOThread(loop_factory=factory) as io:
            yield io.context


@pytest.fixture(params=["main", "iothread"])
def polled(request: pytest.FixtureRequest) -> Iterator[homeloop.AioContext]:
    """A context that can be polled."""
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        yield rt.main if request.param == "main" else io.context


def settle(context: homeloop.AioContext) -> None:
    """Return when what was queued before has run, and what that queued."""
    for _ in range(3):
        in_callback(context, lambda: None)


def at_home_blocked(context: homeloop.AioContext, fn: Callable[[], Any]) -> Any:
    """Call fn here while the home stands still in a callback: nothing runs between fn's lines."""
    stopped, go_on = threading.Event(), threading.Event()
    context.post(lambda: (stopped.set(), wait(go_on, context)))
    wait(stopped, context)
    try:
        return fn()
    finally:
        go_on.set()


def test_rule13_twice_before_it_runs_is_once(context: homeloop.AioContext) -> None:
    """However often, and from however many threads: scheduled before it runs means one run."""
    ran: list[Any] = []
    half = context.bottom_half(lambda: ran.append(homeloop.current_context()))

    def schedules() -> None:
        half.schedule()
        half.schedule()
        in_plain_thread(half.schedule)

    at_home_blocked(context, schedules)
    settle(context)
    assert ran == [context]
    half.schedule()
    settle(context)
    assert len(ran) == 2


def test_rule13_fifo(context: homeloop.AioContext) -> None:
    """Bottom halves run in the order of their scheduling, in turn with posts."""
    ran: list[int] = []
    halves = [context.bottom_half(lambda i=i: ran.append(i)) for i in range(5)]

    def schedules() -> None:
        for i in (3, 1, 4):
            halves[i].schedule()
        context.post(ran.append, 99)
        halves[1].schedule()            # keeps its place
        for i in (0, 2):
            halves[i].schedule()

    at_home_blocked(context, schedules)
    settle(context)
    assert ran == [3, 1, 4, 99, 0, 2]


def test_rule13_cancelled_before_it_runs(context: homeloop.AioContext) -> None:
    """It does not run; scheduled again, it does, once, though its first place in the queue is still there."""
    ran: list[int] = []
    half = context.bottom_half(lambda: ran.append(1))
    at_home_blocked(context, lambda: (half.schedule(), half.cancel()))
    settle(context)
    assert ran == []
    at_home_blocked(context, lambda: (half.schedule(), half.cancel(), half.schedule()))
    settle(context)
    assert ran == [1]
    half.cancel()
    half.cancel()


def test_rule13_deleted(context: homeloop.AioContext) -> None:
    """It does not run any more, and schedule() does nothing; twice is fine."""
    ran: list[int] = []
    half = context.bottom_half(lambda: ran.append(1))
    at_home_blocked(context, lambda: (half.schedule(), half.delete(), half.schedule()))
    half.delete()
    settle(context)
    assert ran == []


def test_rule13_reschedules_itself(context: homeloop.AioContext) -> None:
    """While it runs it may schedule itself: it runs again, not inside itself, and what is ready gets its turn."""
    ran: list[str] = []

    def fn() -> None:
        ran.append("begins")
        if len(ran) < 10:
            context.loop.call_soon(ran.append, "between")
            half.schedule()
            half.schedule()
        ran.append("ends")

    half = context.bottom_half(fn)
    half.schedule()
    until(lambda: len(ran) >= 11, context)
    settle(context)
    assert ran == ["begins", "ends", "between"] * 3 + ["begins", "ends"]


@pytest.mark.parametrize("idle", [False, True])
def test_rule13_cancels_or_deletes_itself_while_it_runs(context: homeloop.AioContext, idle: bool) -> None:
    """The running call goes on; a schedule() before the cancel() in it is taken back."""
    ran: list[str] = []

    def cancels() -> None:
        one.schedule()
        one.cancel()
        ran.append("cancels")

    def deletes() -> None:
        other.schedule()
        other.delete()
        other.schedule()
        ran.append("deletes")

    one, other = context.bottom_half(cancels, idle=idle), context.bottom_half(deletes, idle=idle)
    one.schedule()
    other.schedule()
    until(lambda: len(ran) == 2, context)
    settle(context)
    assert sorted(ran) == ["cancels", "deletes"]


def test_rule13_scheduled_from_another_thread_while_it_runs(context: homeloop.AioContext) -> None:
    """A schedule() that comes while the callback runs is not lost: what it saw may be old.

        home                            other
        1 runs fn, has looked
                                        2 changes, schedules
        3 fn returns
        4 must run again
    """
    inside, go_on = threading.Event(), threading.Event()
    seen: list[list[int]] = []
    state: list[int] = []

    def fn() -> None:
        seen.append(list(state))
        inside.set()
        wait(go_on, context)

    half = context.bottom_half(fn)
    half.schedule()
    wait(inside, context)
    state.append(1)
    half.schedule()
    go_on.set()
    until(lambda: len(seen) == 2, context)
    assert seen == [[], [1]]


def test_rule13_an_exception_is_reported(context: homeloop.AioContext) -> None:
    """It goes to the loop's exception handler; the next ones run, and this one may be scheduled again."""
    reported: list[Any] = []
    in_callback(context, lambda: context.loop.set_exception_handler(
        lambda loop, what: reported.append(type(what["exception"]))))
    bad = context.bottom_half(lambda: 1 // 0)
    ran: list[int] = []
    good = context.bottom_half(lambda: ran.append(1))
    for half in (bad, good, bad):
        half.schedule()
        settle(context)
    assert reported == [ZeroDivisionError] * 2
    assert ran == [1]


def test_rule13_after_the_end() -> None:
    """schedule() raises ContextClosed; cancel() and delete() are fine; what was scheduled before has run."""
    ran: list[int] = []
    with homeloop.IOThread() as io:
        half = io.context.bottom_half(lambda: ran.append(1))
        half.schedule()
    assert ran == [1]
    with pytest.raises(ContextClosed):
        half.schedule()
    half.cancel()
    half.delete()
    half.schedule()                     # deleted: nothing happens, and nothing is wrong


# Idle ones


def test_rule13_idle_runs_within_bounds(context: homeloop.AioContext) -> None:
    """An idle bottom half that re-schedules itself runs at most every 10 ms, and does run."""
    times: list[float] = []

    def fn() -> None:
        times.append(time.monotonic())
        if len(times) < 4:
            half.schedule()

    half = context.bottom_half(fn, idle=True)
    half.schedule()
    until(lambda: len(times) == 4, context)
    resolution = time.get_clock_info("monotonic").resolution + 1e-3
    assert [b - a >= 0.010 - resolution for a, b in zip(times, times[1:], strict=False)] == [True] * 3  # noqa: RUF007


def test_rule13_idle_is_no_progress(polled: homeloop.AioContext) -> None:
    """poll() that ran nothing but idle bottom halves answers False; an ordinary one is progress."""
    ran: list[str] = []
    idle = polled.bottom_half(lambda: ran.append("idle"), idle=True)
    plain = polled.bottom_half(lambda: ran.append("plain"))

    def polls() -> tuple[bool, list[bool]]:
        while polled.poll(False):
            pass
        plain.schedule()
        progress = polled.poll(False)
        idle.schedule()
        answers = []
        while "idle" not in ran:
            answers.append(polled.poll(True))
        return progress, answers

    progress, answers = in_callback(polled, polls)
    assert progress is True
    assert answers
    assert not any(answers)


def test_rule13_cancelled_is_no_progress(polled: homeloop.AioContext) -> None:
    """A bottom half that was cancelled, or deleted, before its turn."""
    halves = [polled.bottom_half(lambda: None) for _ in range(2)]

    def polls() -> bool:
        while polled.poll(False):
            pass
        for half in halves:
            half.schedule()
        halves[0].cancel()
        halves[1].delete()
        return polled.poll(False)

    assert in_callback(polled, polls) is False


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_rule13_idle_cancelled_while_it_waits(context: homeloop.AioContext, end: str) -> None:
    """Its 10 ms have begun; it does not run when they are over."""
    ran: list[int] = []
    half = context.bottom_half(lambda: ran.append(1), idle=True)
    half.schedule()
    settle(context)
    getattr(half, end)()
    context.spawn(asyncio.sleep(0.02)).result(LIMIT_S)      # tidy: allow sleep: behind the idle one's timer
    assert ran == []


# From any thread, often


def test_rule13_wakes_a_sleeping_home(context: homeloop.AioContext) -> None:
    """From a plain thread, with the home asleep in select()."""
    for _ in range(20):
        ran = threading.Event()
        half = context.bottom_half(ran.set)
        if not isinstance(context.loop, asyncio.SelectorEventLoop) or hasattr(context.loop, "inbox"):
            asleep(context)
        half.schedule()
        wait(ran, context)


@pytest.mark.stress
def test_rule13_stress_no_schedule_is_lost(context: homeloop.AioContext) -> None:
    """Each producer counts up and schedules: the run behind the last schedule sees every count."""
    counts = [0] * 4
    seen: list[int] = []
    each = int(5000 * STRESS_S)
    half = context.bottom_half(lambda: seen.append(sum(counts)))

    def produces(number: int) -> None:
        for _ in range(each):
            counts[number] += 1
            half.schedule()

    for thread in [Plain(produces, number) for number in range(4)]:
        thread.result(context)
    until(lambda: seen and seen[-1] == 4 * each, context)
    assert len(seen) <= 4 * each
    assert seen == sorted(seen)
    assert context.spawn(returned(lambda: 1)).result(LIMIT_S) == 1
