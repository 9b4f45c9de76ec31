"""Every interleaving of hand-off against cancellation and time-outs in homeloop.sync, on the real code; and mutants.

As tests/proof/test_interleavings.py: small models, and beside each the crucial lines taken out. A thread's time-out
ends at any moment. A coroutine is driven by a stepped thread on a loop that has no more than a waiter needs: its wakes
come as messages, and so does a cancellation, at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from homeloop.core.loop import enter_task, leave_task, set_running_loop
from homeloop.errors import ChannelClosed, WrongState
from homeloop.sync import Channel, Mutex, OneShot, Semaphore, waiting
from homeloop.sync import mutex as mutex_module
from homeloop.sync.waiting import Waitable
from tests.proof.stepping import Check, Critical, Model, StepLock, Stepping, finds, mutated, passes


class Gate(StepLock):
    """Of a thread that waits."""

    name = "gate"


@pytest.fixture(autouse=True)
def stepped_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of primitives, and gates of threads, are stepped. Both are made by the same name in waiting."""
    monkeypatch.setattr(waiting, "allocate_lock", Gate)
    monkeypatch.setattr(mutex_module, "allocate_lock", StepLock)


class Promise:
    """As much of an asyncio future as a waiter and its task need."""

    _asyncio_future_blocking = False

    def __init__(self) -> None:
        self.settled = False

    def done(self) -> bool:
        return self.settled

    def set_result(self, _result: None) -> None:
        self.settled = True

    def __await__(self) -> Generator[Any, Any, None]:
        if not self.settled:
            yield self


