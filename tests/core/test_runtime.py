"""Runtime, homeloop.run() and new_event_loop(): the ways to host a main context, and how they end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed, NoRuntime, UsageError, WouldDeadlock, WrongState
from tests.core.bounded import LIMIT_S, Plain, in_plain_thread, wait
from tests.core.places import Slow, in_callback, in_coroutine, returned

run_var: contextvars.ContextVar[str] = contextvars.ContextVar("run_var", default="nobody")


class Boom(Exception):
    pass


def on_a_thread(coro: Any) -> Any:
    with homeloop.Runtime() as rt:
        return rt.call(coro)


def by_runner(coro: Any) -> Any:
    with asyncio.Runner(loop_factory=homeloop.new_event_loop) as runner:
        return runner.run(coro)


# Ways to run a coroutine to its end in a fresh runtime.
HOSTED: dict[str, Callable[..., Any]] = {
    "homeloop.run": homeloop.run,
    "without big lock": lambda coro: homeloop.run(coro, big_lock=False),
    "Runtime.run": lambda coro: homeloop.Runtime().run(coro),
    "asyncio.Runner": by_runner,
    "with Runtime": on_a_thread,
}
HOSTS = pytest.mark.parametrize("host", list(HOSTED.values()), ids=list(HOSTED))
RUNS = pytest.mark.parametrize("host", list(HOSTED.values())[:-1], ids=list(HOSTED)[:-1])


# Like asyncio.run


@HOSTS
def test_run_returns_the_result(host: Callable[..., Any]) -> None:
    """... of a coroutine that runs in a main context, with asyncio's loop and task as one expects."""

    async def main() -> str:
        await asyncio.sleep(0)
        context = homeloop.current_context()
        assert context is not None
        assert context.is_main()
        assert context.loop is asyncio.get_running_loop()
        assert homeloop.main_context() is context
        assert asyncio.current_task() is not None
        return "result"

    assert host(main()) == "result"
    assert homeloop.current_context() is None
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


@HOSTS
@pytest.mark.parametrize("yields", [0, 1])
@pytest.mark.parametrize("kind", [Boom, SystemExit, KeyboardInterrupt])
def test_run_raises_what_the_coroutine_raised(
    host: Callable[..., Any], kind: type[BaseException], yields: int
) -> None:
    """... those too that end the loop at once; what is left is cancelled and waited for all the same."""
    it = Slow()
    kept: list[Any] = []

    async def main() -> None:
        kept.append(asyncio.get_running_loop().create_task(it.run()))
        await asyncio.get_running_loop().run_in_executor(None, wait, it.waiting)
        for _ in range(yields):
            await asyncio.sleep(0)
        raise kind

    if kind is not Boom and host is on_a_thread:
        return                      # the loop is not the caller's: see test_iothread.py
    with pytest.raises(kind):
        host(main())
    assert it.log == ["cancelled", "cleaned up"]


@HOSTS
def test_run_cancels_what_is_left(host: Callable[..., Any]) -> None:
    """Tasks and coroutines that still run when main() returns are cancelled and waited for."""
    its = [Slow(), Slow()]
    kept: list[Any] = []

    async def main() -> str:
        kept.append(asyncio.get_running_loop().create_task(its[0].run()))
        kept.append(homeloop.main_context().spawn(its[1].run()))
        await asyncio.get_running_loop().run_in_executor(None, lambda: [wait(it.waiting) for it in its])
        return "main is done"

    assert host(main()) == "main is done"
    assert [it.log for it in its] == [["cancelled", "cleaned up"]] * 2
    assert [it.cancelled() for it in kept] == [True, True]


