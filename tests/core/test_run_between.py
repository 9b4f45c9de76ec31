"""run(): await a coroutine of another context (rule 10). Cancelling goes there and is waited for."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import random
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, wait
from tests.core.places import Slow, returned

hop_var: contextvars.ContextVar[str] = contextvars.ContextVar("hop_var", default="nobody")


class Sides:
    """A local context, in which the test's coroutine runs, and a remote one."""

    def __init__(self, local: homeloop.AioContext, remote: homeloop.AioContext) -> None:
        self.local = local
        self.remote = remote

    def run(self, fn: Callable[[], Awaitable[Any]], as_task: bool) -> Any:
        """Run fn() at the local side, in a Coroutine or in an asyncio task of its loop; its result."""

        async def in_task() -> Any:
            return await asyncio.ensure_future(fn())

        async def in_coroutine() -> Any:
            return await fn()

        return self.local.spawn(in_task() if as_task else in_coroutine()).result(LIMIT_S)


@pytest.fixture(params=["main>io", "io>main", "io>io", "main>main"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    with homeloop.Runtime() as rt, homeloop.IOThread("io-1") as one, homeloop.IOThread("io-2") as two:
        contexts = {"main>io": (rt.main, one.context), "io>main": (one.context, rt.main),
                    "io>io": (one.context, two.context), "main>main": (rt.main, rt.main)}
        yield Sides(*contexts[request.param])


AS = pytest.mark.parametrize("as_task", [False, True], ids=["coroutine", "task"])


async def seen(event: threading.Event) -> None:
    """Let others run until the event is set."""
    loop = asyncio.get_running_loop()
    until = loop.time() + LIMIT_S
    while not event.is_set():
        assert loop.time() < until, "the event was not set"
        await asyncio.sleep(0)


def me() -> Any:
    task = asyncio.current_task()
    assert task is not None
    return task


class Boom(Exception):
    pass


async def raises(exc: BaseException) -> None:
    await asyncio.sleep(0)
    raise exc


# Results


@AS
def test_rule10_result_and_place(sides: Sides, as_task: bool) -> None:
    """It runs in the remote context, on its home thread; the result comes back to the local one."""

    async def there() -> tuple[Any, int]:
        await asyncio.sleep(0)
        return homeloop.current_context(), threading.get_ident()

    async def here() -> None:
        thread = threading.get_ident()
        context, ident = await sides.remote.run(there())
        assert context is sides.remote
        assert (ident == thread) is (sides.remote is sides.local)
        assert homeloop.current_context() is sides.local
        assert threading.get_ident() == thread

    sides.run(here, as_task)


@AS
def test_rule10_exception_with_its_traceback(sides: Sides, as_task: bool) -> None:
    """The remote exception is raised here; its traceback leads into the remote coroutine."""

    async def here() -> list[str]:
        with pytest.raises(Boom) as caught:
            await sides.remote.run(raises(Boom()))
        return [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    assert "raises" in sides.run(here, as_task)


@AS
def test_rule10_contextvars_go_along(sides: Sides, as_task: bool) -> None:
    """The remote coroutine sees the local one's contextvars; what it sets stays its own."""

    async def there() -> str:
        seen = hop_var.get()
        hop_var.set("remote")
        return seen

    async def here() -> tuple[str, str]:
        hop_var.set("local")
        return await sides.remote.run(there()), hop_var.get()

    assert sides.run(here, as_task) == ("local", "local")


def test_rule10_there_and_back(sides: Sides) -> None:
    """A remote coroutine may run something back at the first side, many levels deep."""

    async def bounce(depth: int) -> int:
        if not depth:
            return 0
        there = sides.remote if homeloop.current_context() is sides.local else sides.local
        return 1 + await there.run(bounce(depth - 1))

    assert sides.local.spawn(bounce(40)).result(LIMIT_S) == 40


def test_rule10_from_a_stock_asyncio_loop() -> None:
    """run() may be awaited in a loop of any make; cancelling works from there too."""
    it = Slow()

    async def main(io: homeloop.IOThread) -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.005):
                await io.run(it.run())
        return await io.run(returned(lambda: threading.current_thread().name))

    with homeloop.IOThread("io-stock") as io:
        assert asyncio.run(main(io)) == "io-stock"
    assert it.log == ["cancelled", "cleaned up"]


@AS
@pytest.mark.parametrize("how", ["await", "gather", "wait_for", "shield", "wait", "ensure_future", "TaskGroup"])
def test_rule10_asyncio_functions_take_a_remote_coroutine(sides: Sides, as_task: bool, how: str) -> None:
    """A Coroutine of another context is an awaitable like any: asyncio's own functions wait for it."""

    async def here() -> Any:
        co = sides.remote.spawn(returned(lambda: "result"))
        if how == "await":
            return await co
        if how == "gather":
            return (await asyncio.gather(co, asyncio.sleep(0)))[0]
        if how == "wait_for":
            return await asyncio.wait_for(co, LIMIT_S)
        if how == "shield":
            return await asyncio.shield(co)
        if how == "ensure_future":
            return await asyncio.ensure_future(co)
        if how == "wait":
            done, _ = await asyncio.wait([asyncio.ensure_future(co)])
            return done.pop().result()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(run_here(co))
        return task.result()

    assert sides.run(here, as_task) == "result"


# Cancelling from here


@AS
def test_rule10_cancel_goes_there_and_is_waited_for(sides: Sides, as_task: bool) -> None:
    """The local one sees CancelledError only after the remote one has cleaned up."""
    it = Slow()
    log: list[list[str]] = []

    async def here() -> None:
        try:
            await sides.remote.run(it.run())
        finally:
            log.append(list(it.log))

    async def canceller() -> tuple[bool, int]:
        task: Any = asyncio.ensure_future(here()) if as_task else sides.local.spawn(here())
        await seen(it.waiting)
        assert task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelled(), task.cancelling()

    assert sides.local.spawn(canceller()).result(LIMIT_S) == (True, 1)
    assert log == [["cancelled", "cleaned up"]]


@AS
def test_rule10_asyncio_timeout_around_it(sides: Sides, as_task: bool) -> None:
    """asyncio.timeout turns its own cancellation into TimeoutError, and takes it back: the count is 0 again."""
    it = Slow()

    async def here() -> tuple[int, str]:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.002):
                await sides.remote.run(it.run())
        return me().cancelling(), await sides.remote.run(returned(lambda: "goes on"))

    assert sides.run(here, as_task) == (0, "goes on")
    assert it.log == ["cancelled", "cleaned up"]


@AS
def test_rule10_wait_for_around_it(sides: Sides, as_task: bool) -> None:
    """The same with asyncio.wait_for."""
    it = Slow()

    async def here() -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sides.remote.run(it.run()), 0.002)
        return me().cancelling()

    assert sides.run(here, as_task) == 0
    assert it.log == ["cancelled", "cleaned up"]


