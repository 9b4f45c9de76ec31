"""Nested polls (rule 12): re-entrant iterations, inside whatever runs now, asked for by an explicit call."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import UsageError, WrongThread
from tests.core.bounded import LIMIT_S, Plain, asleep, in_plain_thread, until, wait
from tests.core.places import in_callback, in_coroutine, returned

level_var: contextvars.ContextVar[str] = contextvars.ContextVar("level_var", default="nobody")


@pytest.fixture(params=["main", "iothread"])
def context(request: pytest.FixtureRequest) -> Iterator[homeloop.AioContext]:
    """A served context that may be polled: with and without a big lock around it."""
    with homeloop.Runtime() as rt:
        if request.param == "main":
            yield rt.main
        else:
            with homeloop.IOThread() as io:
                yield io.context


PLACED = pytest.mark.parametrize("inside", [in_callback, in_coroutine], ids=["in a callback", "in a coroutine"])
Inside = Callable[[homeloop.AioContext, Callable[[], Any]], Any]


class Ready:
    """Callbacks made ready in order; the log says when each ran."""

    def __init__(self, context: homeloop.AioContext) -> None:
        self.loop = context.loop
        self.log: list[str] = []

    def add(self, *names: str) -> None:
        for name in names:
            self.loop.call_soon(self.log.append, name)


# The order


@PLACED
def test_rule12_outer_work_first(context: homeloop.AioContext, inside: Inside) -> None:
    """What the outer iteration had not run yet runs before what is queued inside it, and each once.

        outer iteration                 nested poll
        1 runs A of [A, B, C]
        2 A queues D, polls
                                        3 B, C, then D
        4 A goes on; nothing is left of the iteration
    """
    ready = Ready(context)

    def a() -> None:
        ready.log.append("A")
        ready.add("D")
        context.poll(False)
        ready.log.append("A again")

    def outer() -> None:
        context.loop.call_soon(a)
        ready.add("B", "C")
        while "A again" not in ready.log:
            context.poll(False)

    inside(context, outer)
    assert ready.log == ["A", "B", "C", "D", "A again"]


def test_rule12_an_outer_iteration_does_not_run_what_a_nested_one_left(context: homeloop.AioContext) -> None:
    """A callback that a nested iteration queues for later is not run by what remains of the outer iteration.

    The outer counted its entries before; a count taken for other entries would run E twice, or too early.
    """
    ready = Ready(context)

    def a() -> None:
        context.loop.call_soon(lambda: ready.add("E"))
        context.poll(False)                     # runs B and the line above: E is left for the next iteration
        ready.log.append("A")

    def outer() -> list[str]:
        context.loop.call_soon(a)
        ready.add("B")
        context.poll(False)
        return list(ready.log)

    assert in_callback(context, outer) == ["B", "A"]
    until(lambda: ready.log[2:], context)
    assert ready.log == ["B", "A", "E"]


@PLACED
@pytest.mark.parametrize("polls", [1, 3, 10])
def test_rule12_a_callback_that_requeues_itself_runs_once_per_poll(
    context: homeloop.AioContext, inside: Inside, polls: int
) -> None:
    """Each poll returns, though there is always something ready."""
    runs: list[int] = []
    going = [True]

    def again() -> None:
        runs.append(1)
        if going:
            context.loop.call_soon(again)

    def outer() -> int:
        context.loop.call_soon(again)
        for _ in range(polls):
            assert context.poll(False)
        count = len(runs)
        going.clear()
        context.poll(False)
        return count

    assert inside(context, outer) == polls


@PLACED
def test_rule12_self_waking_coroutine_runs_once_per_poll(context: homeloop.AioContext, inside: Inside) -> None:
    """`sleep(0)` in a coroutine, and in an asyncio task: one step each per poll."""
    steps: dict[str, int] = {"coroutine": 0, "task": 0}

    async def spins(kind: str) -> None:
        while True:
            steps[kind] += 1
            await asyncio.sleep(0)

    def outer() -> list[dict[str, int]]:
        co = context.spawn(spins("coroutine"))
        task = context.loop.create_task(spins("task"))
        seen = []
        for _ in range(4):
            context.poll(False)
            seen.append(dict(steps))
        co.cancel()
        task.cancel()
        return seen

    seen = inside(context, outer)
    for before, after in itertools.pairwise(seen):
        assert after == {kind: count + 1 for kind, count in before.items()}


@PLACED
def test_rule12_fifty_levels(context: homeloop.AioContext, inside: Inside) -> None:
    """Each callback polls for the next one: all run, and they return in the opposite order."""
    log: list[int] = []

    def dive(depth: int) -> None:
        if depth:
            context.loop.call_soon(dive, depth - 1)
            context.poll(True)
        log.append(depth)

    inside(context, lambda: dive(50))
    assert log == list(range(51))


# Return values


@PLACED
def test_rule12_poll_says_whether_it_made_progress(context: homeloop.AioContext, inside: Inside) -> None:
    """False when there was nothing to do; True for a callback, a post, a timer, a wake; never blocks if told so."""

    def outer() -> list[bool]:
        while context.poll(False):
            pass
        answers = [context.poll(False), context.poll(False)]
        context.loop.call_soon(lambda: None)
        answers.append(context.poll(False))
        context.post(lambda: None)
        answers.append(context.poll(True))
        context.loop.call_later(0.002, lambda: None)
        answers += [context.poll(False), context.poll(True)]
        context.spawn(returned(lambda: None))
        answers.append(context.poll(True))
        answers.append(context.poll(False))
        return answers

    assert inside(context, outer) == [False, False, True, True, False, True, True, False]


@PLACED
def test_rule12_cancelled_work_is_no_progress(context: homeloop.AioContext, inside: Inside) -> None:
    """A handle that was cancelled runs nothing, ready or timed."""

    def outer() -> bool:
        while context.poll(False):
            pass
        context.loop.call_soon(lambda: None).cancel()
        context.loop.call_later(0, lambda: None).cancel()
        return context.poll(False)

    assert inside(context, outer) is False


@PLACED
def test_rule12_blocking_poll_sleeps_until_a_post(context: homeloop.AioContext, inside: Inside) -> None:
    """poll(True) with nothing to do sleeps; a post from a plain thread ends the sleep, and is run by it."""
    ran: list[int] = []

    def poster() -> None:
        until(context.inbox.sleeping, context)
        context.post(ran.append, 1)

    def outer() -> tuple[bool, list[int]]:
        while context.poll(False):
            pass
        thread = Plain(poster)
        progress = context.poll(True)
        thread.result(context)
        return progress, list(ran)

    assert inside(context, outer) == (True, [1])


def test_rule12_poll_by_who_holds_the_big_lock() -> None:
    """A plain thread polls the main loop while it holds the lock; without it, and elsewhere, WrongThread."""
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        log: list[int] = []

        def holder() -> tuple[bool, list[int], bool]:
            with rt.big_lock:
                rt.main.loop.call_soon(log.append, threading.get_ident())
                progress = rt.main.poll(True)
                return progress, list(log), rt.main.poll(False)

        thread = Plain(holder)
        assert thread.result(rt.main) == (True, [thread.ident], False)
        for context in (rt.main, io.context):
            with pytest.raises(WrongThread):
                in_plain_thread(context.poll, False)


def test_rule12_poll_of_a_context_that_nobody_serves() -> None:
    """Any thread may poll it, one at a time, and is in it meanwhile."""
    rt = homeloop.Runtime()
    try:
        seen: list[Any] = []
        rt.main.post(lambda: seen.append(homeloop.current_context()))
        assert rt.main.poll(True) is True
        assert rt.main.poll(False) is False
        assert seen == [rt.main]
        assert homeloop.current_context() is None
        rt.main.post(lambda: seen.append(threading.get_ident()))
        thread = Plain(rt.main.poll, True)
        assert thread.result(rt.main) is True
        assert seen[1:] == [thread.ident]
    finally:
        rt.close()


def test_rule12_the_home_is_still_woken_after_a_holder_has_polled() -> None:
    """A holder's blocking poll may take the notification that was meant for the home: it is passed on.

        home                    plain thread (holder)           another
        1 sleeps
                                2 poll(True), sleeps too
                                                                3 posts: one kick
                                4 wakes, runs the post
        5 must still take what comes next
    """
    with homeloop.Runtime() as rt:
        asleep(rt.main)
        polled = threading.Event()

        def holder() -> bool:
            with rt.big_lock:
                rt.main.loop.call_soon(polled.set)
                return rt.main.poll(True)

        for _ in range(20):
            polled.clear()
            thread = Plain(holder)
            wait(polled, rt.main)
            assert thread.result(rt.main) is True
            assert rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S) != thread.ident


# Current task, coroutine and contextvars


def who() -> tuple[Any, Any, str]:
    return asyncio.current_task(), homeloop.current_coroutine(), level_var.get()


async def level(context: homeloop.AioContext, names: list[str], seen: dict[str, Any]) -> None:
    """Note who I am, poll until the next level has run inside me, and note again."""
    name, *deeper = names
    level_var.set(name)
    me = asyncio.current_task()
    seen[name] = [who()]
    if deeper:
        make = context.loop.create_task if deeper[0].startswith("task") else context.spawn
        inner: Any = make(level(context, deeper, seen))
        while not inner.done():
            context.poll(True)
    seen[name].append(who())
    await asyncio.sleep(0)
    seen[name].append(who())
    seen[name].append(me)


@pytest.mark.parametrize("names", [
    ["coroutine 1", "coroutine 2", "coroutine 3"],
    ["coroutine 1", "task 2", "coroutine 3", "task 4"],
    ["task 1", "coroutine 2", "task 3"],
], ids=lambda names: " > ".join(name.split()[0] for name in names))
def test_rule12_current_task_and_contextvars_at_every_level(context: homeloop.AioContext, names: list[str]) -> None:
    """Each sees itself, and its own contextvars, before, after and beyond the nested poll."""
    seen: dict[str, Any] = {}

    async def all_levels() -> None:
        begin = level(context, names, seen)
        await (context.loop.create_task(begin) if names[0].startswith("task") else context.spawn(begin))

    context.spawn(all_levels()).result(LIMIT_S)
    for name in names:
        *looks, me = seen[name]
        coroutine = me if name.startswith("coroutine") else None
        assert looks == [(me, coroutine, name)] * 3
    assert len({id(seen[name][-1]) for name in names}) == len(names)


def test_rule12_a_bare_callback_in_a_nested_poll_has_no_task(context: homeloop.AioContext) -> None:
    """It runs outside the coroutine that polls, in the contextvars of who queued it."""
    seen: list[Any] = []

    def outer() -> None:
        level_var.set("who queued it")
        context.loop.call_soon(lambda: seen.append(who()))
        level_var.set("who polls")
        context.poll(True)

    in_coroutine(context, outer)
    assert seen == [(None, None, "who queued it")]


def test_rule12_a_wake_in_a_nested_poll_runs_at_once(context: homeloop.AioContext) -> None:
    """Rule 3 at each level: outside any coroutine, in the nested iteration, wake() runs the woken one there."""
    log: list[str] = []

    async def parked() -> None:
        await homeloop.park()
        log.append("woken")

    def outer() -> list[str]:
        co = context.spawn(parked())
        while co.state is not homeloop.CoroutineState.PARKED:
            context.poll(True)
        context.loop.call_soon(lambda: (co.wake(), log.append("callback ends")))
        context.poll(True)
        return log

    assert in_coroutine(context, outer) == ["woken", "callback ends"]


def test_rule12_what_the_polling_coroutine_woke_runs_in_its_poll(context: homeloop.AioContext) -> None:
    """A wake from inside a coroutine runs when that one parks or ends, or polls: the poll steps out of it."""
    log: list[str] = []

    async def parked() -> None:
        await homeloop.park()
        log.append("woken")

    def outer() -> tuple[list[str], list[str]]:
        co = context.spawn(parked())
        while co.state is not homeloop.CoroutineState.PARKED:
            context.poll(True)
        co.wake()
        before = list(log)
        assert context.poll(True)
        return before, list(log)

    assert in_coroutine(context, outer) == ([], ["woken"])


# Errors


def test_rule12_an_exception_in_a_nested_poll_goes_to_the_handler(context: homeloop.AioContext) -> None:
    """An ordinary exception of a callback is reported by its loop and does not come out of poll()."""
    reported: list[Any] = []

    def outer() -> bool:
        context.loop.set_exception_handler(lambda loop, what: reported.append(what["exception"]))
        context.loop.call_soon(lambda: 1 // 0)
        return context.poll(True)

    assert in_coroutine(context, outer) is True
    assert [type(error) for error in reported] == [ZeroDivisionError]


def test_rule12_keyboard_interrupt_comes_out_of_poll(context: homeloop.AioContext) -> None:
    """... and leaves everything in order: who polls is current again, what was ready behind it still runs."""
    log: list[str] = []

    def interrupts() -> None:
        raise KeyboardInterrupt

    def outer() -> tuple[bool, list[str]]:
        me = who()
        context.loop.call_soon(interrupts)
        context.loop.call_soon(log.append, "behind it")
        with pytest.raises(KeyboardInterrupt):
            context.poll(True)
        same = who() == me
        context.poll(False)
        return same, list(log)

    assert in_coroutine(context, outer) == (True, ["behind it"])


def test_rule12_a_foreign_loop_says_that_it_cannot() -> None:
    """A loop of another make has no nested polls, and the error says so."""

    async def main() -> None:
        context = homeloop.AioContext.of()
        with pytest.raises(UsageError, match="nested polls"):
            context.poll(False)

    asyncio.run(main())


# wait_while inside wait_while


@PLACED
def test_rule12_nested_waits_with_timeouts(context: homeloop.AioContext, inside: Inside) -> None:
    """Each wait has its own time; the outer one ends no sooner than what it runs inside."""
    log: list[tuple[str, bool]] = []

    def inner() -> None:
        log.append(("inner", context.wait_while(lambda: True, 0.01)))

    def outer() -> None:
        context.loop.call_soon(inner)
        log.append(("outer", context.wait_while(lambda: True, 0.001)))

    inside(context, outer)
    assert log == [("inner", False), ("outer", False)]


@PLACED
def test_rule12_wait_while_serves_io_and_timers(context: homeloop.AioContext, inside: Inside) -> None:
    """Everything of the loop goes on during the wait: a stream pair passes a line, a timer answers it."""

    async def echo() -> bytes:
        answered = asyncio.Event()
        got: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.append(await reader.readline())
            await asyncio.sleep(0)
            writer.close()
            asyncio.get_running_loop().call_later(0.001, answered.set)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"line\n")
            await answered.wait()
            writer.close()
            await writer.wait_closed()
        return got[0]

    def outer() -> bytes:
        return context.spawn(echo()).result(LIMIT_S)

    assert inside(context, outer) == b"line\n"


def test_rule12_the_loop_is_told_to_stop_during_a_wait() -> None:
    """stop() of the runtime during a nested wait: the wait ends as it would, then the loop ends."""
    log: list[str] = []
    waiting = threading.Event()
    done: list[bool] = []

    def outer() -> None:
        def predicate() -> bool:
            waiting.set()
            return not done
        log.append(f"waited: {rt.main.wait_while(predicate, LIMIT_S)}")

    with homeloop.Runtime() as rt:
        rt.main.post(outer)
        wait(waiting, rt.main)

        def change() -> None:
            done.append(True)
            homeloop.kick()

        rt.main.post(rt.main.post, change)
    assert log == ["waited: True"]


def test_rule12_a_context_that_is_entered_already_is_no_error() -> None:
    """Tasks that share one contextvars.Context: a nested wait of the first runs the second all the same."""
    shared = contextvars.copy_context()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    shared.run(variable.set, "shared")
    seen: list[str] = []

    async def second() -> None:
        seen.append(variable.get())
        await asyncio.sleep(0)
        seen.append(variable.get())

    async def first() -> None:
        task = asyncio.get_running_loop().create_task(second(), context=shared)
        asyncio.get_running_loop().call_soon(seen.append, "callback", context=shared)
        assert homeloop.main_context().wait_while(lambda: not task.done() or "callback" not in seen, LIMIT_S)

    async def main() -> None:
        await asyncio.get_running_loop().create_task(first(), context=shared)

    homeloop.run(main())
    assert sorted(seen) == ["callback", "shared", "shared"]