@HOSTS
def test_run_closes_async_generators_and_the_executor(host: Callable[..., Any]) -> None:
    """A generator left half-way runs its `finally`; the default executor's threads end."""
    log: list[str] = []
    kept: list[Any] = []

    async def ticks() -> Any:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            log.append("closed")

    async def main() -> None:
        kept.append(ticks())
        await anext(kept[0])
        await asyncio.get_running_loop().run_in_executor(None, log.append, "executor")

    before = threading.active_count()
    host(main())
    assert log == ["executor", "closed"]
    assert threading.active_count() == before


@HOSTS
def test_run_reports_what_a_leftover_raises(host: Callable[..., Any]) -> None:
    """A leftover that answers its cancellation with an error: the loop's exception handler is told."""
    reported: list[Any] = []

    async def fails() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            raise Boom

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, what: reported.append(what["exception"]))
        kept.append(loop.create_task(fails()))
        await asyncio.sleep(0)

    kept: list[Any] = []
    host(main())
    assert [type(exc) for exc in reported] == [Boom]


@RUNS
def test_run_sees_the_callers_contextvars(host: Callable[..., Any]) -> None:
    async def main() -> str:
        return run_var.get()

    token = run_var.set("the caller")
    try:
        assert host(main()) == "the caller"
    finally:
        run_var.reset(token)


@RUNS
def test_run_in_a_thread_that_is_not_the_main_thread(host: Callable[..., Any]) -> None:
    """Any thread will do; it is the home."""
    thread = Plain(host, returned(threading.get_ident))
    assert thread.result() == thread.ident


@pytest.mark.parametrize("host", [homeloop.run, lambda coro: homeloop.Runtime().run(coro)], ids=["run", "Runtime.run"])
def test_run_inside_a_running_loop_is_refused(host: Callable[..., Any]) -> None:
    """RuntimeError, at once; the coroutine object is closed; the loop around goes on."""
    coro = returned(lambda: None)

    async def main() -> str:
        with pytest.raises(RuntimeError):
            host(coro)
        await asyncio.sleep(0)
        return "goes on"

    assert homeloop.run(main()) == "goes on"
    assert asyncio.run(main()) == "goes on"
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


@pytest.mark.parametrize("run", [homeloop.run, lambda coro: homeloop.Runtime().run(coro)])
def test_run_refused_closes_the_coroutine(run: Callable[..., Any]) -> None:
    """In a coroutine, in an IOThread's callback, and under a big lock: refused, closed."""
    coros = [returned(lambda: None) for _ in range(3)]

    def refused(number: int) -> None:
        with pytest.raises(WrongState):
            run(coros[number])

    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        in_coroutine(rt.main, lambda: refused(0))
        in_callback(io.context, lambda: refused(1))
        with rt.big_lock:
            refused(2)
        assert rt.call(returned(lambda: 1)) == 1
    assert {inspect.getcoroutinestate(coro) for coro in coros} == {inspect.CORO_CLOSED}


@pytest.mark.parametrize("thing", [None, 5, lambda: None, returned], ids=["None", "int", "function", "async function"])
def test_run_of_what_is_no_coroutine(thing: Any) -> None:
    """TypeError or ValueError, as asyncio; and nothing is left open."""
    with pytest.raises((TypeError, ValueError)):
        homeloop.run(thing)
    with pytest.raises(NoRuntime):
        homeloop.main_context()


def test_run_debug() -> None:
    """debug=True is the loop's debug mode, False switches it off, None leaves what the environment says."""
    async def main() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert homeloop.run(main(), debug=True) is True
    assert homeloop.run(main(), debug=False) is False


def test_run_without_a_big_lock() -> None:
    """The main context is there; the lock says that nobody holds it, and refuses to be taken (rule 6)."""
    async def main() -> tuple[bool, Any]:
        lock = homeloop.big_lock()
        with pytest.raises(WrongState, match="no big lock"):
            lock.acquire()
        with pytest.raises(WrongState, match="no big lock"):
            await asyncio.to_thread(lock.acquire)
        main = homeloop.main_context()
        assert await asyncio.to_thread(main.call, returned(threading.get_ident)) == threading.get_ident()
        return lock.held(), await asyncio.to_thread(lock.held)

    assert homeloop.run(main(), big_lock=False) == (False, False)


