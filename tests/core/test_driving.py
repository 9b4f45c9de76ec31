"""A thread that waits in call() serves the main loop itself, while the home sleeps on (rule 9)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.core import driving as driving_module
from homeloop.core.driving import SLEEPS_OUTSIDE
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, asleep, in_plain_thread, until, usable, wait

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="a loop can be driven where it has epoll")


@pytest.fixture(autouse=True)
def drives_for_long(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for every test but those that ask for less."""
    if "drives_shortly" not in request.fixturenames:
        monkeypatch.setattr(driving_module, "DRIVE_S", 3 * LIMIT_S)


@pytest.fixture
def drives_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving_module, "DRIVE_S", 0.001)


@pytest.fixture
def rt() -> Iterator[homeloop.Runtime]:
    """A runtime whose home sleeps outside: somebody has wished to drive."""
    with homeloop.Runtime() as runtime:
        in_plain_thread(make_drivable, runtime)
        yield runtime


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def make_drivable(runtime: homeloop.Runtime) -> None:
    runtime.call(due_at_once(), LIMIT_S)
    asleep(runtime.main)
    assert sleeps_outside(runtime)


async def due_at_once() -> None:
    """Wait for a timer of the loop."""
    due = asyncio.Event()
    asyncio.get_running_loop().call_later(0.0001, due.set)
    await due.wait()


def driving(runtime: homeloop.Runtime) -> Any:
    home: Any = runtime.main.home
    return home.driving


def sleeps_outside(runtime: homeloop.Runtime) -> bool:
    return driving(runtime) is not None and driving(runtime)._outside


def is_driven(runtime: homeloop.Runtime) -> bool:
    return driving(runtime) is not None and driving(runtime).driver != 0


async def ident_after(sock: socket.socket, count: int = 1) -> tuple[bytes, int]:
    """Receive once; what came, and the thread that it came to."""
    data = await asyncio.get_running_loop().sock_recv(sock, count)
    return data, threading.get_ident()


class Call:
    """A plain thread in call() for what is received on a socket, when it drives."""

    def __init__(self, runtime: homeloop.Runtime, sock: socket.socket, timeout: float | None = LIMIT_S) -> None:
        self.thread = Plain(lambda: runtime.call(ident_after(sock), timeout))
        until(lambda: is_driven(runtime), runtime.main, self.thread)
        until(runtime.main.inbox.sleeping, runtime.main)        # the driver: the home is not among the sleepers


def test_rule9_the_caller_runs_what_its_event_wakes(
    rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]
) -> None:
    before = rt.main.statistics()
    call = Call(rt, pair[0])
    pair[1].send(b"x")
    assert call.thread.result(rt.main) == (b"x", call.thread.ident)
    after = rt.main.statistics()
    assert after.calls_driven == before.calls_driven + 1
    assert after.kicks == before.kicks
    assert sleeps_outside(rt), "the home was woken"


def test_rule9_posts_and_timers_run_meanwhile_without_the_home(
    rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]
) -> None:
    call = Call(rt, pair[0])
    ran: list[int] = []
    timed, posted = threading.Event(), threading.Event()

    def note(event: threading.Event) -> None:
        ran.append(threading.get_ident())
        event.set()

    rt.main.post(note, posted)
    wait(posted, rt.main)
    rt.main.post(lambda: rt.main.loop.call_later(0.01, note, timed))
    wait(timed, rt.main)
    assert ran == [call.thread.ident] * 2
    pair[1].send(b"x")
    call.thread.result(rt.main)


def test_rule9_a_timer_that_the_home_sleeps_for_is_still_its_own(
    rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The home's sleep was begun for a timer; who drives does not take the promise back, nor wake the home."""
    ran = threading.Event()
    rt.main.post(lambda: rt.main.loop.call_later(0.05, ran.set))
    asleep(rt.main)
    before = rt.main.statistics().kicks
    for _ in range(3):
        call = Call(rt, pair[0])
        pair[1].send(b"x")
        call.thread.result(rt.main)
    if not ran.is_set():
        assert rt.main.statistics().kicks == before
    wait(ran, rt.main)


def test_rule9_two_callers_one_drives(rt: homeloop.Runtime) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for sock in (sock for both in pairs for sock in both):
            stack.enter_context(sock).setblocking(False)
        first = Call(rt, pairs[0][0])
        second = Plain(lambda: rt.call(ident_after(pairs[1][0]), LIMIT_S))
        until(lambda: rt.main.statistics().coroutines == 2, rt.main)
        pairs[0][1].send(b"1")                  # the driver ends: the second's event must reach the home
        assert first.thread.result(rt.main)[0] == b"1"
        pairs[1][1].send(b"2")
        assert second.result(rt.main)[0] == b"2"


def test_rule9_the_second_caller_is_served_by_the_driver(rt: homeloop.Runtime) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for sock in (sock for both in pairs for sock in both):
            stack.enter_context(sock).setblocking(False)
        first = Call(rt, pairs[0][0])
        second = Plain(lambda: rt.call(ident_after(pairs[1][0]), LIMIT_S))
        until(lambda: rt.main.statistics().coroutines == 2, rt.main)
        pairs[1][1].send(b"2")
        assert second.result(rt.main) == (b"2", first.thread.ident)
        pairs[0][1].send(b"1")
        assert first.thread.result(rt.main) == (b"1", first.thread.ident)


def test_rule9_timeout_ends_a_drive(rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]) -> None:
    cleaned = []

    async def receive() -> None:
        try:
            await asyncio.get_running_loop().sock_recv(pair[0], 1)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(TimeoutError):
        in_plain_thread(lambda: rt.call(receive(), 0.02))
    assert cleaned == [True]
    assert not is_driven(rt)
    in_plain_thread(usable, rt)


