"""Every interleaving of the protocols between threads, on the real code; and that the check finds the broken line.

Each protocol has a small model: a few threads that use the real functions, and what must be true at the end. Beside it
stand mutants: the one crucial line taken out, moved or replaced. A mutant that passes would mean that the model does
not reach what it is for. tests/proof/stepping.py says how the interleavings are made, and why not with spin.
"""

from __future__ import annotations

import select
import threading
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from homeloop.core import biglock, coroutine, ending, workers
from homeloop.core.biglock import BigLock
from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.inbox import Inbox
from homeloop.core.loop import set_running_loop
from homeloop.core.runtime import Runtime
from homeloop.core.workers import WorkerPool
from homeloop.errors import ContextClosed
from tests.proof.stepping import (
    Check,
    Critical,
    StepLock,
    Stepping,
    StepRLock,
    finds,
    mutated,
    passes,
)

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="the models sleep in epoll")


# -- big lock: take, withdraw, hand over, with time-outs ---------------------------------------------------


def stepped_lock(run: Stepping) -> BigLock:
    """A big lock whose mutex and gates are stepped."""
    context = types.SimpleNamespace(name="model", lock=StepRLock(), home=None)
    return BigLock(context, enabled=True)  # type: ignore[arg-type]


@pytest.fixture
def stepped_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biglock, "allocate_lock", Gate)


class Gate(StepLock):
    name = "gate"


def hand_over(run: Stepping) -> Check:
    """One thread holds and lets go, one takes, one takes with a time-out."""
    lock = stepped_lock(run)
    critical = Critical(run)
    outcomes: list[bool] = []

    def takes(timeout: float | None) -> None:
        me = threading.get_ident()
        outcomes.append(lock.take(me, timeout))
        if outcomes[-1] or timeout is None:
            assert lock.held(), "take() returned, and the lock is another's"
            critical.enter()
            lock.hand_over()

    def holds() -> None:
        lock._holder = threading.get_ident()
        critical.enter()
        lock.hand_over()

    run.thread("holder", holds)
    run.thread("patient", lambda: takes(None))
    run.thread("impatient", lambda: takes(1.0))

    def check() -> None:
        assert lock._holder == 0, "left locked, and nobody is there to let go"
        assert not lock._waiters, "somebody gone stands in the queue"
        assert critical.entered == 1 + sum(outcomes)

    return check


def two_only(run: Stepping) -> Check:
    """A holder and an impatient one: small enough to switch at every line."""
    lock = stepped_lock(run)
    critical = Critical(run)
    outcomes: list[bool] = []

    def takes() -> None:
        outcomes.append(lock.take(threading.get_ident(), 1.0))
        if outcomes[-1]:
            critical.enter()
            lock.hand_over()

    def holds() -> None:
        assert lock.take(threading.get_ident())
        critical.enter()
        lock.hand_over()

    run.thread("holder", holds)
    run.thread("impatient", takes)

    def check() -> None:
        assert (lock._holder, len(lock._waiters)) == (0, 0), "left locked, or a waiter left behind"
        assert critical.entered == 1 + sum(outcomes)

    return check


@pytest.mark.usefixtures("stepped_gates")
def test_hand_over() -> None:
    passes(hand_over, 200)
    passes(two_only, 10, lines=[BigLock.hand_over])


@pytest.mark.usefixtures("stepped_gates")
@pytest.mark.parametrize(("where", "old", "new"), [
    ("_withdraw", "if waiter.granted:", "if False:"),
    ("take", "return not self._withdraw(waiter)", "self._withdraw(waiter); return False"),
    ("take", "return not self._withdraw(waiter)", "return False"),
    ("hand_over", "self._holder = waiter.ident", "self._holder = 0"),
    ("hand_over", "waiter.gate.release()", "pass"),
    ("take", "if not self._holder:", "if True:"),
], ids=["granted and withdrawn", "the grant is forgotten", "stays in the queue", "barging", "not woken", "taken twice"])
def test_hand_over_without_the_crucial_line(monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str) -> None:
    monkeypatch.setattr(BigLock, where, mutated(getattr(BigLock, where), old, new))
    finds(hand_over)