class Home:
    """A loop with one task, in a stepped thread: what comes from other threads is done in order, as in asyncio."""

    def __init__(self, run: Stepping) -> None:
        self._run = run
        self._messages: deque[Callable[[], None]] = deque()
        self._cancelled = False
        self._awaited: Promise | None = None
        self.ended = False

    def create_future(self) -> Promise:
        return Promise()

    def get_debug(self) -> bool:
        return False

    def call_soon_threadsafe(self, fn: Callable[..., None], *args: Any) -> None:
        self._messages.append(lambda: fn(*args))

    def cancel(self) -> None:
        """asyncio.Task.cancel, from any thread."""
        self._run.point("cancel")
        self._messages.append(self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True

    def get_loop(self) -> Home:                 # it is its own task, too
        return self

    def get_name(self) -> str:
        return "task"

    def perform(self, coro: Coroutine[Any, Any, Any]) -> Any:
        """Run it to its end: what it returned, or "cancelled"."""
        loop: Any = self
        set_running_loop(loop)
        try:
            while True:
                self._step(coro)
                awaited = self._awaited
                while not (self._cancelled or (awaited is not None and awaited.done())):
                    self._run.until("asleep", lambda: self._messages)
                    self._messages.popleft()()
                while self._messages:           # came in the same turn, before the task's step
                    self._messages.popleft()()
        except StopIteration as stop:
            return stop.value
        except asyncio.CancelledError:
            return "cancelled"
        finally:
            set_running_loop(None)
            self.ended = True

    def _step(self, coro: Coroutine[Any, Any, Any]) -> None:
        loop: Any = self
        enter_task(loop, loop)
        try:
            if self._cancelled:
                self._cancelled = False
                self._awaited = coro.throw(asyncio.CancelledError())
            else:
                self._awaited = coro.send(None)
        finally:
            leave_task(loop, loop)


def put(monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str) -> Callable[..., Any]:
    """Put a mutant in the place of a method, `Class.method`."""
    kind, _, name = where.partition(".")
    owner = {"Waitable": Waitable, "Mutex": Mutex, "Semaphore": Semaphore, "Channel": Channel, "OneShot": OneShot}[kind]
    mutant = mutated(getattr(owner, name), old, new)
    monkeypatch.setattr(owner, name, mutant)
    return mutant


# -- Mutex -------------------------------------------------------------------------------------------------


def mutex_of_threads(run: Stepping) -> Check:
    """One that has it, one that waits, one whose time may be over."""
    mutex, critical = Mutex(), Critical(run)
    got: list[bool] = []

    def holds() -> None:
        critical.enter()
        mutex.release()

    def takes(timeout: float | None) -> None:
        got.append(mutex.acquire(timeout))
        if got[-1]:
            critical.enter()
            mutex.release()

    def begins() -> None:
        mutex.acquire()
        run.thread("impatient", lambda: takes(1.0))
        run.thread("patient", lambda: takes(None))
        holds()

    run.thread("holder", begins)

    def check() -> None:
        assert not mutex.locked(), "left locked, and nobody is there to let go"
        assert mutex.owner is None
        assert not mutex._line, "somebody gone stands in line"
        assert len(got) == 2
        assert critical.entered == 1 + sum(got)

    return check


def mutex_against_cancellation(run: Stepping) -> Check:
    """Handed to a coroutine that is cancelled at any moment; a thread waits behind it."""
    mutex, critical, home = Mutex(), Critical(run), Home(run)
    ended: list[Any] = []

    async def enters() -> str:
        async with mutex:
            critical.enter()
        return "entered"

    def takes() -> None:
        with mutex:
            critical.enter()

    def begins() -> None:
        with mutex:
            run.thread("home", lambda: ended.append(home.perform(enters())))
            run.thread("canceller", home.cancel)
            run.thread("patient", takes)
            critical.enter()

    run.thread("holder", begins)

    def check() -> None:
        assert not mutex.locked(), "left locked, and nobody is there to let go"
        assert not mutex._line
        assert critical.entered == 2 + (ended == ["entered"])

    return check


def mutex_of_two(run: Stepping) -> Check:
    """Small enough to switch at every line: what is looked at without the lock."""
    mutex = Mutex()
    owners: list[Any] = []

    def takes() -> None:
        mutex.acquire()
        assert not mutex._line
        owners.append(mutex.owner)

    def begins() -> None:
        mutex.acquire()
        run.thread("other", takes)
        run.point("inside")
        assert not owners, "two have the lock"
        mutex.release()

    run.thread("one", begins)
    return lambda: None


MUTEX_LINES = (Mutex._release, Mutex._take, Mutex._grant_locked)


def test_mutex() -> None:
    passes(mutex_of_threads, 100)
    passes(mutex_against_cancellation, 100)
    passes(mutex_of_two, 10, lines=MUTEX_LINES)


@pytest.mark.parametrize(("where", "old", "new", "model"), [
    ("Mutex._release", "self._grant()", "pass", mutex_of_two),
    ("Mutex._grant_locked", "self._line and self._take()", "self._line", mutex_of_two),
    ("Mutex._undo_locked", "return self._hand_over_locked()", "return ()", mutex_against_cancellation),
    ("Waitable._leave", "if granted:", "if False:", mutex_against_cancellation),
    ("Waitable._sleep", "self._leave(waiter)", "pass", mutex_against_cancellation),
    ("Waitable._block", "if waiter.granted:", "if False:", mutex_of_threads),
    ("Waitable._block", "waiter.line.pop(waiter, None)", "pass", mutex_of_threads),
    ("Mutex._hand_over", "self._wake(woken)", "pass", mutex_of_threads),
], ids=["no second look", "handed over twice", "cancelled with it", "granted and not seen",
        "cancelled and still in line", "time over and granted", "gone and still in line", "not woken"])
def test_mutex_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str, model: Model
) -> None:
    mutant = put(monkeypatch, where, old, new)
    finds(model, lines=[*MUTEX_LINES, mutant] if model is mutex_of_two else ())


# -- Semaphore -----------------------------------------------------------------------------------------------