# Ctrl-C

INTERRUPTED = """
import asyncio, os, signal, sys, threading
import homeloop

async def slow():
    print("waiting", flush=True)
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        await asyncio.sleep(0)
        print("cleaned up", flush=True)

async def stubborn():
    for _ in range(2):
        try:
            await slow()
        except asyncio.CancelledError:
            print("swallowed", flush=True)

async def blocks():
    with homeloop.IOThread() as io:
        io.call(slow())

try:
    {program}
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
    os._exit(3) if threading.active_count() > 1 else sys.exit(4)
"""


def interrupted(program: str, presses: int = 1) -> tuple[list[str], int]:
    """Run a script, press Ctrl-C at each "waiting"; its output and exit status."""
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED.format(program=program)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    killer = threading.Timer(LIMIT_S, process.kill)
    killer.start()
    try:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == "waiting" and presses:
                presses -= 1
                process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        return lines if process.returncode in (3, 4) else [*lines, errors], process.returncode
    finally:
        killer.cancel()
        killer.join()
        process.kill()
        process.wait()


@pytest.mark.parametrize("program", [
    "homeloop.run(slow())", "homeloop.Runtime().run(slow())", "homeloop.run(slow(), big_lock=False)",
    "asyncio.Runner(loop_factory=homeloop.new_event_loop).run(slow())",
])
def test_run_ctrl_c_cancels_main(program: str) -> None:
    """The first Ctrl-C cancels main(), which may clean up; then KeyboardInterrupt, and no thread is left."""
    assert interrupted(program) == (["waiting", "cleaned up", "KeyboardInterrupt"], 4)


def test_run_second_ctrl_c_raises_where_the_thread_is() -> None:
    """A main() that swallows the first does not survive the second."""
    lines, status = interrupted("homeloop.run(stubborn())", presses=2)
    assert lines[:4] == ["waiting", "cleaned up", "swallowed", "waiting"]
    assert lines[4:] in (["KeyboardInterrupt"], ["cleaned up", "swallowed", "KeyboardInterrupt"])   # inside it, or not
    assert status == 4


def test_rule9_ctrl_c_while_main_waits_synchronously() -> None:
    """main() sits in io.call(): one Ctrl-C cancels that coroutine too, waits for it, and the program ends."""
    assert interrupted("homeloop.run(blocks())") == (["waiting", "cleaned up", "KeyboardInterrupt"], 4)


# Runtime


def test_runtime_with_serves_on_a_thread_of_its_own() -> None:
    """The block's thread is a plain one; the home is a thread that ends with the block."""
    before = threading.active_count()
    with homeloop.Runtime(name="rt-with") as rt:
        assert homeloop.current_context() is None
        assert rt.main.name.startswith("rt-with")
        assert rt.main.spawn(returned(threading.get_ident)).result(LIMIT_S) != threading.get_ident()
        assert rt.main.is_main()
    assert threading.active_count() == before
    with pytest.raises(ContextClosed):
        rt.main.post(lambda: None)


def test_runtime_block_that_raises() -> None:
    """The exception of the block comes out, the runtime has ended."""
    with pytest.raises(Boom), homeloop.Runtime() as rt:
        raise Boom
    assert rt.main.closed


@pytest.mark.parametrize("inside", [in_callback, in_coroutine])
def test_runtime_cannot_be_left_from_its_own_home(inside: Callable[..., Any]) -> None:
    """The end of the block would wait for itself: refused, and the runtime goes on."""
    with homeloop.Runtime() as rt:
        with pytest.raises(WouldDeadlock):
            inside(rt.main, lambda: rt.__exit__(None, None, None))
        assert rt.call(returned(lambda: 1)) == 1


