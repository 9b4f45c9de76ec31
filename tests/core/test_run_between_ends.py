"""run() between contexts (rule 10): uncancel() counts, exception groups, and a remote context that ends meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed
from tests.core.bounded import LIMIT_S, Plain, until, wait
from tests.core.places import Slow, returned
from tests.core.test_run_between import AS, Boom, Sides, me, raises, seen


@pytest.fixture(params=["main>io", "io>main", "io>io"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    with homeloop.Runtime() as rt, homeloop.IOThread("io-1") as one, homeloop.IOThread("io-2") as two:
        contexts = {"main>io": (rt.main, one.context), "io>main": (one.context, rt.main),
                    "io>io": (one.context, two.context)}
        yield Sides(*contexts[request.param])


# Counts


@AS
def test_rule10_uncancel_and_go_on(sides: Sides, as_task: bool) -> None:
    """Who takes its cancellation back may run() again, and await to the end; the remote one's own count is its own."""
    it = Slow()
    remote_counts: list[int] = []

    async def there() -> None:
        try:
            await it.run()
        finally:
            remote_counts.append(me().cancelling())

    async def here() -> tuple[int, int, str]:
        task = me()
        sides.local.loop.call_soon(asyncio.ensure_future, cancel_when(it.waiting, task))
        with pytest.raises(asyncio.CancelledError):
            await sides.remote.run(there())
        before = task.cancelling()
        return before, task.uncancel(), await sides.remote.run(returned(lambda: "again"))

    async def cancel_when(event: threading.Event, task: Any) -> None:
        await seen(event)
        task.cancel()

    assert sides.run(here, as_task) == (1, 0, "again")
    assert remote_counts == [1]
    assert it.log == ["cancelled", "cleaned up"]


@AS
@pytest.mark.parametrize("first", ["inner", "outer"])
def test_rule10_timeouts_one_in_the_other(sides: Sides, as_task: bool, first: str) -> None:
    """Around and inside the remote one: whose time is over turns its own cancellation into TimeoutError, no other."""
    short, long = 0.002, LIMIT_S

    async def there() -> str:
        try:
            async with asyncio.timeout(short if first == "inner" else long):
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            return f"inner {me().cancelling()}"
        return "never"

    async def here() -> tuple[str, int]:
        try:
            async with asyncio.timeout(long if first == "inner" else short):
                ended = await sides.remote.run(there())
        except TimeoutError:
            ended = "outer 0"
        await asyncio.sleep(0)
        return ended, me().cancelling()

    assert sides.run(here, as_task) == (f"{first} 0", 0)


# Exception groups


@AS
def test_rule10_an_exception_group_comes_back_whole(sides: Sides, as_task: bool) -> None:
    """Of a TaskGroup there: except* takes it apart here, and each member has the traceback of where it was raised."""
    async def there() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(raises(Boom("first")))
            group.create_task(raises(KeyError("second")))

    async def here() -> list[str]:
        caught: list[str] = []
        try:
            await sides.remote.run(there())
        except* Boom as group:
            caught += [f"boom {error}" for error in group.exceptions]
        except* KeyError as group:
            for error in group.exceptions:
                frames = []
                trace = error.__traceback__
                while trace is not None:
                    frames.append(trace.tb_frame.f_code.co_name)
                    trace = trace.tb_next
                assert frames[-1] == "raises"
            caught += ["key"] * len(group.exceptions)
        return caught

    assert sides.run(here, as_task) == ["boom first", "key"]


@AS
def test_rule10_a_member_there_fails_while_the_local_one_is_cancelled(sides: Sides, as_task: bool) -> None:
    """A clean-up there that fails answers the cancellation with a group; it comes back instead of CancelledError."""
    begun = threading.Event()

    async def member() -> None:
        try:
            asyncio.get_running_loop().call_soon(begun.set)
            await asyncio.get_running_loop().create_future()
        finally:
            raise Boom

    async def there() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(member())

    async def here() -> tuple[list[type], int]:
        task = me()

        async def cancels() -> None:
            await seen(begun)
            task.cancel()

        canceller = asyncio.ensure_future(cancels())
        with pytest.raises(ExceptionGroup) as caught:
            await sides.remote.run(there())
        await canceller
        return [type(error) for error in caught.value.exceptions], task.cancelling()

    assert sides.run(here, as_task) == ([Boom], 1)


