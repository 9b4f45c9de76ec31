"""call(): run a coroutine from synchronous code and wait for it (rule 9)."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import ContextClosed
from tests.core.bounded import LIMIT_S, Plain, holding, in_plain_thread, until, wait
from tests.core.places import PLACES, Slow, World, at, returned

place_var: contextvars.ContextVar[str] = contextvars.ContextVar("place_var", default="nobody")

# Places from which call() to the main context is allowed, and where it then begins.
MAY_CALL_MAIN = ["plain", "plain with lock", "plain in driven coroutine", "main callback", "main coroutine"]


@pytest.fixture
def world() -> Iterator[World]:
    with homeloop.Runtime() as rt, homeloop.IOThread("io-own") as own, homeloop.IOThread("io-other") as other:
        yield World(rt=rt, own=own, other=other)


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    with homeloop.Runtime() as runtime:
        yield runtime


class Boom(Exception):
    pass


async def raises_now() -> None:
    raise Boom("now")


async def raises_later() -> None:
    await asyncio.wait_for(asyncio.get_running_loop().create_future(), 0.001)


class Stubborn(Slow):
    """It swallows its cancellation and returns."""

    async def run(self) -> str:
        try:
            return await super().run()
        except asyncio.CancelledError:
            return "swallowed"


# Rule 9: where it runs


async def two_threads(first: list[int], pause: Callable[[], Any]) -> int:
    first.append(threading.get_ident())
    await pause()
    return threading.get_ident()


async def no_pause() -> None:
    pass


def test_rule9_a_plain_thread_drives_the_coroutine_itself(rt: homeloop.Runtime) -> None:
    """What never waits begins and ends in the calling thread, which is then in the main context and loop."""

    async def look() -> tuple[Any, ...]:
        return threading.get_ident(), homeloop.current_context(), asyncio.get_running_loop(), rt.big_lock.held()

    def caller() -> tuple[bool, ...]:
        ident, context, loop, held = rt.call(look())
        return ident == threading.get_ident(), context is rt.main, loop is rt.main.loop, held, rt.big_lock.held()

    before = rt.main.statistics()
    assert in_plain_thread(caller) == (True, True, True, True, False)
    after = rt.main.statistics()
    assert (after.calls_driven - before.calls_driven, after.calls_handed_over) == (1, before.calls_handed_over)


@pytest.mark.parametrize("locked", [False, True], ids=["without the lock", "with the lock"])
def test_rule9_what_waits_goes_on_at_home(rt: homeloop.Runtime, locked: bool) -> None:
    """It begins in the caller; the caller lets the lock go while it waits, and has it back afterwards.

        caller                          home                    third thread
        1 begins, awaits the event
        2 waits without the lock                                3 takes the lock, sets the event
                                        4 goes on, ends
        5 has the result
    """
    event = asyncio.Event()
    first: list[int] = []
    home = rt.main.spawn(returned_ident()).result(LIMIT_S)

    def caller() -> tuple[int, int, bool]:
        if not locked:
            return rt.call(two_threads(first, event.wait)), threading.get_ident(), rt.big_lock.held()
        with rt.big_lock:
            return rt.call(two_threads(first, event.wait)), threading.get_ident(), rt.big_lock.held()

    thread = Plain(caller)
    until(lambda: first, rt.main)
    with rt.big_lock:
        event.set()
    ended_in, me, held = thread.result(rt.main, rt.big_lock)
    assert first == [me]
    assert ended_in == home
    assert held is locked


async def returned_ident() -> int:
    return threading.get_ident()


def test_rule9_the_lock_is_kept_where_the_caller_had_it(rt: homeloop.Runtime) -> None:
    """A call that is driven to its end inside `with big_lock:` lets nobody in between."""
    others: list[str] = []

    def other() -> None:
        with rt.big_lock:
            others.append("in")

    def caller() -> list[str]:
        with rt.big_lock:
            thread = Plain(other)
            until(lambda: rt.big_lock.statistics()["waiting"], rt.big_lock)
            rt.call(two_threads([], no_pause))
            seen = list(others)
        thread.result(rt.big_lock)
        return seen

    assert in_plain_thread(caller) == []
    assert others == ["in"]


@pytest.mark.parametrize("place", MAY_CALL_MAIN)
@pytest.mark.parametrize("yields", [0, 1, 5])
def test_rule9_result_from_every_place(world: World, place: str, yields: int) -> None:
    """The result comes back from the main context, however often the coroutine lets others run."""

    async def counts() -> int:
        for _ in range(yields):
            await asyncio.sleep(0)
        return yields

    assert at(world, place, lambda: world.rt.call(counts())) == yields


@pytest.mark.parametrize("place", list(PLACES))
def test_rule9_result_from_the_own_iothread(world: World, place: str) -> None:
    """On a context without a big lock: submitted and waited for; in an IOThread only for its own."""

    async def visit() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert at(world, place, lambda: world.own.call(visit())) == world.own.context.name


@pytest.mark.parametrize("place", MAY_CALL_MAIN)
@pytest.mark.parametrize(("raising", "kind"), [(raises_now, Boom), (raises_later, TimeoutError)])
def test_rule9_exception_with_its_traceback(
    world: World, place: str, raising: Callable[[], Any], kind: type[Exception]
) -> None:
    """What the coroutine raises comes back, and its traceback leads into the coroutine."""
    with pytest.raises(kind) as caught:
        at(world, place, lambda: world.rt.call(raising()))
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert raising.__name__ in frames


@pytest.mark.parametrize("place", MAY_CALL_MAIN)
def test_rule9_contextvars_of_the_caller(world: World, place: str) -> None:
    """The coroutine sees the caller's contextvars; what it sets itself stays its own."""

    async def look() -> str:
        await asyncio.sleep(0)
        seen = place_var.get()
        place_var.set("the coroutine")
        return seen

    def caller() -> tuple[str, str]:
        place_var.set(place)
        return world.rt.call(look()), place_var.get()

    assert at(world, place, caller) == (place, place)