def semaphore(run: Stepping) -> Check:
    """One unit comes; a coroutine that is cancelled and a thread whose time may be over want it."""
    units, home = Semaphore(0), Home(run)
    got: list[Any] = []

    async def takes() -> str:
        await units.acquire()
        return "taken"

    def gives_and_cancels() -> None:
        units.release()
        home.cancel()

    run.thread("home", lambda: got.append(home.perform(takes())))
    run.thread("impatient", lambda: got.append(units.acquire(1.0)))
    run.thread("giver", gives_and_cancels)

    def check() -> None:
        assert units.value == 1 - got.count("taken") - got.count(True), "a unit was lost, or made"
        assert not units._line
        assert len(got) == 2

    return check


def test_semaphore() -> None:
    passes(semaphore, 100)


@pytest.mark.parametrize(("where", "old", "new"), [
    ("Semaphore._undo_locked", "self._free += waiter.wants", "pass"),
    ("Semaphore._grant_locked", "self._free -= wants", "pass"),
    ("Waitable._leave", "if granted:", "if False:"),
    ("Waitable._block", "if waiter.granted:", "if False:"),
], ids=["not put back", "not taken", "granted and not seen", "time over and granted"])
def test_semaphore_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str
) -> None:
    put(monkeypatch, where, old, new)
    finds(semaphore)


def semaphore_behind(run: Stepping) -> Check:
    """The coroutine in front is cancelled with the unit: the thread behind it has it, whose time is never over."""
    units, home = Semaphore(0), Home(run)
    got: list[Any] = []

    async def takes() -> None:
        async with units:
            run.point("inside")

    def gives_and_cancels() -> None:
        units.release()
        home.cancel()

    run.thread("home", lambda: got.append(home.perform(takes())))
    run.thread("patient", lambda: got.append(units.acquire()))
    run.thread("giver", gives_and_cancels)

    def check() -> None:
        assert units.value == 0
        assert len(got) == 2

    return check


def test_semaphore_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passes(semaphore_behind, 100)
    put(monkeypatch, "Semaphore._undo_locked", "return self._grant_locked()", "return ()")
    finds(semaphore_behind)


# -- Channel, rendezvous -------------------------------------------------------------------------------------


def sender_cancelled(run: Stepping) -> Check:
    """A coroutine that may be cancelled sends, a thread whose time may be over receives, and it is closed."""
    channel: Channel[str] = Channel(0)
    home = Home(run)
    sent: list[Any] = []
    received: list[str] = []

    async def sends() -> str:
        try:
            await channel.send("item")
        except ChannelClosed:
            return "refused"
        return "sent"

    def receives() -> None:
        with contextlib.suppress(TimeoutError, ChannelClosed):
            received.append(channel.receive(1.0))

    def cancels_and_closes() -> None:
        home.cancel()
        channel.close()

    run.thread("home", lambda: sent.append(home.perform(sends())))
    run.thread("receiver", receives)
    run.thread("canceller", cancels_and_closes)

    def check() -> None:
        assert [*received, *channel._buffer] == ["item"] * sent.count("sent"), f"{sent}, {received} received"
        assert (channel._reserved, channel._promised, len(channel._line), len(channel._receivers)) == (0, 0, 0, 0)

    return check


def receiver_cancelled(run: Stepping) -> Check:
    """A coroutine receives, a thread cancels it and receives too; another sends one item."""
    channel: Channel[str] = Channel(0)
    home = Home(run)
    received: list[Any] = []

    async def receives() -> Any:
        return await channel.receive()

    def receives_at_home() -> None:
        received.append(home.perform(receives()))
        if received[-1] == "item":
            channel.close()                     # the other need not wait

    def receives_too() -> None:
        home.cancel()
        with contextlib.suppress(ChannelClosed):
            received.append(channel.receive())

    run.thread("home", receives_at_home)
    run.thread("sender", lambda: channel.send("item"))
    run.thread("receiver", receives_too)

    def check() -> None:
        assert received.count("item") == 1, f"{received} received"
        assert (channel._reserved, channel._promised, len(channel._line), len(channel._receivers)) == (0, 0, 0, 0)

    return check


