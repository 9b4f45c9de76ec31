"""The life cycle of an IOThread (rule 14)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed, UsageError, WouldDeadlock, WrongState
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, in_plain_thread, until, wait
from tests.core.places import Slow, in_callback, in_coroutine, returned


def has_ended(context: homeloop.AioContext) -> bool:
    try:
        context.post(lambda: None)
    except ContextClosed:
        return True
    return False


# Start


def test_rule14_start_returns_when_the_loop_runs() -> None:
    """Behind start() the loop runs, on a thread of its own, and current_context() there is its context."""
    io = homeloop.IOThread("io-start")
    try:
        assert io.start() is io
        assert io.context.name == "io-start"
        assert io.context.loop.is_running()
        assert io.call(returned(threading.get_ident)) != threading.get_ident()
        assert io.call(returned(homeloop.current_context)) is io.context
        assert io.context.is_main() is False
        assert io.context.is_current() is False
    finally:
        io.stop()


def test_rule14_names_are_made_up_where_none_is_given() -> None:
    """Two IOThreads differ in name; the thread is called like the IOThread."""
    with homeloop.IOThread() as one, homeloop.IOThread() as two:
        assert one.context.name != two.context.name
        assert one.call(returned(lambda: threading.current_thread().name)) == one.context.name


def test_rule14_start_raises_what_start_up_raised() -> None:
    """A factory that fails: its exception comes out of start(), no thread is left, stop() does nothing."""

    class NoLoop(Exception):
        pass

    def factory() -> asyncio.AbstractEventLoop:
        raise NoLoop("no loop today")

    before = threading.active_count()
    io = homeloop.IOThread(loop_factory=factory)
    with pytest.raises(NoLoop, match="today"):
        io.start()
    assert threading.active_count() == before
    with pytest.raises(NoLoop), homeloop.IOThread(loop_factory=factory):
        pytest.fail("the block must not run")
    io.stop()


def test_rule14_start_up_that_raises_base_exceptions() -> None:
    """SystemExit in the factory comes out too: the starter does not wait for ever."""

    def factory() -> asyncio.AbstractEventLoop:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        homeloop.IOThread(loop_factory=factory).start()


def test_rule14_only_one_start() -> None:
    """A second start, and a start after stop, are refused; what runs goes on."""
    io = homeloop.IOThread()
    with io:
        with pytest.raises(WrongState):
            io.start()
        assert io.call(returned(lambda: 1)) == 1
    with pytest.raises(WrongState):
        io.start()


def test_rule14_before_start() -> None:
    """There is no context yet, and the error says so; a coroutine object that is refused is the caller's."""
    io = homeloop.IOThread("io-early")
    with pytest.raises(WrongState, match="io-early"):
        _ = io.context
    with pytest.raises(WrongState, match="io-early"):
        io.post(lambda: None)


def test_rule14_stop_before_start_refuses_the_start() -> None:
    """stop() of what never ran returns at once, a second one and one behind the refused start too."""
    io = homeloop.IOThread("io-never")

    def stops() -> None:
        for _ in range(2):
            io.stop()
            io.stop()
            with pytest.raises(WrongState, match="io-never cannot be started"):
                io.start()

    in_plain_thread(stops)


def test_rule14_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """start() raises what the system said, and a stop() behind it does not wait for what never began."""
    io = homeloop.IOThread()

    def refuses(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuses)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            io.start()
    in_plain_thread(io.stop)


@pytest.mark.parametrize("options", [
    {"worker_max": 0}, {"worker_min": -1}, {"worker_min": 3, "worker_max": 2}, {"poll_max_ns": -1}, {"poll_grow": -1},
])
def test_rule14_options_are_checked(options: dict[str, Any]) -> None:
    """Numbers without meaning are refused where they are given."""
    with pytest.raises(UsageError):
        homeloop.IOThread(**options)


# Stop