@pytest.mark.usefixtures("stepped_gates")
def test_hand_over_needs_its_mutex(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = mutated(BigLock.hand_over, "with self._mutex:", "if True:")
    monkeypatch.setattr(BigLock, "hand_over", naive)
    finds(two_only, lines=[naive, BigLock.take])


# -- park against wake, on a real loop -----------------------------------------------------------------------


class SteppedEpoll:
    """An epoll whose sleep is a point."""

    def __init__(self, run: Stepping, real: Any) -> None:
        self._run = run
        self._real = real
        self.register, self.unregister = real.register, real.unregister

    def poll(self, timeout: float | None = None, maxevents: int = -1) -> Any:
        if timeout is None or timeout < 0:
            self._run.until("asleep", lambda: self._real.poll(0))
        return self._real.poll(0, maxevents)


def stepped_context(run: Stepping, context: AioContext) -> None:
    """Step the locks of a context; its sleep is a point that a kick ends, through the real eventfd and epoll."""
    home = context.home
    assert home is not None
    context.lock = context.inbox.lock = StepRLock()  # type: ignore[assignment]
    if context.gate is not None:
        context.gate._mutex = context.lock
    home._selector._epoll = SteppedEpoll(run, home._selector._epoll)  # type: ignore[assignment]
    run.cleanups.append(home.close)


def serves(context: AioContext, until: Callable[[], object]) -> None:
    """Be the home, iteration by iteration."""
    home = context.home
    assert home is not None
    context.begin_serving()
    set_running_loop(home)
    try:
        while not until():
            home.run_one(blocking=True)
    finally:
        set_running_loop(None)
        context.end_serving()


def park_and_wake(run: Stepping, big_lock: bool = False) -> Check:
    """A coroutine that parks until the wakes end. Two threads wake it; with a big lock, one thread that takes it."""
    runtime = Runtime(name="model", big_lock=big_lock)
    context = runtime.main
    stepped_context(run, context)
    returned = accepted = sent = 0

    async def parks() -> None:
        nonlocal returned
        while sent < (1 if big_lock else 2):
            await coroutine.park()
            returned += 1

    co = context.spawn(parks())
    co.when_done(lambda _co: context.inbox.notify())        # it may end on a waker, under the big lock

    def wakes() -> None:
        nonlocal accepted, sent
        run.point("about to wake")
        sent += 1                       # before the wake: the coroutine looks behind it
        took = co.wake()
        accepted += took

    def wakes_here() -> None:
        run.point("about to lock")
        with runtime.big_lock:
            wakes()

    run.thread("home", lambda: serves(context, co.done))
    for name, wake in {"holder": wakes_here}.items() if big_lock else {"waker a": wakes, "waker b": wakes}.items():
        run.thread(name, wake)

    def check() -> None:
        assert co.done(), co
        # A wake that came before the start, or behind the last look, has no park to end.
        assert returned <= accepted, f"{returned} parks returned for {accepted} wakes"
        assert accepted - returned <= 1, f"{returned} parks returned for {accepted} wakes"

    return check


def test_park_and_wake() -> None:
    passes(park_and_wake, 100)


@pytest.mark.usefixtures("stepped_gates")
def test_park_and_wake_with_a_big_lock() -> None:
    passes(lambda run: park_and_wake(run, True), 100)


@pytest.mark.parametrize(("owner", "where", "old", "new"), [
    (coroutine, "park", "if co._permit:", "if False:"),
    (Coroutine, "_accept_wake_locked", "self._permit = True", "pass"),
    (Coroutine, "_accept_wake_locked", "if state is not _PARKED:", "if True:"),
    (Coroutine, "_schedule", "context.inbox.put_locked(self)", "context.queue(self)"),
], ids=["the permit is not looked at", "not remembered", "not resumed", "not kicked"])
def test_park_and_wake_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, owner: Any, where: str, old: str, new: str
) -> None:
    monkeypatch.setattr(owner, where, mutated(getattr(owner, where), old, new))
    finds(park_and_wake)


# -- stop against post -------------------------------------------------------------------------------------


def stop_and_post(run: Stepping) -> Check:
    """A home that ends its context while two threads post and spawn: what was accepted runs, all else is refused."""
    context = AioContext("model")
    stepped_context(run, context)
    accepted: list[str] = []
    ran: list[str] = []
    spawned: list[Coroutine[None]] = []

    async def parks() -> None:
        await coroutine.park("to be cancelled")

    def home() -> None:
        context.begin_serving()
        ending.end_context(context)
        context.end_serving()

    def posts() -> None:
        accepted.extend(name for name in ("first", "second") if context.try_post(ran.append, name))

    def spawns() -> None:
        try:
            spawned.append(context.spawn(parks()))
        except ContextClosed:
            pass

    run.thread("home", home)
    run.thread("poster", posts)
    run.thread("spawner", spawns)

    def check() -> None:
        assert context.closed
        assert ran == accepted, f"accepted {accepted}, ran {ran}"
        assert all(co.cancelled() for co in spawned), spawned

    return check


def test_stop_and_post() -> None:
    passes(stop_and_post, 100)