@pytest.mark.usefixtures("drives_shortly")
def test_rule9_who_waits_long_leaves_the_loop_to_its_home(
    rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]
) -> None:
    before = rt.main.statistics().calls_handed_over
    caller = Plain(lambda: rt.call(ident_after(pair[0]), LIMIT_S))
    until(lambda: rt.main.statistics().calls_handed_over > before, rt.main)
    assert not is_driven(rt)
    (co,) = rt.main.coroutines
    told = [getattr(callback, "__name__", "") for callback in co._callbacks or ()]
    assert "ended" not in told, "a drive that is over is told of the end"
    pair[1].send(b"x")
    data, ident = caller.result(rt.main)
    assert (data, ident == caller.ident) == (b"x", False)


@pytest.mark.usefixtures("drives_shortly")
def test_rule11_a_cycle_through_a_drive_is_found(rt: homeloop.Runtime) -> None:
    """A coroutine waits for a job on a worker, which calls for one that waits for the coroutine."""
    cell: list[homeloop.Coroutine[Any]] = []

    async def waits_for_the_first() -> None:
        await cell[0]

    def job() -> None:
        rt.call(waits_for_the_first())

    async def first() -> None:
        await homeloop.to_worker(job)

    cell.append(rt.main.create(first()))
    cell[0].schedule()
    with pytest.raises(asyncio.CancelledError, match="close a cycle"):      # what the refused call awaits ends with it
        cell[0].result(LIMIT_S)