def test_runtime_is_used_once() -> None:
    """After its end it runs nothing more, and says so; a coroutine object is closed."""
    rt = homeloop.Runtime()
    assert rt.run(returned(lambda: 1)) == 1
    coro = returned(lambda: 2)
    with pytest.raises(UsageError):
        rt.run(coro)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    with pytest.raises(UsageError):
        rt.__enter__()
    rt.close()


def test_runtime_run_while_it_is_served() -> None:
    """A runtime has one home: run() of one that has a thread is refused, and changes nothing."""
    coro = returned(lambda: 2)
    with homeloop.Runtime() as rt:
        with pytest.raises(UsageError):
            rt.run(coro)
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
        assert rt.call(returned(lambda: 1)) == 1


def test_runtime_close_of_one_that_nobody_served() -> None:
    """What was queued to it runs, what is left is cancelled; twice is fine; unused ones too."""
    rt = homeloop.Runtime()
    ran: list[int] = []
    rt.main.post(ran.append, 1)
    co = rt.main.spawn(Slow().run())
    rt.close()
    rt.close()
    assert ran == [1]
    assert co.cancelled()
    with pytest.raises(ContextClosed):
        rt.main.post(lambda: None)
    unused = homeloop.Runtime()
    unused.close()
    with pytest.raises(ContextClosed):
        _ = unused.main


def test_runtime_fifty_rounds_leak_nothing() -> None:
    """Threads and file descriptors are as many as before, for each way to host a main context."""
    def once() -> None:
        for host in HOSTED.values():
            host(returned(lambda: None))

    once()
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
    for _ in range(50):
        once()
    assert threading.active_count() == threads
    assert len(os.listdir("/dev/fd")) == descriptors


# Which runtime is meant


def test_lookup_without_a_runtime() -> None:
    """NoRuntime, which says how to make one."""
    for look in (homeloop.main_context, homeloop.big_lock):
        with pytest.raises(NoRuntime, match=r"homeloop\.run"):
            look()


def test_lookup_with_one_runtime() -> None:
    """Every thread means it: plain ones, IOThreads, workers."""
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        assert homeloop.main_context() is rt.main
        assert homeloop.big_lock() is rt.big_lock
        assert in_plain_thread(homeloop.main_context) is rt.main
        assert io.call(returned(homeloop.main_context)) is rt.main
        assert in_coroutine(rt.main, homeloop.big_lock) is rt.big_lock


def test_lookup_with_two_runtimes() -> None:
    """A thread that belongs to one means that one; a thread that belongs to none is told to choose."""

    async def in_worker() -> Any:
        return await homeloop.to_worker(homeloop.main_context)

    with homeloop.Runtime() as one, homeloop.Runtime() as two:
        for look in (homeloop.main_context, homeloop.big_lock):
            with pytest.raises(NoRuntime, match="2 runtimes"):
                look()
        for rt in (one, two):
            assert in_coroutine(rt.main, homeloop.main_context) is rt.main
            assert rt.call(in_worker()) is rt.main
            with rt.big_lock:
                assert homeloop.main_context() is rt.main
                assert homeloop.big_lock() is rt.big_lock
    with pytest.raises(NoRuntime):
        homeloop.main_context()


def test_lookup_inside_run_beside_another_runtime() -> None:
    """homeloop.run() among others: its home means its own."""
    async def main() -> bool:
        return homeloop.main_context() is homeloop.current_context()

    with homeloop.Runtime():
        assert homeloop.run(main())


# new_event_loop


def test_new_event_loop_runs_several_times() -> None:
    """asyncio.Runner runs it again and again; contextvars and tasks of a Runner stay."""
    with asyncio.Runner(loop_factory=homeloop.new_event_loop) as runner:
        contexts = [runner.run(returned(homeloop.current_context)) for _ in range(3)]
        assert contexts[0] is not None
        assert contexts[0].is_main()
        assert contexts == [contexts[0]] * 3
        assert homeloop.current_context() is None
        it = Slow()
        task = runner.get_loop().create_task(it.run())
        runner.run(asyncio.sleep(0))
        assert not task.done()
    assert it.log == ["cancelled", "cleaned up"]