def test_rule14_stop_runs_what_was_posted_before() -> None:
    """Every post and every spawn that came before stop() runs, in order, and what those posts post too."""
    ran: list[int] = []
    io = homeloop.IOThread().start()
    blocked, go_on = threading.Event(), threading.Event()
    io.post(lambda: (blocked.set(), wait(go_on)))
    wait(blocked)
    for i in range(100):
        io.post(ran.append, i)
    io.post(lambda: io.post(ran.append, 100))
    spawned = io.spawn(returned(lambda: ran.append(101)))
    stopper = Plain(io.stop)
    go_on.set()
    stopper.result()
    assert ran[:100] == list(range(100))
    assert sorted(ran[100:]) == [100, 101]
    assert spawned.result(0) is None


@pytest.mark.parametrize("kind", ["coroutine", "task", "parked"])
def test_rule14_stop_cancels_what_is_left_and_waits(kind: str) -> None:
    """Coroutines, parked ones and asyncio tasks are cancelled; stop() returns when they have cleaned up."""
    it = Slow()
    log = it.log

    async def parked() -> None:
        asyncio.get_running_loop().call_soon(it.waiting.set)
        try:
            await homeloop.park("for ever")
        finally:
            log.append("cancelled")
            await asyncio.sleep(0)
            log.append("cleaned up")

    with homeloop.IOThread() as io:
        if kind == "task":
            io.post(lambda: keep.append(io.context.loop.create_task(it.run())))
            keep: list[Any] = []
        else:
            co = io.spawn(parked() if kind == "parked" else it.run())
        wait(it.waiting, io.context)
    assert log == ["cancelled", "cleaned up"]
    if kind != "task":
        assert co.cancelled()
        with pytest.raises(asyncio.CancelledError):
            co.result(0)


def test_rule14_stop_waits_for_what_refuses_to_end() -> None:
    """A coroutine that swallows its cancellation is waited for, as asyncio.run does; its result is kept."""
    it = Slow()

    async def stubborn() -> str:
        try:
            return await it.run()
        except asyncio.CancelledError:
            return "swallowed"

    with homeloop.IOThread() as io:
        co = io.spawn(stubborn())
        wait(it.waiting, io.context)
    assert co.result(0) == "swallowed"


def test_rule14_stop_closes_async_generators() -> None:
    """A generator that was left half-way gets its `finally` run, on the loop, before it closes."""
    log: list[Any] = []

    async def ticks() -> Any:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            log.append(homeloop.current_context())

    kept: list[Any] = []

    async def begins() -> None:
        generator = ticks()
        kept.append(generator)
        await anext(generator)

    with homeloop.IOThread() as io:
        io.call(begins())
    assert log == [io.context]


def test_rule14_stop_twice_is_fine() -> None:
    """In a row, from a `with` block, and from several threads at once: each returns when the thread has ended."""
    io = homeloop.IOThread().start()
    thread_of_io = io.call(returned(threading.current_thread))
    barrier = threading.Barrier(4)

    def stop() -> bool:
        wait(barrier)
        io.stop()
        return thread_of_io.is_alive()

    threads = [Plain(stop) for _ in range(4)]
    assert [thread.result() for thread in threads] == [False] * 4
    io.stop()
    with homeloop.IOThread() as other:
        other.stop()


@pytest.mark.parametrize("inside", [in_callback, in_coroutine])
def test_rule14_stop_from_itself_is_refused(inside: Callable[..., Any]) -> None:
    """WouldDeadlock, and the IOThread goes on."""
    with homeloop.IOThread() as io:
        with pytest.raises(WouldDeadlock, match=io.context.name):
            inside(io.context, io.stop)
        assert io.call(returned(lambda: 1)) == 1


