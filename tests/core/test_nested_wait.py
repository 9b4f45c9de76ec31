"""Synchronous waits inside coroutines and asyncio tasks (rule 12): depth, cancellation, timeouts, task groups."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from tests.core.bounded import LIMIT_S, Plain, wait
from tests.core.places import in_coroutine, returned


@pytest.fixture(params=["main", "iothread"])
def context(request: pytest.FixtureRequest) -> Iterator[homeloop.AioContext]:
    with homeloop.Runtime() as rt:
        if request.param == "main":
            yield rt.main
        else:
            with homeloop.IOThread() as io:
                yield io.context


def in_task(context: homeloop.AioContext, fn: Callable[[], Any]) -> Any:
    """Call fn in a plain asyncio task of context's loop; its result."""
    async def starts() -> Any:
        return await asyncio.ensure_future(returned(fn))

    return context.spawn(starts()).result(2 * LIMIT_S)


PLACED = pytest.mark.parametrize("inside", [in_coroutine, in_task], ids=["in a coroutine", "in a task"])
AS = pytest.mark.parametrize("as_task", [False, True], ids=["coroutine", "task"])
Inside = Callable[[homeloop.AioContext, Callable[[], Any]], Any]


def started(context: homeloop.AioContext, coro: Any, as_task: bool) -> Any:
    """Start coro as an asyncio task or as a Coroutine, at home."""
    return context.loop.create_task(coro) if as_task else context.spawn(coro)


def me() -> Any:
    task = asyncio.current_task()
    assert task is not None
    return task


# Depth

LEVELS = 100

@PLACED
def test_rule12_a_hundred_levels(context: homeloop.AioContext, inside: Inside) -> None:
    """Each level waits for a coroutine or task that waits itself: only the stack limits it.

    tests/proof/test_endings.py has what comes at that limit.
    """
    async def level(number: int) -> int:
        if number == LEVELS:
            return 0
        inner = started(context, level(number + 1), as_task=number % 2 == 0)
        assert context.wait_while(lambda: not inner.done(), LIMIT_S)
        return int(inner.result()) + 1

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20 * LEVELS + before)         # about fifteen frames each
    try:
        assert inside(context, lambda: context.spawn(level(0)).result(2 * LIMIT_S)) == LEVELS
    finally:
        sys.setrecursionlimit(before)


@PLACED
def test_rule12_what_requeues_itself_runs_on_and_does_not_keep_a_wait(
    context: homeloop.AioContext, inside: Inside
) -> None:
    """Once in each iteration; the wait ends by its predicate all the same, and by its time."""
    runs: list[int] = []
    going = [True]

    def again() -> None:
        runs.append(1)
        if going:
            context.loop.call_soon(again)

    def outer() -> tuple[bool, bool]:
        context.loop.call_soon(again)
        answers = context.wait_while(lambda: len(runs) < 50, LIMIT_S), context.wait_while(lambda: True, 0.002)
        going.clear()
        return answers

    assert inside(context, outer) == (True, False)
    assert len(runs) >= 50


# Others meanwhile


@PLACED
def test_rule12_tasks_and_coroutines_run_during_a_wait(context: homeloop.AioContext, inside: Inside) -> None:
    """No "Cannot enter into task": each sees itself, and who waits is itself again behind it."""
    async def steps(seen: list[Any]) -> None:
        for _ in range(3):
            seen.append(asyncio.current_task())
            await asyncio.sleep(0)

    def outer() -> bool:
        mine = me()
        others: list[tuple[Any, list[Any]]] = []
        for as_task in (False, True, False, True):
            seen: list[Any] = []
            others.append((started(context, steps(seen), as_task), seen))
        assert context.wait_while(lambda: not all(other.done() for other, _ in others), LIMIT_S)
        assert [seen for _, seen in others] == [[other] * 3 for other, _ in others]
        return me() is mine

    assert inside(context, outer) is True