# Rule 9: the ends that nobody wants


@pytest.mark.parametrize("place", MAY_CALL_MAIN)
@pytest.mark.parametrize("slow", [Slow, Stubborn])
def test_rule9_timeout_cancels_and_waits(world: World, place: str, slow: type[Slow]) -> None:
    """TimeoutError comes after the coroutine has been cancelled and has cleaned up, whatever it then returns."""
    it = slow()
    with pytest.raises(TimeoutError):
        at(world, place, lambda: world.rt.call(it.run(), timeout=0.1))
    assert it.log == ["cancelled", "cleaned up"]


@pytest.mark.parametrize("place", ["plain", "main callback", "main coroutine", "io callback", "io coroutine"])
def test_rule9_timeout_on_an_iothread(world: World, place: str) -> None:
    """The same, submitted to another context."""
    it = Slow()
    with pytest.raises(TimeoutError):
        at(world, place, lambda: world.own.call(it.run(), timeout=0.1))
    assert it.log == ["cancelled", "cleaned up"]


@pytest.mark.parametrize("place", MAY_CALL_MAIN)
def test_rule9_timeout_not_reached(world: World, place: str) -> None:
    """A coroutine that ends in time returns, and no alarm is left behind in the loop."""
    async def brief() -> str:
        await asyncio.sleep(0)
        return "in time"

    assert at(world, place, lambda: world.rt.call(brief(), timeout=LIMIT_S)) == "in time"


def test_rule9_timeout_of_zero(rt: homeloop.Runtime) -> None:
    """What needs no wait returns even so; what does wait is cancelled."""
    assert rt.call(returned(lambda: 5), timeout=0) == 5
    it = Slow()
    with pytest.raises(TimeoutError):
        rt.call(it.run(), timeout=0)
    assert it.log == ["cancelled", "cleaned up"]


