"""TaskGroup: children of chosen contexts begin and end with the block; errors, cancellation, who may add."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import homeloop
from homeloop import TaskGroup
from homeloop.errors import NoRuntime, WrongState
from tests.core.bounded import LIMIT_S, Plain, until
from tests.sync.task_groups import Run, come, fails, forever, run_in_runtime, turns, value


def test_waits_for_all(run: Run, homes: list[Any]) -> None:
    async def where() -> Any:
        await asyncio.sleep(0)
        return homeloop.AioContext.of()

    async def main() -> None:
        mine = homeloop.AioContext.of()
        async with TaskGroup() as group:
            children = [group.spawn(where(), context=home, name="child") for home in homes for _ in range(5)]
            tasks = [group.create_task(where(), name="task") for _ in range(5)]
            assert "tasks=30" in repr(group)
        assert all(child.done() and child.name == "child" for child in children)
        assert [child.result() for child in children] == [home or mine for home in homes for _ in range(5)]
        assert [task.result() for task in tasks] == [mine] * 5
        assert all(isinstance(task, asyncio.Task) and task.get_name() == "task" for task in tasks)

    run(main())


def test_first_error_cancels_the_others_in_their_threads(run: Run, homes: list[Any]) -> None:
    async def cleaning(log: list[int], ready: list[int]) -> None:
        ready.append(1)
        try:
            await forever()
        finally:
            log.append(threading.get_ident())

    async def main(home: Any) -> None:
        log: list[int] = []
        ready: list[int] = []
        with pytest.raises(ExceptionGroup) as info:
            async with TaskGroup() as group:
                others = [group.spawn(cleaning(log, ready), context=other) for other in homes]
                others_tasks = [group.create_task(cleaning(log, ready))]
                await come(lambda: len(ready) == 6)
                group.spawn(fails(OSError("disk")), context=home)
                await forever()
        assert [str(error) for error in info.value.exceptions] == ["disk"]
        assert all(other.cancelled() for other in [*others, *others_tasks])
        assert len(log) == 6
        assert len(set(log)) >= 5 - (run is run_in_runtime)
        me: Any = asyncio.current_task()
        assert me.cancelling() == 0
        await asyncio.sleep(0)                  # no cancellation is left behind

    for home in homes:
        run(main(home))


def test_all_errors_are_raised(run: Run, homes: list[Any]) -> None:
    """Each fails, some in answer to their cancellation; the block too."""
    async def fails_late() -> None:
        try:
            await forever()
        finally:
            raise KeyError

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as info:
            async with TaskGroup() as group:
                late = [group.spawn(fails_late(), context=home) for home in homes]
                await come(lambda: all(child.state is homeloop.CoroutineState.WAITING for child in late))
                group.spawn(fails(OSError()), context=homes[1])
                try:
                    await forever()
                finally:
                    raise ValueError
        kinds = sorted(type(error).__name__ for error in info.value.exceptions)
        assert kinds == ["KeyError"] * 5 + ["OSError", "ValueError"]

    run(main())


def test_error_of_the_block(run: Run, homes: list[Any]) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as info:
            async with TaskGroup() as group:
                children = [group.spawn(forever(), context=home) for home in homes]
                raise LookupError
        assert [type(error) for error in info.value.exceptions] == [LookupError]
        assert all(child.cancelled() for child in children)

    run(main())


def test_cancelled_parent_cancels_and_waits(run: Run, homes: list[Any]) -> None:
    async def stubborn(ended: list[int]) -> None:
        try:
            await forever()
        finally:
            await turns()
            ended.append(1)

    async def main() -> None:
        ended: list[int] = []
        begun: list[Any] = []

        async def parent() -> None:
            async with TaskGroup() as group:
                begun.extend(group.spawn(stubborn(ended), context=home) for home in homes)

        task = asyncio.create_task(parent())
        await come(lambda: begun and all(child.state is homeloop.CoroutineState.WAITING for child in begun))
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert len(ended) == len(homes)

    run(main())


def test_cancelled_by_others_and_failed_keeps_the_count(run: Run, homes: list[Any]) -> None:
    """A child fails in answer to the cancellation of the parent: the error first, then the cancellation."""
    async def fails_when_cancelled() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise OSError from None

    async def main() -> None:
        seen: list[Any] = []
        begun: list[Any] = []

        async def parent() -> None:
            me: Any = asyncio.current_task()
            try:
                async with TaskGroup() as group:
                    begun.append(group.spawn(fails_when_cancelled(), context=homes[1]))
            except* OSError:
                seen.append(me.cancelling())
            await forever()

        task = asyncio.create_task(parent())
        await come(lambda: begun and begun[0].state is homeloop.CoroutineState.WAITING)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == [1]

    run(main())


def test_timeouts_of_asyncio(run: Run, homes: list[Any]) -> None:
    async def main() -> None:
        me: Any = asyncio.current_task()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                async with TaskGroup() as group:
                    outside = [group.spawn(forever(), context=home) for home in homes]
        assert all(child.cancelled() for child in outside)
        assert me.cancelling() == 0
        async with TaskGroup() as group:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await group.spawn(forever(), context=homes[1])
            inside = group.spawn(value(1), context=homes[2])
        assert inside.result() == 1
        assert me.cancelling() == 0

    run(main())


def test_anyio_cancel_scopes(run: Run, homes: list[Any]) -> None:
    anyio = pytest.importorskip("anyio")

    async def main() -> None:
        me: Any = asyncio.current_task()
        with anyio.move_on_after(0.01) as scope:
            async with TaskGroup() as group:
                children = [group.spawn(forever(), context=home) for home in homes]
        assert scope.cancelled_caught
        assert all(child.cancelled() for child in children)
        assert me.cancelling() == 0
        with anyio.CancelScope() as scope:
            with pytest.raises(ExceptionGroup):
                async with TaskGroup() as group:
                    group.spawn(fails(OSError()), context=homes[1])
                    await anyio.sleep_forever()
        assert not scope.cancelled_caught
        async with anyio.create_task_group() as theirs:         # ours inside a task of theirs, which cancels it
            async def inner() -> None:
                async with TaskGroup() as group:
                    group.spawn(forever(), context=homes[2])

            theirs.start_soon(inner)
            await turns()
            theirs.cancel_scope.cancel()
        assert me.cancelling() == 0

    run(main())


def test_children_add_children(run: Run, homes: list[Any]) -> None:
    """Each of two generations brings two in, from its own thread, and is often gone before they are."""
    seen: list[int] = []

    async def child(group: TaskGroup, depth: int) -> None:
        seen.append(depth)
        await asyncio.sleep(0)
        if depth:
            group.spawn(child(group, depth - 1), context=homes[depth])
            group.create_task(child(group, depth - 1))

    async def main() -> None:
        async with TaskGroup() as group:
            for home in homes:
                group.spawn(child(group, 2), context=home)

    run(main())
    assert sorted(seen) == sorted([2] * 5 + [1] * 10 + [0] * 20)


def test_any_thread_may_add_while_it_is_open(run: Run, homes: list[Any]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with TaskGroup() as group:
            child = await loop.run_in_executor(None, lambda: group.spawn(value(7), context=homes[1]))
            with pytest.raises(NoRuntime):
                await loop.run_in_executor(None, lambda: group.spawn(value(7)))
            with pytest.raises(WrongState, match="any thread"):
                await loop.run_in_executor(None, lambda: group.create_task(value(7)))
        assert child.result() == 7

    run(main())


def test_contextvars_go_along(run: Run, homes: list[Any]) -> None:
    var: contextvars.ContextVar[int] = contextvars.ContextVar("var")

    async def look() -> int:
        found = var.get()
        var.set(0)
        return found

    async def main() -> None:
        var.set(5)
        given = contextvars.copy_context()
        given.run(var.set, 6)
        async with TaskGroup() as group:
            children: list[Any] = [group.spawn(look(), context=home) for home in homes]
            task = group.create_task(look(), context=given)
        assert [child.result() for child in children] == [5] * len(homes)
        assert task.result() == 6
        assert var.get() == 5
        assert given[var] == 0

    run(main())


def test_refused(run: Run) -> None:
    """Not entered, twice entered, finished, shutting down: WrongState, and the coroutine object is closed."""
    async def main() -> None:
        group = TaskGroup()
        adds: list[Callable[[], object]] = [lambda: group.spawn(value(1)), lambda: group.create_task(value(1))]
        for add in adds:
            with pytest.raises(WrongState, match="not been entered"):
                add()
        async with group:
            with pytest.raises(WrongState, match="already been entered"):
                await group.__aenter__()
        for add in adds:
            with pytest.raises(WrongState, match="finished"):
                add()
        group = TaskGroup()
        said: list[str] = []

        async def late() -> None:
            try:
                await forever()
            finally:
                for add in adds:
                    with pytest.raises(WrongState) as info:
                        add()
                    said.append(str(info.value))

        with pytest.raises(ExceptionGroup):
            async with group:
                child = group.spawn(late())
                await come(lambda: child.state is homeloop.CoroutineState.WAITING)
                raise LookupError
        assert len(said) == 2
        assert all("shutting down" in text for text in said)

    run(main())


def test_outside_any_task() -> None:
    async def main() -> None:
        answered = asyncio.get_running_loop().create_future()

        def enter() -> None:
            try:
                TaskGroup().__aenter__().send(None)
            except BaseException as error:
                answered.set_result(error)

        asyncio.get_running_loop().call_soon(enter)
        with pytest.raises(WrongState, match="parent task"):
            raise await answered

    asyncio.run(main())
    homeloop.run(main())


def test_awaitable_children(run: Run, homes: list[Any]) -> None:
    """A child may be awaited inside the block; gather() and the like take it as a task of the loop."""
    async def main() -> None:
        async with TaskGroup() as group:
            waiting: list[Awaitable[int]] = [group.spawn(value(number), context=home)
                                             for number, home in enumerate(homes)]
            assert await asyncio.gather(*waiting) == list(range(len(homes)))

    run(main())


def test_plain_thread_that_holds_the_big_lock_may_add() -> None:
    with homeloop.Runtime() as rt:
        entered: list[TaskGroup] = []

        async def parent() -> str:
            async with TaskGroup() as group:
                entered.append(group)
                await homeloop.park("a child")
            return "left"

        def adding() -> Any:
            with rt.big_lock:
                child = entered[0].spawn(value(3))      # the current context: the main one
                co.wake()
                return child

        co = rt.main.spawn(parent())
        until(lambda: entered and co.state is homeloop.CoroutineState.PARKED)
        child = Plain(adding).result()
        assert child.context is rt.main
        assert co.result(LIMIT_S) == "left"
        assert child.result() == 3