# The remote context ends meanwhile


@pytest.fixture
def ending() -> Iterator[tuple[homeloop.Runtime, homeloop.IOThread]]:
    """A runtime, and an IOThread that the test stops."""
    with homeloop.Runtime() as rt:
        io = homeloop.IOThread().start()
        try:
            yield rt, io
        finally:
            Plain(io.stop).result(io)


@AS
@pytest.mark.parametrize("how", ["swallows", "fails", "asks back"])
def test_rule10_what_the_end_of_the_remote_context_makes_of_it(
    ending: tuple[homeloop.Runtime, homeloop.IOThread], as_task: bool, how: str
) -> None:
    """stop() cancels it: what it answers is what comes back, also where its clean-up run()s in the local context."""
    rt, io = ending
    it = Slow()

    async def there() -> str:
        try:
            return await it.run()
        except asyncio.CancelledError:
            if how == "swallows":
                return "swallowed"
            if how == "fails":
                raise Boom from None
            return await rt.main.run(returned(lambda: "asked back"))

    async def here() -> str:
        try:
            return await io.run(there())
        except Boom:
            return "failed"

    thread = Plain(lambda: Sides(rt.main, io.context).run(here, as_task))
    wait(it.waiting, io.context)
    io.stop()
    expected = {"swallows": "swallowed", "fails": "failed", "asks back": "asked back"}
    assert thread.result(rt.main) == expected[how]


@AS
def test_rule10_cancelled_while_the_remote_context_ends(
    ending: tuple[homeloop.Runtime, homeloop.IOThread], as_task: bool
) -> None:
    """Both ask it to end: it is waited for, whatever comes first, and told to each once."""
    rt, io = ending
    cleaning, go_on = threading.Event(), threading.Event()
    waiting = threading.Event()
    log: list[str] = []

    async def there() -> None:
        try:
            asyncio.get_running_loop().call_soon(waiting.set)
            await asyncio.get_running_loop().create_future()
        finally:
            cleaning.set()
            while not go_on.is_set():
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    log.append("cancelled again")
            log.append("cleaned up")

    tasks: list[Any] = []

    async def here() -> int:
        tasks.append(me())
        with pytest.raises(asyncio.CancelledError):
            await io.run(there())
        log.append("told")
        return me().cancelling()

    thread = Plain(lambda: Sides(rt.main, io.context).run(here, as_task))
    wait(waiting, io.context)
    stopper = Plain(io.stop)
    wait(cleaning, io.context)
    rt.main.post(tasks[0].cancel)
    until(lambda: "cancelled again" in log, rt.main, io.context)
    go_on.set()
    assert thread.result(rt.main) == 1
    stopper.result(io)
    assert log == ["cancelled again", "cleaned up", "told"]


@AS
def test_rule10_run_in_a_context_that_is_ending(
    ending: tuple[homeloop.Runtime, homeloop.IOThread], as_task: bool
) -> None:
    """What comes during the end is cancelled and waited for like the rest, or refused: never forgotten."""
    rt, io = ending
    it = Slow()
    ended: list[str] = []

    async def here() -> str:
        while True:
            try:
                await io.run(asyncio.sleep(0))
                ended.append("ran")
            except asyncio.CancelledError:
                assert not me().cancelling()
                ended.append("cancelled")
            except ContextClosed:
                return "refused"

    holds = io.spawn(it.run())
    wait(it.waiting, io.context)
    thread = Plain(lambda: Sides(rt.main, io.context).run(here, as_task))
    until(lambda: "ran" in ended, rt.main, io.context)
    io.stop()
    assert thread.result(rt.main) == "refused"
    assert holds.cancelled()
    assert it.log == ["cancelled", "cleaned up"]