def sleeps_in_a_wait(ident: int) -> bool:
    """Does the thread sleep in the core's waits? Its innermost frame is there."""
    frame = sys._current_frames().get(ident)
    return frame is not None and frame.f_code.co_filename.endswith("waiting.py") and frame.f_code.co_name == "wait"


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[Slow], Plain]]:
    """Starts a thread that presses Ctrl-C once the main thread sleeps in a wait for the coroutine.

    A signal that comes between the last look of the interpreter and the system call does not end that call: so
    it is pressed until the handler has run, which raises the first time only.
    """
    me = threading.get_ident()
    assert threading.current_thread() is threading.main_thread()
    handled = threading.Event()

    def on_sigint(signum: int, frame: object) -> None:
        if not handled.is_set():
            handled.set()
            raise KeyboardInterrupt

    def press(it: Slow) -> None:
        wait(it.waiting)
        until(lambda: sleeps_in_a_wait(me))
        for _ in range(100):
            signal.pthread_kill(me, signal.SIGINT)
            if handled.wait(0.05):
                return
        raise AssertionError("the main thread takes no signal")

    before = signal.signal(signal.SIGINT, on_sigint)
    yield lambda it: Plain(press, it)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["main", "main with the lock", "iothread"])
def test_rule9_ctrl_c_cancels_and_waits(world: World, ctrl_c: Callable[[Slow], Plain], where: str) -> None:
    """KeyboardInterrupt leaves call() after the coroutine has been cancelled and has cleaned up."""
    it = Slow()
    presser = ctrl_c(it)
    with pytest.raises(KeyboardInterrupt):
        if where == "iothread":
            world.own.call(it.run())
        elif where == "main":
            world.rt.call(it.run())
        else:
            with world.rt.big_lock:
                world.rt.call(it.run())
    presser.result()
    assert it.log == ["cancelled", "cleaned up"]
    assert not world.rt.big_lock.held()
    assert world.rt.call(returned(lambda: 1)) == 1


def test_rule9_ctrl_c_while_the_coroutine_runs_in_the_caller(
    rt: homeloop.Runtime, ctrl_c: object, caplog: pytest.LogCaptureFixture
) -> None:
    """KeyboardInterrupt inside a driven coroutine ends it and call(); lock and context are as before.

    The caller has the exception: it is not logged as one that nobody retrieved.
    """

    async def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        rt.call(interrupted())
    assert (rt.big_lock.held(), homeloop.current_context()) == (False, None)
    assert rt.call(returned(lambda: 1)) == 1
    gc.collect()
    assert caplog.text == ""


def test_rule9_ctrl_c_in_result_leaves_the_coroutine_alone(
    rt: homeloop.Runtime, ctrl_c: Callable[[Slow], Plain]
) -> None:
    """result() only waits: the coroutine is not the caller's, and goes on."""
    it = Slow()
    co = rt.main.spawn(it.run())
    presser = ctrl_c(it)
    with pytest.raises(KeyboardInterrupt):
        co.result()
    presser.result()
    assert not co.done()
    assert it.log == []


def test_rule9_the_runtime_ends_meanwhile() -> None:
    """A caller whose coroutine is cancelled by the end of the runtime gets CancelledError, not a hang."""
    it = Slow()
    with homeloop.Runtime() as rt:
        thread = Plain(lambda: rt.call(it.run()))
        wait(it.waiting, rt.main)
    with pytest.raises(asyncio.CancelledError):
        thread.result(rt)
    assert it.log == ["cancelled", "cleaned up"]


def test_rule9_refused_by_a_closed_context() -> None:
    """ContextClosed, and the coroutine object is closed: no warning follows."""
    with homeloop.Runtime() as rt:
        pass
    coro = returned(lambda: 1)
    with pytest.raises(ContextClosed):
        rt.call(coro)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


