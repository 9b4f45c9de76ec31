"""TaskGroup when something else ends: a child's context, the parent's, the program; and that nobody is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from typing import Any

import pytest

import homeloop
from homeloop import TaskGroup
from homeloop.errors import ContextClosed, WrongState
from tests.core.bounded import LIMIT_S, STRESS_S, until, wait
from tests.sync.task_groups import Run, fails, forever, turns, value


def test_a_context_that_has_ended(run: Run) -> None:
    """Refused at once, and the group goes on; in the middle, the child is cancelled and leaves."""
    begun = threading.Event()
    with homeloop.IOThread("gone") as gone:
        pass

    async def begin() -> None:
        begun.set()
        await forever()

    async def main() -> None:
        io = homeloop.IOThread("going").start()
        async with TaskGroup() as group:
            child = group.spawn(begin(), context=io.context)
            await asyncio.to_thread(wait, begun)
            await asyncio.to_thread(io.stop)
            with pytest.raises(ContextClosed):
                group.spawn(value(1), context=gone.context)
            with pytest.raises(ContextClosed):
                group.spawn(value(1), context=io.context)
            last = group.spawn(value(2))
        assert child.cancelled()
        assert last.result() == 2

    run(main())


def test_a_loop_that_is_closed_under_a_child(run: Run) -> None:
    """A stock loop that nobody runs any more: when the group ends its children, it does not wait for that one."""
    loop = asyncio.SelectorEventLoop()

    async def adopt() -> homeloop.AioContext:
        return homeloop.AioContext.of()

    context = loop.run_until_complete(adopt())

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as info:
            async with TaskGroup() as group:
                group.spawn(forever(), context=context)
                loop.close()
                raise LookupError
        assert [type(error) for error in info.value.exceptions] == [ContextClosed, LookupError]

    run(main())
    gc.collect()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("parent", [asyncio.run, homeloop.run])
def test_interrupt_of_a_child_is_raised_as_it_is(parent: Run, error: type[BaseException]) -> None:
    """The child is a task of the parent's own loop: it ends the run, and the group is told at its end."""
    seen: list[BaseException] = []

    async def main() -> None:
        try:
            async with TaskGroup() as group:
                group.create_task(fails(error()))
                group.spawn(forever())
                await forever()
        except BaseException as exc:
            seen.append(exc)
            raise

    with pytest.raises(error):
        parent(main())
    assert [type(exc) for exc in seen] == [error]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_interrupt_of_a_child_in_another_thread(run: Run, homes: list[Any]) -> None:
    """Its thread ends, as with any SystemExit in an IOThread; the group raises it, not a group of errors."""
    async def main() -> None:
        me: Any = asyncio.current_task()
        io = homeloop.IOThread("exits").start()
        with pytest.raises(SystemExit, match="4"):
            async with TaskGroup() as group:
                other = group.spawn(forever(), context=homes[1])
                group.spawn(fails(SystemExit(4)), context=io.context)
                await forever()
        assert other.cancelled()
        assert me.cancelling() == 0
        await asyncio.to_thread(io.stop)

    run(main())


def test_interrupt_of_the_block_is_raised_as_it_is(run: Run, homes: list[Any]) -> None:
    async def main() -> None:
        with pytest.raises(KeyboardInterrupt):
            async with TaskGroup() as group:
                children = [group.spawn(forever(), context=home) for home in homes]
                raise KeyboardInterrupt
        assert all(child.cancelled() for child in children)

    run(main())


def test_parent_whose_context_ends(homes: list[Any]) -> None:
    """The parent is cancelled with its IOThread; its children elsewhere end before it does."""
    begun: list[Any] = []

    async def parent() -> None:
        async with TaskGroup() as group:
            begun.append(group.spawn(forever(), context=homes[1]))

    with homeloop.IOThread("short") as io:
        co = io.spawn(parent())
        until(lambda: begun)
    assert begun[0].cancelled()
    assert co.cancelled()


def test_parent_that_is_closed_does_not_wait(homes: list[Any]) -> None:
    """Its coroutine object is closed, as a loop does that is closed under it: the children are cancelled."""
    children: list[Any] = []
    for where in ("block", "exit"):
        loop = asyncio.SelectorEventLoop()

        async def parent(where: str = where) -> None:
            async with TaskGroup() as group:
                children.append(group.spawn(forever(), context=homes[1]))
                if where == "block":
                    await forever()

        task = loop.create_task(parent())
        loop.run_until_complete(turns())
        task.get_coro().close()         # type: ignore[union-attr]
        until(children[-1].done)
        assert children[-1].cancelled()
        task._log_destroy_pending = False       # type: ignore[attr-defined]
        loop.close()


@pytest.mark.stress
def test_stress_ends_with_everybody_gone(run: Run, homes: list[Any], seed: int) -> None:
    """Children of all threads that bring in others, fail and end at any moment, and a parent that is cancelled at
    any: the block ends, nobody runs behind it, and every error but those of refusals is in the group."""
    choose = random.Random(seed)
    alive: set[int] = set()
    failed: list[BaseException] = []
    raised: list[BaseException] = []

    async def child(group: TaskGroup, number: int, plan: random.Random) -> None:
        alive.add(number)
        try:
            for _ in range(plan.randrange(6)):
                await asyncio.sleep(0)
                if plan.random() < 0.4:
                    add(group, plan)
            if plan.random() < 0.2:
                failed.append(OSError(number))
                raise failed[-1]
        finally:
            alive.discard(number)

    def add(group: TaskGroup, plan: random.Random) -> None:
        number = plan.getrandbits(60)
        try:
            group.spawn(child(group, number, random.Random(number)), context=plan.choice(homes))
        except WrongState as refusal:
            if "shutting down" not in str(refusal):     # a child speaks: the group cannot have finished
                raise

    async def parent() -> None:
        group = TaskGroup()
        try:
            async with group:
                for _ in range(4):
                    add(group, choose)
                    await turns(choose.randrange(3))
        except BaseExceptionGroup as errors:
            raised.extend(errors.exceptions)

    async def main() -> None:
        for _ in range(round(100 * STRESS_S)):
            failed.clear()
            raised.clear()
            task = asyncio.create_task(parent())
            if choose.random() < 0.3:
                await turns(choose.randrange(12))
                task.cancel()
            async with asyncio.timeout(LIMIT_S):
                await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None     # cancelled also where it had errors to raise
            assert not alive
            assert set(raised) == set(failed)

    run(main())