@pytest.mark.parametrize("inside", [in_callback, in_coroutine])
def test_rule14_stop_from_another_iothread_is_refused(inside: Callable[..., Any]) -> None:
    """Rule 11: it would wait for another context. Nothing is stopped by the refused call."""
    with homeloop.IOThread() as io, homeloop.IOThread() as other:
        with pytest.raises(WouldDeadlock, match=io.context.name):
            inside(other.context, io.stop)
        assert io.call(returned(lambda: 1)) == 1


def test_rule14_stop_of_an_ended_iothread_from_another() -> None:
    """What the refusal advises works in a `with` block, whose end stops it once more."""
    async def body() -> str:
        with homeloop.IOThread() as inner:
            answer = await inner.run(returned(lambda: "answer"))
            await homeloop.to_worker(inner.stop)
        return answer

    with homeloop.IOThread() as io:
        assert io.call(body(), timeout=LIMIT_S) == "answer"


@pytest.mark.parametrize("inside", [in_callback, in_coroutine])
def test_rule14_stop_from_the_main_home_serves_main(inside: Callable[..., Any]) -> None:
    """What the IOThread's coroutines need of main while they end, they get.

        main home                       IOThread
        1 stop(), serves main
                                        2 cancelled: cleans up with `await main.run(...)`
        3 runs that
                                        4 ends
        5 returns
    """
    log: list[Any] = []

    async def needs_main(rt: homeloop.Runtime) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            log.append(await rt.main.run(returned(homeloop.current_context)))

    with homeloop.Runtime() as rt:
        io = homeloop.IOThread().start()
        io.spawn(needs_main(rt))
        io.call(returned(lambda: None))
        inside(rt.main, io.stop)
        assert log == [rt.main]
        assert has_ended(io.context)


def test_rule14_stop_from_a_holder_of_the_big_lock() -> None:
    """A plain thread that holds the lock may stop it too; the home serves main meanwhile."""
    log: list[Any] = []

    async def needs_main(rt: homeloop.Runtime) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            log.append(await rt.main.run(returned(homeloop.current_context)))

    with homeloop.Runtime() as rt:
        io = homeloop.IOThread().start()
        io.spawn(needs_main(rt))
        io.call(returned(lambda: None))

        def stops() -> bool:
            with rt.big_lock:
                io.stop()
                return rt.big_lock.held()

        assert in_plain_thread(stops) is True
    assert log == [rt.main]


def test_rule14_stop_in_a_program_of_homeloop_run() -> None:
    """`with IOThread()` inside the main coroutine, which is how programs have it."""

    async def main() -> str:
        with homeloop.IOThread() as io:
            return await io.run(returned(lambda: "from there"))

    assert homeloop.run(main()) == "from there"


# After the end


def test_rule14_after_stop_everything_is_refused() -> None:
    """post, spawn, call and bottom halves raise ContextClosed; wakes answer False; cancel too."""
    with homeloop.IOThread() as io:
        context = io.context
        ended = io.spawn(returned(lambda: 1))
        half = context.bottom_half(lambda: None)
    for refused in (
        lambda: context.post(lambda: None),
        lambda: context.spawn(returned(lambda: None)),
        lambda: context.call(returned(lambda: None)),
        lambda: context.create(returned(lambda: None)),
        half.schedule,
    ):
        with pytest.raises(ContextClosed, match=context.name):
            refused()
    assert ended.result(0) == 1
    assert (ended.wake(), ended.schedule(), ended.cancel()) == (False, False, False)


@pytest.mark.parametrize("start", ["wake", "schedule", "cancel"])
def test_rule14_a_coroutine_that_was_created_only(start: str) -> None:
    """Its context has ended before it is started: refused, and closed, so that no warning follows."""
    coro = returned(lambda: pytest.fail("must not run"))
    with homeloop.IOThread() as io:
        co = io.context.create(coro)
    getattr(co, start)()
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert co.done()