async def in_a_group(run: Callable[[Any], Any], its: list[Slow]) -> tuple[int, list[type[BaseException]]]:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            for it in its:
                group.create_task(run(it.run()))
            for it in its:
                await seen(it.waiting)
            group.create_task(run(raises(Boom())))
    return me().cancelling(), [type(exc) for exc in caught.value.exceptions]


async def run_here(coro: Any) -> Any:
    return await coro


@AS
def test_rule10_task_group_around_it(sides: Sides, as_task: bool) -> None:
    """One member fails: the remote coroutines of the others are cancelled and waited for, then the group ends.

    Counts and errors are those that asyncio has for tasks of its own (which differ from 3.11 to 3.13).
    """
    its = [Slow() for _ in range(3)]
    stock = asyncio.run(in_a_group(run_here, [Slow() for _ in range(3)]))
    assert sides.run(lambda: in_a_group(sides.remote.run, its), as_task) == stock
    assert [it.log for it in its] == [["cancelled", "cleaned up"]] * 3


def test_rule10_task_group_in_a_coroutine_that_is_cancelled(sides: Sides) -> None:
    """The group's parent is cancelled from elsewhere: members end first, then the parent, as cancelled."""
    its = [Slow() for _ in range(2)]

    async def parent() -> None:
        async with asyncio.TaskGroup() as group:
            for it in its:
                group.create_task(sides.remote.run(it.run()))

    co = sides.local.spawn(parent())
    for it in its:
        wait(it.waiting, sides.local, sides.remote)
    assert co.cancel()
    with pytest.raises(asyncio.CancelledError):
        co.result(LIMIT_S)
    assert [it.log for it in its] == [["cancelled", "cleaned up"]] * 2


@AS
def test_rule10_remote_swallows_the_cancellation(sides: Sides, as_task: bool) -> None:
    """Its result comes back as if nothing had been; the local count still says that somebody asked."""
    it = Slow()

    async def swallows() -> str:
        try:
            return await it.run()
        except asyncio.CancelledError:
            return "swallowed"

    async def here() -> tuple[str, int]:
        task = me()
        sides.local.loop.call_later(0.002, task.cancel)
        return await sides.remote.run(swallows()), task.cancelling()

    assert sides.run(here, as_task) == ("swallowed", 1)