def test_stop_and_post_without_the_crucial_line(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = mutated(Inbox.close_if_empty, "if self.entries:", "if False:")
    monkeypatch.setattr(Inbox, "close_if_empty", naive)
    finds(stop_and_post)


def test_post_needs_its_look_at_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = mutated(AioContext.try_post, "elif self.inbox.closed:", "elif False:")
    monkeypatch.setattr(AioContext, "try_post", naive)
    finds(stop_and_post)


# -- worker end against submit -----------------------------------------------------------------------------


class PoolLock(StepLock):
    name = "pool's"


class WorkerThread:
    """Stands in for threading.Thread: a stepped one."""

    def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        self._target = target
        self._name = name

    def start(self) -> None:
        run = Stepping.current
        assert run is not None
        run.thread(self._name, self._main)

    def _main(self) -> None:
        current.worker = self
        self._target()


class Current(threading.local):
    worker: WorkerThread


current = Current()


@pytest.fixture
def stepped_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's locks and threads are stepped; each time-out of a gate moves its clock."""
    monkeypatch.setattr(workers, "threading", types.SimpleNamespace(
        Lock=PoolLock, Thread=WorkerThread, current_thread=lambda: current.worker))

    def monotonic() -> float:
        assert Stepping.current is not None
        return Stepping.current.clock

    monkeypatch.setattr(workers, "time", types.SimpleNamespace(monotonic=monotonic))


def submit_and_idle_end(run: Stepping) -> Check:
    """Work is submitted twice while a worker may be busy, idle, at the end of its time, or gone."""
    context = AioContext("model")
    run.cleanups.append(context.loop.close)
    pool = WorkerPool(context, 0, 1)
    ran: list[int] = []
    works: list[Any] = []

    def home() -> None:
        for number in (1, 2):
            run.point(f"submit {number}")
            works.append(pool.submit(lambda number=number: ran.append(number)))

    run.thread("home", home)

    def check() -> None:
        while context.inbox.entries:            # deliver what was handed over
            context.inbox.entries.popleft()._run()
        assert ran == [1, 2], f"ran {ran}"
        assert all(work.done() for work in works), "a result was lost"
        left = pool.statistics()
        assert (left["threads"], left["idle"], left["queued"], left["completed"]) == (0, 0, 0, 2), left

    return check


@pytest.mark.usefixtures("stepped_workers")
def test_submit_and_idle_end() -> None:
    passes(submit_and_idle_end, 10)


@pytest.mark.usefixtures("stepped_workers")
@pytest.mark.parametrize(("where", "old", "new"), [
    ("_next", "self._idle.remove(gate)", "pass"),
    ("_next", "if self._work:", "if self._work and time.monotonic() < idle_until:"),
    ("_next", "self.minimum:\n                self._threads.discard(threading.current_thread())", "self.minimum:"),
], ids=["gone and still idle", "no last look", "ended and still counted"])
def test_submit_and_idle_end_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str
) -> None:
    monkeypatch.setattr(WorkerPool, where, mutated(getattr(WorkerPool, where), old, new))
    finds(submit_and_idle_end)


def results(run: Stepping) -> Check:
    """Two workers hand over, the home delivers: one message may carry both, none may be left."""
    context = AioContext("model")
    run.cleanups.append(context.loop.close)
    context.lock = context.inbox.lock = StepRLock()  # type: ignore[assignment]
    pool = WorkerPool(context, 0, 2)
    pool._start_locked = lambda: None  # type: ignore[method-assign]    # the threads below do the handing over
    works: list[Any] = [pool.submit(lambda: None) for _ in range(2)]
    pool._work.clear()
    errors: list[Any] = []
    context.loop.set_exception_handler(lambda _loop, what: errors.append(what))

    def home() -> None:
        messages: deque[Any] = deque()
        while not all(work.done() for work in works):
            run.until("a message", lambda: context.inbox.entries)
            context.inbox.take(messages)
            while messages:
                messages.popleft()._run()
        assert [work.result() for work in works] == [0, 1]

    run.thread("home", home)
    for number, work in enumerate(works):
        run.thread(f"worker {number}", lambda number=number, work=work: pool._hand_over(work, number, None))

    def check() -> None:
        assert not errors, errors

    return check


@pytest.mark.usefixtures("stepped_workers")
def test_results() -> None:
    passes(results, 10)


@pytest.mark.usefixtures("stepped_workers")
def test_results_without_a_further_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerPool, "_deliver", mutated(WorkerPool._deliver, "self._handing_over = False", "pass"))
    finds(results)


@pytest.mark.usefixtures("stepped_workers")
def test_results_need_batch_and_flag_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result handed over behind the taking of the batch finds a message on its way, which has been."""
    deliver = "    for work, result, exception in done:\n        work.complete(result, exception)\n"
    flag = "    self._handing_over = False\n"
    late = mutated(WorkerPool._deliver, f"    {flag}{deliver}", f"{deliver}{flag}")
    monkeypatch.setattr(WorkerPool, "_deliver", late)
    finds(results, lines=[late])