def test_rule14_posts_from_a_thread_that_races_with_the_end(seed: int) -> None:
    """Posts that race with stop() run, or are refused with ContextClosed; none is lost.

        posting thread                  stopping thread         home
        1 post(): accepted              2 stop()
                                                                3 drains, finds nothing, closes
        4 must have been run, or refused
    """
    rnd = random.Random(seed)
    for _ in range(max(10, int(60 * STRESS_S))):
        io = homeloop.IOThread().start()
        ran: list[int] = []
        start = threading.Barrier(4)

        def posts(number: int, io: homeloop.IOThread = io, ran: list[int] = ran, start: Any = start) -> list[int]:
            accepted: list[int] = []
            wait(start)
            try:
                for i in range(2000):
                    io.post(ran.append, number + 4 * i)
                    accepted.append(number + 4 * i)
            except ContextClosed:
                pass
            return accepted

        threads = [Plain(posts, number) for number in range(3)]
        wait(start)
        for _ in range(rnd.randrange(200)):
            pass
        io.stop()
        accepted = [number for thread in threads for number in thread.result()]
        assert sorted(ran) == sorted(accepted)


def test_rule14_spawns_that_race_with_the_end(seed: int) -> None:
    """The same for coroutines: each that spawn() accepted ends, run or cancelled, and its waiter is told."""
    for _ in range(max(5, int(30 * STRESS_S))):
        io = homeloop.IOThread().start()
        start = threading.Barrier(3)

        async def yields() -> str:
            await asyncio.sleep(0)
            return "ran"

        def spawns(io: homeloop.IOThread = io, start: Any = start, yields: Any = yields) -> list[Any]:
            wait(start)
            spawned: list[Any] = []
            with contextlib.suppress(ContextClosed):
                while len(spawned) < 300:
                    spawned.append(io.spawn(yields()))
            return spawned

        threads = [Plain(spawns) for _ in range(2)]
        wait(start)
        io.stop()
        for co in [co for thread in threads for co in thread.result()]:
            try:
                assert co.result(LIMIT_S) == "ran"
            except asyncio.CancelledError:
                assert co.cancelled()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_rule14_a_coroutine_ends_the_loop(kind: type[BaseException]) -> None:
    """SystemExit or KeyboardInterrupt in a coroutine ends asyncio's loops. The waiter is told, what is left is
    cancelled, and who comes later is served or refused: nothing is taken that nobody will run."""

    async def exits() -> None:
        await asyncio.sleep(0)
        raise kind

    it = Slow()
    io = homeloop.IOThread().start()
    left = io.spawn(it.run())
    wait(it.waiting, io.context)
    co = io.spawn(exits())
    with pytest.raises(kind):
        co.result(LIMIT_S)
    with contextlib.suppress(ContextClosed, asyncio.CancelledError):
        assert io.spawn(returned(lambda: 1)).result(1) == 1
    io.stop()
    assert it.log == ["cancelled", "cleaned up"]
    assert left.cancelled()
    assert has_ended(io.context)


# Nothing is left


def test_rule14_fifty_start_stops_leak_nothing() -> None:
    """Threads and file descriptors are as many as before; workers of its pool end too."""

    def once() -> None:
        with homeloop.IOThread() as io:
            io.call(uses_worker())

    async def uses_worker() -> None:
        await homeloop.to_worker(lambda: None)

    once()
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
    for _ in range(50):
        once()
    assert threading.active_count() == threads
    assert len(os.listdir("/dev/fd")) == descriptors


def test_rule14_belongs_to_the_runtime_of_its_maker() -> None:
    """main_context() inside an IOThread is that of the runtime in which it was made, among several too."""

    def make() -> Any:
        with homeloop.IOThread() as io:
            return io.call(returned(homeloop.main_context)), io.call(returned(homeloop.big_lock))

    with homeloop.Runtime() as one, homeloop.Runtime() as two:
        assert in_coroutine(one.main, make) == (one.main, one.big_lock)
        assert in_coroutine(two.main, make) == (two.main, two.big_lock)


# Loops of another make