def test_channel() -> None:
    passes(sender_cancelled, 100)
    passes(receiver_cancelled, 100)


@pytest.mark.parametrize(("where", "old", "new", "model"), [
    ("Channel._undo_locked", "self._promised -= 1", "pass", receiver_cancelled),
    ("Channel._undo_locked", "return self._promise_locked()", "return ()", receiver_cancelled),
    ("Channel._received", "self._promised -= 1", "pass", sender_cancelled),
    ("Channel._undo_locked", "self._reserved -= 1", "pass", sender_cancelled),
    ("Channel._send_or_join", "self._reserved -= 1", "pass", sender_cancelled),
    ("Channel._grant_locked", "self._reserved += 1", "pass", sender_cancelled),
    ("Channel._pop_receiver_locked", "waiter.granted = True", "pass", receiver_cancelled),
    ("Waitable._sleep", "self._leave(waiter)", "pass", receiver_cancelled),
    ("Waitable._block", "if waiter.granted:", "if False:", sender_cancelled),
], ids=["cancelled with a promise", "not handed on", "promise kept for ever",
        "cancelled with a place", "place used and kept", "place given twice",
        "granted and not seen", "cancelled and still in line", "time over and granted"])
def test_channel_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str, model: Model
) -> None:
    put(monkeypatch, where, old, new)
    finds(model)


# -- OneShot ---------------------------------------------------------------------------------------------------


def one_shot(run: Stepping) -> Check:
    """One sets it; a coroutine that is cancelled in some moment waits."""
    answer: OneShot[int] = OneShot()
    home = Home(run)
    got: list[Any] = []

    async def awaits() -> int:
        return await answer

    run.thread("home", lambda: got.append(home.perform(awaits())))
    run.thread("setter", lambda: answer.set_result(1))
    run.thread("canceller", home.cancel)

    def check() -> None:
        assert got in ([1], ["cancelled"])
        assert not answer._line

    return check


def one_shot_of_two(run: Stepping) -> Check:
    """Small enough to switch at every line: result() looks without the lock first."""
    answer: OneShot[int] = OneShot()
    got: list[int] = []
    run.thread("setter", lambda: answer.set_result(1))
    run.thread("thread", lambda: got.append(answer.result()))

    def check() -> None:
        assert got == [1]

    return check


def one_shot_set_twice(run: Stepping) -> Check:
    answer: OneShot[int] = OneShot()
    accepted: list[int] = []

    def sets(number: int) -> None:
        with contextlib.suppress(WrongState):
            answer.set_result(number)
            accepted.append(number)

    run.thread("setter", lambda: sets(1))
    run.thread("setter too", lambda: sets(2))

    def check() -> None:
        assert len(accepted) == 1, "it came twice"
        assert answer.result() == accepted[0]

    return check


def test_one_shot() -> None:
    passes(one_shot, 10)
    passes(one_shot_of_two, 5, lines=[OneShot.result])
    passes(one_shot_set_twice, 2)


@pytest.mark.parametrize(("where", "old", "new", "model"), [
    ("OneShot.set_result", "woken = self._grant_locked()", "woken = ()", one_shot_of_two),
    ("OneShot.set_result", "self._check_pending_locked()", "pass", one_shot_set_twice),
    ("OneShot.set_result", "with self._lock:", "if True:", one_shot_set_twice),
    ("Waitable._line_up", "self._grant_locked()", "()", one_shot_of_two),
], ids=["nobody is woken", "comes twice", "without the lock", "no look once in line"])
def test_one_shot_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str, model: Model
) -> None:
    mutant = put(monkeypatch, where, old, new)
    finds(model, lines=() if model is one_shot else [mutant, OneShot.result])