@PLACED
def test_rule12_run_until_complete_on_a_running_loop_stays_refused(
    context: homeloop.AioContext, inside: Inside
) -> None:
    """asyncio's own way to wait is refused at every level, and what it was given is not lost by us."""
    def refused() -> None:
        for run in (context.loop.run_until_complete, asyncio.run):
            coro = returned(lambda: None)
            with pytest.raises(RuntimeError, match="running"):
                run(coro)
            coro.close()
        with pytest.raises(RuntimeError, match="running"):
            context.loop.run_forever()

    def outer() -> Any:
        refused()
        return context.spawn(returned(refused)).result(LIMIT_S)

    assert inside(context, outer) is None


# Cancellation, timeouts, task groups


@AS
def test_rule12_cancelled_during_a_wait(context: homeloop.AioContext, as_task: bool) -> None:
    """The synchronous wait is not disturbed; CancelledError comes at the next await, and counts once."""
    log: list[Any] = []
    waiting, done = threading.Event(), threading.Event()

    async def waits() -> None:
        context.loop.call_soon(waiting.set)
        log.append(context.wait_while(lambda: not done.is_set(), LIMIT_S))
        log.append(me().cancelling())
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append("cancelled")
            raise

    async def starts() -> Any:
        co = started(context, waits(), as_task)

        def cancels() -> None:
            wait(waiting, context)

            def ends() -> None:
                co.cancel()
                done.set()

            context.post(ends)

        thread = Plain(cancels)
        with pytest.raises(asyncio.CancelledError):
            await co
        thread.result(context)
        return co.cancelled(), me().cancelling()

    assert context.spawn(starts()).result(2 * LIMIT_S) == (True, 0)
    assert log == [True, 1, "cancelled"]


@AS
def test_rule12_a_timeout_that_is_over_during_a_wait(context: homeloop.AioContext, as_task: bool) -> None:
    """asyncio.timeout() around a synchronous wait cannot cut it short: TimeoutError at the next await, the count 0."""
    async def waits() -> list[Any]:
        log: list[Any] = []
        try:
            async with asyncio.timeout(0.001) as timeout:
                log.append(context.wait_while(lambda: not timeout.expired() and not me().cancelling(), LIMIT_S))
                log.append("went on")
                await asyncio.Event().wait()
        except TimeoutError:
            log.append("timed out")
        log.append(me().cancelling())
        await asyncio.sleep(0)
        return log

    async def starts() -> Any:
        return await started(context, waits(), as_task)

    assert context.spawn(starts()).result(2 * LIMIT_S) == [True, "went on", "timed out", 0]


@AS
def test_rule12_timeouts_and_groups_inside_a_wait(context: homeloop.AioContext, as_task: bool) -> None:
    """What runs in the nested iterations has its own timeouts, groups and cancellations; who waits has none of them."""
    async def times_out() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        return f"timed out {me().cancelling()}"

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("of a member")

    async def groups() -> str:
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.Event().wait())
                group.create_task(fails())
        return repr(caught.value.exceptions[0])

    def outer() -> tuple[list[Any], int]:
        inner = [started(context, coro, as_task) for coro in (times_out(), groups())]
        assert context.wait_while(lambda: not all(one.done() for one in inner), LIMIT_S)
        return [one.result() for one in inner], me().cancelling()

    (timed_out, failed), count = in_coroutine(context, outer)
    # 3.11 and 3.12 leave the count of a failed group's parent at 1, if at all: asyncio's own matter
    assert timed_out == "timed out 0"
    assert failed == "ValueError('of a member')"
    assert count == 0


@AS
def test_rule12_a_member_fails_while_its_group_waits_synchronously(
    context: homeloop.AioContext, as_task: bool
) -> None:
    """The group cancels its parent, which is in a nested wait: it goes on to its next await, then the group ends."""
    log: list[Any] = []

    async def fails() -> None:
        raise ValueError("of a member")

    async def parent() -> None:
        async with asyncio.TaskGroup() as group:
            member = group.create_task(fails())
            log.append(context.wait_while(lambda: not member.done() or not me().cancelling(), LIMIT_S))
            await asyncio.Event().wait()
            log.append("not reached")

    async def starts() -> Any:
        with pytest.raises(ExceptionGroup) as caught:
            await started(context, parent(), as_task)
        return [str(error) for error in caught.value.exceptions]

    assert context.spawn(starts()).result(2 * LIMIT_S) == ["of a member"]
    assert log == [True]