def uvloop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    return uvloop.new_event_loop        # type: ignore[no-any-return]


def stock_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    return asyncio.SelectorEventLoop


FOREIGN = pytest.mark.parametrize("maker", [uvloop_factory, stock_factory], ids=["uvloop", "asyncio"])


@FOREIGN
def test_rule18_a_loop_of_another_make(maker: Callable[[], Callable[[], Any]]) -> None:
    """spawn, call, run, post, wake, park, workers, cancel and bottom halves work on it."""
    with homeloop.Runtime() as rt, homeloop.IOThread("io-foreign", loop_factory=maker()) as io:
        ran: list[int] = []
        io.post(ran.append, 1)
        half = io.context.bottom_half(lambda: ran.append(2))
        io.post(lambda: [half.schedule() for _ in range(2)])        # at home: it cannot run in between
        assert io.call(returned(homeloop.current_context)) is io.context
        until(lambda: ran == [1, 2], io.context)

        async def parks() -> str:
            await homeloop.park()
            await asyncio.sleep(0)
            return await homeloop.to_worker(lambda: threading.current_thread().name)

        co = io.spawn(parks())
        assert co.wake() is True
        assert "worker" in co.result(LIMIT_S)
        assert in_coroutine_of(rt, io) == "io-foreign"
        it = Slow()
        with pytest.raises(TimeoutError):
            io.call(it.run(), timeout=0.2)
        assert it.log == ["cancelled", "cleaned up"]


def in_coroutine_of(rt: homeloop.Runtime, io: homeloop.IOThread) -> Any:
    return rt.main.spawn(io.run(returned(lambda: threading.current_thread().name))).result(LIMIT_S)


@FOREIGN
def test_rule18_what_another_make_cannot(maker: Callable[[], Callable[[], Any]]) -> None:
    """Nested polls, and waits that need them, say so at once."""
    with homeloop.IOThread(loop_factory=maker()) as io:
        with pytest.raises(UsageError, match="nested polls"):
            in_callback(io.context, lambda: io.context.poll(False))
        with pytest.raises(UsageError, match="nested polls"):
            in_callback(io.context, lambda: io.context.spawn(returned(lambda: 1)).result(LIMIT_S))
        with pytest.raises(UsageError, match="nested polls"):
            in_callback(io.context, lambda: io.context.wait_while(lambda: True, LIMIT_S))
        assert io.call(returned(lambda: 1)) == 1


@FOREIGN
def test_rule14_stop_of_a_loop_of_another_make(maker: Callable[[], Callable[[], Any]]) -> None:
    """What was posted runs, what is left is cancelled and waited for; afterwards all is refused."""
    it = Slow()
    ran: list[int] = []
    io = homeloop.IOThread(loop_factory=maker()).start()
    co = io.spawn(it.run())
    wait(it.waiting, io.context)
    for i in range(100):
        io.post(ran.append, i)
    io.stop()
    assert ran == list(range(100))
    assert it.log == ["cancelled", "cleaned up"]
    assert co.cancelled()
    with pytest.raises(ContextClosed):
        io.post(lambda: None)
    io.stop()


@FOREIGN
def test_rule14_fifty_start_stops_of_another_make(maker: Callable[[], Callable[[], Any]]) -> None:
    """No thread and no file descriptor is left."""
    factory = maker()

    def once() -> None:
        with homeloop.IOThread(loop_factory=factory) as io:
            io.call(returned(lambda: None))

    once()
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
    for _ in range(50):
        once()
    assert threading.active_count() == threads
    assert len(os.listdir("/dev/fd")) == descriptors


def test_rule14_loop_factory_may_give_a_loop_of_ours() -> None:
    """new_event_loop as the factory: the thread is the home of that runtime's main context."""
    with homeloop.IOThread(loop_factory=homeloop.new_event_loop) as io:
        assert io.context.is_main()
        assert io.call(returned(homeloop.current_context)) is io.context