def test_new_event_loop_has_a_runtime_of_its_own() -> None:
    """Each loop is a main context with a big lock; close() ends it; a plain thread may call into it."""

    async def main() -> Any:
        rt_lock, context = homeloop.big_lock(), homeloop.main_context()

        def worker() -> Any:
            with rt_lock:
                return homeloop.current_context(), asyncio.get_running_loop() is context.loop

        assert await asyncio.to_thread(worker) == (context, True)
        return context, await asyncio.to_thread(context.call, returned(lambda: 5))

    loops = [homeloop.new_event_loop(), homeloop.new_event_loop()]
    contexts = []
    for loop in loops:
        context, result = loop.run_until_complete(main())
        assert context.loop is loop
        assert result == 5
        contexts.append(context)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        assert context.closed
    assert contexts[0] is not contexts[1]
    with pytest.raises(NoRuntime):
        homeloop.main_context()


# AioContext.of


def test_of_stock_asyncio() -> None:
    """A loop of asyncio's own is adopted: it has a context, its thread is in it, others post and spawn into it."""

    async def main() -> None:
        context = homeloop.AioContext.of()
        assert homeloop.AioContext.of(asyncio.get_running_loop()) is context
        assert homeloop.current_context() is context
        assert context.is_main() is False
        assert context.loop is asyncio.get_running_loop()
        assert await context.run(returned(threading.get_ident)) == threading.get_ident()
        assert await asyncio.to_thread(context.call, returned(lambda: 5)) == 5
        assert await asyncio.to_thread(homeloop.current_context) is None
        ran = asyncio.Event()
        await asyncio.to_thread(context.post, ran.set)
        await ran.wait()

        async def parks() -> str:
            await homeloop.park()
            return "woken"

        co = context.spawn(parks())
        assert await asyncio.to_thread(co.wake) is True
        assert await co == "woken"

    asyncio.run(main())
    assert homeloop.current_context() is None


def test_of_a_loop_of_ours_is_its_context() -> None:
    """No second context for a loop that has one."""
    with homeloop.Runtime() as rt:
        assert in_coroutine(rt.main, homeloop.AioContext.of) is rt.main
        assert homeloop.AioContext.of(rt.main.loop) is rt.main


def test_of_without_a_loop() -> None:
    """No running loop: an error that is a RuntimeError, as asyncio.get_running_loop has it."""
    with pytest.raises(RuntimeError):
        homeloop.AioContext.of()


@pytest.mark.parametrize("first", ["post", "spawn", "call", "schedule"])
def test_of_a_loop_that_ended(first: str) -> None:
    """The adopted loop was closed without telling us: the first call already is refused, not taken and lost."""
    kept: list[Any] = []

    async def main() -> None:
        kept.append(homeloop.AioContext.of())
        kept.append(kept[0].create(returned(lambda: None)))

    asyncio.run(main())
    context, created = kept
    calls: dict[str, Callable[[], Any]] = {
        "post": lambda: context.post(lambda: None),
        "spawn": lambda: context.spawn(returned(lambda: None)),
        "call": lambda: context.call(returned(lambda: None), timeout=0.1),
    }
    if first == "schedule":
        assert created.schedule() is False
    else:
        with pytest.raises(ContextClosed):
            calls[first]()
        created.schedule()
    for call in calls.values():
        with pytest.raises(ContextClosed):
            call()


def test_of_waiting_in_its_own_thread_is_refused() -> None:
    """A stock loop cannot be served inside itself: a wait says so, and does not hang."""
    async def main() -> None:
        context = homeloop.AioContext.of()
        with pytest.raises(UsageError):
            context.call(returned(lambda: 1))

    asyncio.run(main())
