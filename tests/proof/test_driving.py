"""Every interleaving of a drive with the home's sleep and with puts, on the real code; see test_interleavings.py."""

from __future__ import annotations

import select
import types
from collections import deque
from typing import Any

import pytest

from homeloop.core import driving
from homeloop.core.driving import Driving
from homeloop.core.inbox import Inbox
from tests.proof.stepping import StepLock, Stepping, mutated
from tests.proof.test_notify import Check, Kicks, finds, passes

pytestmark = [
    pytest.mark.skipif(not hasattr(select, "epoll"), reason="a loop can be driven where it has epoll"),
    pytest.mark.usefixtures("stepped_epoll"),
]


class OuterEpoll:
    """Stands in for the epoll that the home sleeps on: one entry, which may be masked. timer: the first sleep may
    end at any moment at which no event ends it."""

    timer = False

    def __init__(self) -> None:
        self.masked = False
        self._inner: Any = None
        self._timer = self.timer

    def register(self, inner: Any, _events: int) -> None:
        self._inner = inner

    def modify(self, _inner: Any, events: int) -> None:
        self.masked = not events

    def poll(self, _timeout: float | None, _maxevents: int) -> None:
        assert Stepping.current is not None
        timer, self._timer = self._timer, False
        Stepping.current.until("asleep outside", lambda: self._inner if not self.masked else timer)


@pytest.fixture
def stepped_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "select", types.SimpleNamespace(epoll=OuterEpoll, EPOLLIN=select.EPOLLIN))


class BigStepLock(StepLock):
    name = "big lock"


class OuterEpollWithTimer(OuterEpoll):
    timer = True


def drive_until_taken(
    run: Stepping, inbox: Inbox, big_lock: StepLock, taken: deque[Any], signals: list[int]
) -> None:
    """What a driver does between begin() and end()."""
    while not taken:
        with inbox.lock:
            asleep = inbox.begin_sleep_locked()
            if asleep:
                big_lock.release()
        if asleep:
            run.until("asleep inside", lambda: signals)
            with inbox.lock:
                inbox.end_sleep_locked()
            big_lock.acquire()
        inbox.take(taken)


def drive(run: Stepping, *, puts: int = 2) -> Check:
    """A home that sleeps outside; a thread that drives until it has taken something; one that notifies, then puts."""
    kicks = Kicks(run)
    inbox, signals = kicks.inbox, kicks.signals
    big_lock = BigStepLock()
    state = Driving(inbox, signals)         # the list stands for the loop's epoll: not empty is readable
    taken: deque[Any] = deque()

    def home() -> None:
        big_lock.acquire()
        while len(taken) < puts:
            with inbox.lock:
                asleep = inbox.begin_sleep_locked()
                if asleep:
                    state.fall_asleep_locked()
                    big_lock.release()
            if asleep:
                state.sleep(None)
                with inbox.lock:
                    state.wake_up_locked()
                big_lock.acquire()
            inbox.take(taken)
        big_lock.release()

    def drives() -> None:
        big_lock.acquire()
        if state.begin():
            drive_until_taken(run, inbox, big_lock, taken, signals)
        state.end()
        with inbox.lock:
            big_lock.release()
            if len(taken) == puts:
                inbox.kick_locked()         # as who lets the big lock go: the home would now do something

    def produces() -> None:
        if puts == 1:
            inbox.notify()
        for number in range(puts):
            inbox.put(number)

    run.thread("home", home)
    run.thread("driver", drives)
    run.thread("producer", produces)

    def check() -> None:
        assert list(taken) == list(range(puts))
        assert (state.driver, state._masked, inbox._sleepers) == (0, False, 0), (state.driver, inbox._sleepers)
        kicks.check()

    return check


@pytest.fixture
def with_timer(monkeypatch: pytest.MonkeyPatch, stepped_epoll: None) -> None:
    driving.select.epoll = OuterEpollWithTimer  # type: ignore[misc,assignment]


def drive_beside_a_timer(run: Stepping) -> Check:
    return drive(run, puts=1)


def test_drive() -> None:
    passes(drive, 100)


@pytest.mark.usefixtures("with_timer")
def test_drive_beside_a_timer() -> None:
    passes(drive_beside_a_timer, 100)


@pytest.mark.parametrize(("owner", "where", "old", "new"), [
    (Driving, "end", "self._outer.modify(self._inner, select.EPOLLIN)", "pass"),
    (Driving, "end", "inbox.count_again_locked()", "pass"),
    (Inbox, "count_again_locked", "if self.entries:", "if False:"),
    (Inbox, "leave_out_locked", "self._sleepers -= 1", "pass"),
    (Driving, "begin", "self._masked = True", "pass"),
    (Driving, "begin", "self._outer.modify(self._inner, 0)", "pass"),
], ids=["not unmasked", "not counted again", "not kicked again", "counted while masked", "counted out twice",
        "not masked"])
def test_drive_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, owner: Any, where: str, old: str, new: str
) -> None:
    monkeypatch.setattr(owner, where, mutated(getattr(owner, where), old, new))
    finds(drive)


@pytest.mark.usefixtures("with_timer")
@pytest.mark.parametrize(("where", "old", "new"), [
    ("fall_asleep_locked", "if self.driver:", "if False:"),
    ("fall_asleep_locked", "if self.driver:", "if self.driver and not self._inbox._kicked:"),
    ("wake_up_locked", "self._masked = False", "pass"),
], ids=["asleep beside a driver and counted", "counted for a kick that is another's", "masked for ever"])
def test_drive_beside_a_timer_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str
) -> None:
    monkeypatch.setattr(Driving, where, mutated(getattr(Driving, where), old, new))
    finds(drive_beside_a_timer)