@AS
def test_rule10_remote_answers_a_cancellation_with_an_error(sides: Sides, as_task: bool) -> None:
    """The error comes back instead of CancelledError, as with an asyncio task."""

    async def fails() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            raise Boom from None

    async def here() -> None:
        sides.local.loop.call_later(0.002, me().cancel)
        with pytest.raises(Boom):
            await sides.remote.run(fails())

    sides.run(here, as_task)


@AS
def test_rule10_cancelled_twice(sides: Sides, as_task: bool) -> None:
    """A second cancel() reaches the remote coroutine while it answers the first."""
    log: list[str] = []
    stages = [threading.Event(), threading.Event()]

    async def there() -> None:
        for stage in stages:
            try:
                asyncio.get_running_loop().call_soon(stage.set)
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                log.append("cancelled")
        raise asyncio.CancelledError

    async def here() -> int:
        task: Any = asyncio.ensure_future(sides.remote.run(there())) if as_task else sides.local.spawn(
            sides.remote.run(there()))
        for stage in stages:
            await seen(stage)
            assert task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelling()

    assert sides.local.spawn(here()).result(LIMIT_S) == 2
    assert log == ["cancelled", "cancelled"]


# main>main: it begins right after the local one waits, there is no moment between.
FORCED = pytest.mark.parametrize("sides", ["main>io", "io>main", "io>io"], indirect=True)


def blocked(context: homeloop.AioContext) -> threading.Event:
    """Stop a home until the event is set; it is stopped on return."""
    stopped, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopped.set()
        wait(go_on, context)

    context.post(stop)
    wait(stopped, context)
    return go_on


@FORCED
def test_rule10_cancelled_while_it_is_queued(sides: Sides) -> None:
    """Cancelled before the remote home has begun it: it gets no further than its first wait, and is waited for."""
    it = Slow()
    go_on = blocked(sides.remote)
    co = sides.local.spawn(sides.remote.run(it.run()))
    waits = threading.Event()
    sides.local.post(lambda: sides.local.post(waits.set))       # by then it has posted to the remote home
    wait(waits, sides.local)
    co.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        co.result(LIMIT_S)
    assert it.log in ([], ["cancelled", "cleaned up"])


# Cancelling from there


@AS
def test_rule10_the_remote_coroutine_is_cancelled_there(sides: Sides, as_task: bool) -> None:
    """Somebody else cancels it: CancelledError comes back, though nobody asked the local one to end."""
    it = Slow()

    async def here() -> int:
        co = sides.remote.spawn(it.run())
        Plain(lambda: (wait(it.waiting), co.cancel()))
        with pytest.raises(asyncio.CancelledError):
            await co
        return me().cancelling()

    assert sides.run(here, as_task) == 0
    assert it.log == ["cancelled", "cleaned up"]


# Races between a cancellation and the end, both orders forced


class Forced:
    """A local coroutine that awaits a remote one, which ends when the test says so."""

    def __init__(self, sides: Sides, as_task: bool) -> None:
        self.sides = sides
        self.finish = sides.remote.loop.create_future()
        self.begun = threading.Event()
        self.outcome: list[Any] = []
        self.co = sides.local.spawn(self._in_task() if as_task else self._here())
        self.target: Any = None

    async def _in_task(self) -> None:
        await asyncio.ensure_future(self._here())

    async def _here(self) -> None:
        self.target = me()
        try:
            self.outcome.append(await self.sides.remote.run(self._there()))
        except asyncio.CancelledError:
            self.outcome.append("cancelled")
        self.outcome.append(me().cancelling())
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.outcome.append("cancelled later")

    async def _there(self) -> str:
        asyncio.get_running_loop().call_soon(self.begun.set)
        return await self.finish


@AS
@FORCED
def test_rule10_the_end_comes_before_the_cancellation(sides: Sides, as_task: bool) -> None:
    """The remote one has ended, and its message is under way, when the local one is cancelled: not lost.

        local home                      remote home
        1 blocked
                                        2 ends with "result", tells the local home
        3 cancel() is queued behind it
        4 goes on: the end, then the cancellation
    """
    forced = Forced(sides, as_task)
    wait(forced.begun, sides.remote)
    go_on = blocked(sides.local)
    sides.remote.post(forced.finish.set_result, "result")
    sides.remote.spawn(asyncio.sleep(0)).result(LIMIT_S)
    sides.local.post(lambda: forced.target.cancel())
    go_on.set()
    forced.co.result(LIMIT_S)
    # Cancelled once, told once: here or at the next await, never not at all.
    assert forced.outcome in (["cancelled", 1], ["result", 1, "cancelled later"])