def test_rule9_many_callers_at_once(rt: homeloop.Runtime, seed: int) -> None:
    """Calls from several threads, some driven, some handed over: each gets its own result, none is lost."""

    async def add(a: int, b: int, yields: int) -> int:
        for _ in range(yields):
            await asyncio.sleep(0)
        return a + b

    def caller(number: int) -> int:
        rnd = random.Random(seed + number)
        right = 0
        for i in range(100):
            yields = rnd.choice((0, 0, 1, 3))
            if rnd.random() < 0.3:
                with rt.big_lock:
                    right += rt.call(add(number, i, yields)) == number + i
            else:
                right += rt.call(add(number, i, yields)) == number + i
        return right

    threads = [Plain(caller, number) for number in range(4)]
    assert [thread.result(rt.main, rt.big_lock) for thread in threads] == [100] * 4


# A runtime that nobody serves


@pytest.fixture
def unserved() -> Iterator[homeloop.Runtime]:
    runtime = homeloop.Runtime()
    yield runtime
    runtime.close()


@pytest.mark.parametrize("locked", [False, True], ids=["without the lock", "with the lock"])
def test_rule9_nobody_serves_the_runtime(unserved: homeloop.Runtime, locked: bool) -> None:
    """The caller serves the main loop itself for as long as it waits: timers, callbacks, other coroutines."""

    async def needs_service() -> int:
        beside = asyncio.ensure_future(asyncio.wait_for(asyncio.Event().wait(), 0.002))
        with pytest.raises(TimeoutError):
            await beside
        return threading.get_ident()

    def caller() -> bool:
        if locked:
            with unserved.big_lock:
                return unserved.call(needs_service()) == threading.get_ident()
        return unserved.call(needs_service()) == threading.get_ident()

    assert in_plain_thread(caller)


def test_rule9_nobody_serves_and_the_serving_caller_leaves(unserved: homeloop.Runtime) -> None:
    """Two callers wait, one of them serves; when its own coroutine ends, the other must take over.

        first caller                second caller               test
        1 serves                    2 sleeps or serves in turn
                                                                3 ends the first coroutine
        4 returns, serves no more
                                                                5 ends the second
                                    6 serves, returns
    """
    events = [asyncio.Event(), asyncio.Event()]
    waiting = [threading.Event(), threading.Event()]

    async def body(number: int) -> int:
        waiting[number].set()
        await events[number].wait()
        await asyncio.sleep(0)
        return number

    threads = []
    for number in (0, 1):
        threads.append(Plain(lambda number=number: unserved.call(body(number))))
        wait(waiting[number], unserved.main)
    for number in (0, 1):
        unserved.main.post(events[number].set)
        assert threads[number].result(unserved.main) == number


def test_rule9_nobody_serves_and_timeout(unserved: homeloop.Runtime) -> None:
    """The time-out counts there too."""
    it = Slow()
    with pytest.raises(TimeoutError):
        unserved.call(it.run(), timeout=0.1)
    assert it.log == ["cancelled", "cleaned up"]


def test_rule9_the_lock_is_taken_by_somebody_else(rt: homeloop.Runtime) -> None:
    """call() waits its turn for the lock, and then runs."""
    with holding(rt.big_lock):
        thread = Plain(lambda: rt.call(returned(lambda: 3)))
        until(lambda: rt.big_lock.statistics()["waiting"], rt.big_lock)
        assert thread.running()
    assert thread.result(rt.big_lock) == 3


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_rule9_what_a_driven_coroutine_woke_before_it_was_interrupted_runs(kind: type[BaseException]) -> None:
    """The wakes of a coroutine whose step ends by Ctrl-C are not lost with it."""
    async def parks() -> str:
        await homeloop.park()
        return "woken"

    async def wakes() -> None:
        parked.wake()
        raise kind

    with homeloop.Runtime() as rt:
        parked = rt.main.spawn(parks())
        until(lambda: parked.state is homeloop.CoroutineState.PARKED, parked)
        with pytest.raises(kind):
            rt.call(wakes())
        assert parked.result(LIMIT_S) == "woken"