def test_rule9_what_ends_by_another_thread_wakes_the_driver(
    rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The driver sleeps; a holder of the big lock ends what it waits for.

        driver (in call)                    holder of the big lock
        1 sleeps, the lock is free
                                            2 takes it, wakes the coroutine, which ends here
        3 must wake up
    """
    cell: list[homeloop.Coroutine[Any]] = []

    async def parks() -> str:
        co = homeloop.current_coroutine()
        assert co is not None
        cell.append(co)
        await homeloop.park("the holder")
        return threading.current_thread().name

    caller = Plain(lambda: rt.call(parks(), LIMIT_S))
    until(lambda: is_driven(rt) and cell, rt.main)
    until(rt.main.inbox.sleeping, rt.main)
    with rt.big_lock:
        cell[0].wake()
        assert cell[0].done()
    assert caller.result(rt.main) == threading.current_thread().name


def test_rule9_the_home_is_no_sleeper_for_others_while_it_waits_for_something_itself(
    rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A home in a nested wait must see each kick(): nobody drives beside it."""
    state = {"wait": True}
    inside, over = threading.Event(), threading.Event()

    def nested() -> None:
        rt.main.loop.call_soon(inside.set)
        rt.main.wait_while(lambda: state["wait"])
        over.set()

    rt.main.post(nested)
    wait(inside, rt.main)
    until(rt.main.inbox.sleeping, rt.main)
    caller = Plain(lambda: rt.call(ident_after(pair[0]), LIMIT_S))
    until(lambda: rt.main.statistics().coroutines == 1, rt.main)
    assert not is_driven(rt)
    state["wait"] = False
    homeloop.kick()
    wait(over, rt.main)
    pair[1].send(b"x")
    assert caller.result(rt.main)[0] == b"x"


def test_rule9_the_end_of_the_runtime_ends_a_drive(pair: tuple[socket.socket, socket.socket]) -> None:
    with homeloop.Runtime() as rt:
        in_plain_thread(make_drivable, rt)
        call = Call(rt, pair[0], None)
    with pytest.raises(asyncio.CancelledError):
        call.thread.result(rt.main)


def test_rule9_a_drive_that_meets_the_close_of_the_loop_ends_first(pair: tuple[socket.socket, socket.socket]) -> None:
    """loop.close() under a driver that sleeps: its epoll must not vanish below it."""
    closed = threading.Event()
    loop = homeloop.new_event_loop()
    context = homeloop.AioContext.of(loop)
    rt: Any = context.runtime

    def serve() -> None:
        loop.run_forever()
        loop.close()                    # without end_context(): the coroutine that is waited for still waits
        closed.set()

    home = Plain(serve)
    until(loop.is_running, context)
    in_plain_thread(make_drivable, rt)
    call = Call(rt, pair[0], None)
    with rt.big_lock:
        # Both in one step: the driver must not hand the home its stop and leave.
        driving(rt).driver, driver = 0, driving(rt).driver
        loop.stop()
        driving(rt).driver = driver
    wait(closed, context)
    home.result(context)
    with pytest.raises(asyncio.CancelledError):
        call.thread.result(context)


def test_rule9_stop_reaches_a_home_that_is_masked(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = homeloop.new_event_loop()
    context = homeloop.AioContext.of(loop)
    rt: Any = context.runtime
    home = Plain(loop.run_forever)
    until(loop.is_running, context)
    in_plain_thread(make_drivable, rt)
    call = Call(rt, pair[0], LIMIT_S)
    loop.call_soon_threadsafe(loop.stop)            # runs on the driver
    home.result(context)
    again = Plain(loop.run_forever)
    pair[1].send(b"x")
    assert call.thread.result(context)[0] == b"x"
    loop.call_soon_threadsafe(loop.stop)
    again.result(context)
    loop.close()


def test_rule9_a_system_exit_of_others_goes_to_the_home(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = homeloop.new_event_loop()
    context = homeloop.AioContext.of(loop)
    rt: Any = context.runtime
    home = Plain(loop.run_forever)
    until(loop.is_running, context)
    in_plain_thread(make_drivable, rt)
    call = Call(rt, pair[0], LIMIT_S)

    def leave() -> None:
        raise SystemExit(7)

    loop.call_soon_threadsafe(leave)                # runs on the driver
    with pytest.raises(SystemExit):
        home.result(context)
    again = Plain(loop.run_forever)
    pair[1].send(b"x")
    assert call.thread.result(context)[0] == b"x"
    loop.call_soon_threadsafe(loop.stop)
    again.result(context)
    loop.close()


def test_rule8_who_gives_way_while_it_drives_gets_its_own_thread_back(
    rt: homeloop.Runtime, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The driver's thread runs a loop of its own; meanwhile others take and leave the big lock."""
    seen = []

    async def caller() -> None:
        mine = asyncio.get_running_loop()
        rt.call(ident_after(pair[0]), LIMIT_S)          # blocks its own loop: the caller's decision
        seen.append(asyncio.get_running_loop() is mine)

    thread = Plain(lambda: asyncio.run(caller()))
    until(lambda: is_driven(rt), rt.main)
    until(rt.main.inbox.sleeping, rt.main)
    for _ in range(3):
        with rt.big_lock:
            pass
    in_plain_thread(lambda: rt.call(asyncio.sleep(0), LIMIT_S))
    pair[1].send(b"x")
    thread.result(rt.main)
    assert seen == [True]


def test_a_loop_that_nobody_drives_sleeps_inside_again(rt: homeloop.Runtime) -> None:
    for _ in range(SLEEPS_OUTSIDE + 1):
        asleep(rt.main)
    assert driving(rt).sleeps_left == 0
    assert not sleeps_outside(rt)


def test_no_file_descriptor_is_left(pair: tuple[socket.socket, socket.socket]) -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()

    before = len(descriptors())
    for _ in range(3):
        with homeloop.Runtime() as rt:
            in_plain_thread(make_drivable, rt)
    assert len(descriptors()) == before


# Ctrl-C

INTERRUPTED = """
import asyncio, os, random, signal, socket, sys, threading
import homeloop

pause = random.Random(int(sys.argv[1]))
main = threading.main_thread().ident
ours, theirs = socket.socketpair()
ours.setblocking(False)
accepted = ran = 0
ending = False

def count():
    global ran
    ran += 1

def posts():
    global accepted
    while not ending:
        rt.main.post(count)
        accepted += 1
        nap.wait(0.0001)

async def receive():
    try:
        await asyncio.get_running_loop().sock_recv(ours, 1)
    except asyncio.CancelledError:
        await asyncio.sleep(0)
        cleaned.append(True)
        raise

def send(after, armed, over):
    armed.wait()
    nap.wait(after)
    signal.pthread_kill(main, signal.SIGINT)
    # One that comes just before a thread goes to sleep is seen when the sleep ends: posts end a driver's, and where
    # the home serves, the next signal does.
    while not over.wait(1):
        signal.pthread_kill(main, signal.SIGINT)

nap = threading.Event()             # never set
with homeloop.Runtime() as rt:
    poster = threading.Thread(target=posts)
    poster.start()
    for number in range(int(sys.argv[2])):
        cleaned = []
        armed, over = threading.Event(), threading.Event()
        sender = threading.Thread(target=send, args=(pause.random() * 0.003, armed, over))
        sender.start()
        try:
            armed.set()
            rt.call(receive(), 20)
        except KeyboardInterrupt:
            over.set()
        sender.join()
        assert rt.call(asyncio.sleep(0, number), 20) == number
        assert not rt.big_lock.held()
        assert homeloop.current_context() is None
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ending = True
    poster.join()
    rt.call(asyncio.sleep(0.001), 20)
    done = threading.Event()
    rt.main.post(done.set)
    assert done.wait(20)
    assert ran == accepted, (ran, accepted)
print("done")
"""


@pytest.mark.stress
@pytest.mark.timeout(int(60 + 60 * STRESS_S))
def test_rule9_stress_ctrl_c_in_a_drive_loses_nothing_of_others(seed: int) -> None:
    """Ctrl-C at any moment of a call() that drives the loop in the main thread: what others post still runs."""
    argv = [sys.executable, "-X", "faulthandler", "-c", INTERRUPTED, str(seed), str(int(150 * STRESS_S))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, errors = process.communicate(timeout=40 + 40 * STRESS_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        out, errors = process.communicate()
        pytest.fail(f"hangs:\n{errors}")
    assert out == "done\n", errors


# Stress


class Echo:
    """A plain thread that sends back what it receives, one byte at a time."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._thread = threading.Thread(target=self._main, name="echo")
        self._thread.start()

    def _main(self) -> None:
        with self._theirs:
            while data := self._theirs.recv(1):
                self._theirs.send(data)

    def close(self) -> None:
        self.ours.close()
        self._thread.join(LIMIT_S)


async def ask(sock: socket.socket, byte: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, byte)
    return await loop.sock_recv(sock, 1)


class Crowd:
    """What the threads of the stress test do, each with a generator of its own, until the time is over."""

    def __init__(self, rt: homeloop.Runtime, seed: int) -> None:
        self.rt = rt
        self.errors: list[BaseException] = []
        self.posted = 0
        self.ran = 0
        self._seed = seed
        self._end = time.monotonic() + STRESS_S
        self._nap = threading.Event()           # never set

    def run(self, part: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(self._seed + number)
        try:
            while time.monotonic() < self._end and not self.errors:
                part(rng)
        except BaseException as exc:
            self.errors.append(exc)

    def post(self, rng: random.Random) -> None:
        self.posted += 1
        self.rt.main.post(self._count)
        self._nap.wait(rng.random() * 0.0005)

    def _count(self) -> None:
        self.ran += 1

    def hold(self, rng: random.Random) -> None:
        with self.rt.big_lock:
            self._nap.wait(rng.random() * 0.0005)
        self._nap.wait(rng.random() * 0.002)

    def call(self, sock: socket.socket, rng: random.Random) -> None:
        kind = rng.randrange(10)
        if kind < 7:
            byte = bytes([rng.randrange(256)])
            assert self.rt.call(ask(sock, byte), LIMIT_S) == byte
        elif kind < 8:
            self.rt.call(due_at_once(), LIMIT_S)
        elif kind < 9:
            assert self.rt.call(woken(), LIMIT_S) == "woken"
        else:
            with pytest.raises(TimeoutError):
                self.rt.call(parked(), rng.random() * 0.002)


async def woken() -> str:
    co = homeloop.current_coroutine()
    assert co is not None
    threading.Thread(target=co.wake).start()
    await homeloop.park("a thread")
    return "woken"


async def parked() -> None:
    await homeloop.park("nobody")


@pytest.mark.stress
@pytest.mark.timeout(int(60 + 10 * STRESS_S))
def test_rule9_stress_callers_posts_timers_wakes_and_holders(seed: int) -> None:
    """Four threads call for I/O, timers and wakes, others post and hold the lock: every answer is the right one."""
    with homeloop.Runtime() as rt, contextlib.ExitStack() as stack:
        crowd = Crowd(rt, seed)
        parts: list[Callable[[random.Random], None]] = [crowd.post, crowd.hold]
        for _ in range(4):
            echo = Echo()
            stack.callback(echo.close)
            parts.append(functools.partial(crowd.call, echo.ours))
        threads = [Plain(crowd.run, part, number) for number, part in enumerate(parts)]
        for thread in threads:
            thread._thread.join(LIMIT_S + STRESS_S)
            thread.result(rt.main, driving(rt))
        assert not crowd.errors, crowd.errors
        asleep(rt.main)
        assert crowd.ran == crowd.posted
        assert not is_driven(rt)