@AS
@FORCED
def test_rule10_the_cancellation_crosses_the_end(sides: Sides, as_task: bool) -> None:
    """The request to cancel finds the remote coroutine ended already, and the local one not yet told.

        local home                      remote home
                                        1 blocked; "end it" is queued
        2 cancel(): a request goes out
                                        3 goes on: ends; then finds the request, too late
        4 must be told of its cancellation, once
    """
    forced = Forced(sides, as_task)
    wait(forced.begun, sides.remote)
    go_on = blocked(sides.remote)
    sides.remote.post(forced.finish.set_result, "result")
    sides.local.post(lambda: forced.target.cancel())
    # Not result(): the loop of a blocked main home may be the local one.
    asked = threading.Event()
    sides.local.post(asked.set)
    wait(asked, sides.local)
    go_on.set()
    forced.co.result(LIMIT_S)
    assert forced.outcome == ["cancelled", 1]


@AS
@FORCED
def test_rule10_the_cancellation_comes_before_the_end(sides: Sides, as_task: bool) -> None:
    """The request arrives first: the remote coroutine is cancelled, its end afterwards changes nothing.

        local home                      remote home
                                        1 blocked
        2 cancel(): a request goes out
                                        3 "end it" is queued behind the request
                                        4 goes on: cancelled; the late end finds nobody
    """
    forced = Forced(sides, as_task)
    wait(forced.begun, sides.remote)
    go_on = blocked(sides.remote)
    sides.local.post(lambda: forced.target.cancel())
    asked = threading.Event()
    sides.local.post(asked.set)
    wait(asked, sides.local)
    sides.remote.post(lambda: forced.finish.done() or forced.finish.set_result("late"))
    go_on.set()
    forced.co.result(LIMIT_S)
    assert forced.outcome == ["cancelled", 1]


# The remote context ends meanwhile


@pytest.mark.parametrize("as_task", [False, True], ids=["coroutine", "task"])
def test_rule10_the_remote_context_is_stopped_meanwhile(as_task: bool) -> None:
    """stop() cancels the remote coroutine and waits for it; the local one gets CancelledError, not a hang."""
    it = Slow()
    with homeloop.Runtime() as rt:
        io = homeloop.IOThread().start()
        sides = Sides(rt.main, io.context)

        async def here() -> str:
            with pytest.raises(asyncio.CancelledError):
                await io.run(it.run())
            return "told"

        thread = Plain(lambda: sides.run(here, as_task))
        wait(it.waiting, io.context)
        io.stop()
        assert thread.result(rt.main) == "told"
    assert it.log == ["cancelled", "cleaned up"]


def test_rule10_the_remote_context_has_ended_before(sides: Sides) -> None:
    """ContextClosed, and the coroutine object is closed."""
    with homeloop.IOThread() as io:
        pass
    coro = returned(lambda: 1)

    async def here() -> None:
        with pytest.raises(ContextClosed):
            await io.run(coro)

    sides.run(here, False)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


def test_rule10_the_local_loop_is_gone_when_the_remote_one_ends() -> None:
    """The waiting side was torn down without waiting: the remote end finds nobody and harms nobody."""
    finish = threading.Event()
    with homeloop.IOThread() as io:
        loop = asyncio.new_event_loop()
        task = loop.create_task(io.run(returned(lambda: wait(finish))))
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        task._log_destroy_pending = False       # type: ignore[attr-defined]
        loop.close()
        finish.set()
        assert io.spawn(returned(lambda: 1)).result(LIMIT_S) == 1


# Many at once


@pytest.mark.stress
def test_rule10_stress_cancellations_are_told_once(sides: Sides, seed: int) -> None:
    """Random ends and random cancellations: each run() ends as its remote coroutine did, or cancelled; none hangs."""
    rnd = random.Random(seed)
    rounds = 100

    async def there(yields: int) -> str:
        for _ in range(yields):
            await asyncio.sleep(0)
        return "result"

    async def one(there_yields: int, here_yields: int | None) -> str:
        async def runs() -> str:
            return await sides.remote.run(there(there_yields))

        task: Any = sides.local.spawn(runs())
        if here_yields is not None:
            for _ in range(here_yields):
                await asyncio.sleep(0)
            asked = task.cancel()
        else:
            asked = False
        try:
            return await task
        except asyncio.CancelledError:
            assert asked
            return "cancelled"

    async def all_of_them() -> list[str]:
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.gather(*(
                one(rnd.randrange(6), rnd.choice([None, *range(8)])) for _ in range(rounds)
            ))

    end = time.monotonic() + STRESS_S / 4           # four pairs of sides
    while time.monotonic() < end:
        ends = sides.local.spawn(all_of_them()).result(2 * LIMIT_S)
        assert len(ends) == rounds
        assert set(ends) <= {"result", "cancelled"}
