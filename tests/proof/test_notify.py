"""Every interleaving of the notify protocol (rule 7): put against begin_sleep and end_sleep; and its mutants.

tests/proof/test_interleavings.py has the other protocols, and says how.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

import pytest

from homeloop.core.inbox import Inbox
from tests.proof.stepping import Check, Stepping, StepRLock, finds, mutated, passes


class Kicks:
    """Stands for the eventfd. A kick takes a step of its own: it may come behind the lock."""

    def __init__(self, run: Stepping) -> None:
        self._run = run
        self.signals: list[int] = []
        self.inbox = Inbox("model", self._kick, self._settle)
        self.inbox.lock = StepRLock()  # type: ignore[assignment]

    def _kick(self) -> None:
        self._run.point("kick")
        self.signals.append(1)

    def _settle(self) -> None:
        if not self.signals:
            raise BlockingIOError       # as the eventfd's read does
        self.signals.clear()

    def check(self) -> None:
        assert not self.signals or self.inbox._kicked, "a kick was left behind, which nobody takes back"
        assert len(self.signals) <= 1


def notify(run: Stepping) -> Check:
    """Two producers that put twice, a home that sleeps whenever it may."""
    kicks = Kicks(run)
    inbox, signals = kicks.inbox, kicks.signals
    taken: deque[Any] = deque()

    def home() -> None:
        while len(taken) < 3:
            if inbox.begin_sleep():
                run.until("asleep", lambda: signals)
                inbox.end_sleep()
            inbox.take(taken)

    def puts_under_the_lock() -> None:
        with inbox.lock:
            inbox.put_locked("b1")

    run.thread("home", home)
    run.thread("producer a", lambda: [inbox.put(entry) for entry in ("a1", "a2")])
    run.thread("producer b", puts_under_the_lock)

    def check() -> None:
        assert sorted(taken) == ["a1", "a2", "b1"]
        assert taken.index("a1") < taken.index("a2")
        kicks.check()
        assert inbox.kicks <= 3

    return check


NOTIFY_LINES = (Inbox.begin_sleep_locked, Inbox.end_sleep_locked, Inbox.put)


def test_notify() -> None:
    passes(notify, 100)
    passes(wakes_by_itself, 20)
    passes(ctrl_c, 20)
    passes(one_producer, 2, lines=NOTIFY_LINES)


def wakes_by_itself(run: Stepping) -> Check:
    """A home whose first sleep may end without a kick, by a timer: a kick that was decided on comes later."""
    kicks = Kicks(run)
    inbox, signals = kicks.inbox, kicks.signals
    taken: deque[Any] = deque()

    def home() -> None:
        if inbox.begin_sleep():
            run.point("asleep")
            inbox.end_sleep()
        while len(taken) < 2:
            inbox.take(taken)
            if len(taken) < 2 and inbox.begin_sleep():
                run.until("asleep", lambda: signals)
                inbox.end_sleep()

    run.thread("home", home)
    run.thread("producer a", lambda: inbox.put("a"))
    run.thread("producer b", lambda: inbox.put("b"))

    def check() -> None:
        assert sorted(taken) == ["a", "b"]
        kicks.check()

    return check


class Interrupted(deque[Any]):
    """The entries of an inbox: a Ctrl-C comes just behind the append of "b", before its producer has decided."""

    def append(self, entry: Any, /) -> None:
        super().append(entry)
        if entry == "b":
            raise KeyboardInterrupt


def ctrl_c(run: Stepping) -> Check:
    """A put that a Ctrl-C leaves in the middle, beside one whose kick may be on its way."""
    kicks = Kicks(run)
    inbox, signals = kicks.inbox, kicks.signals
    inbox.entries = Interrupted()
    taken: deque[Any] = deque()

    def home() -> None:
        if inbox.begin_sleep():
            run.point("asleep")
            inbox.end_sleep()
        while len(taken) < 2:
            if inbox.begin_sleep():
                run.until("asleep", lambda: signals)
                inbox.end_sleep()
            inbox.take(taken)
            inbox.entries = Interrupted(inbox.entries)      # no step of its own

    def is_interrupted() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            inbox.put("b")

    run.thread("home", home)
    run.thread("producer a", lambda: inbox.put("a"))
    run.thread("producer b", is_interrupted)

    def check() -> None:
        assert sorted(taken) == ["a", "b"]
        assert not signals or inbox._kicked, "a kick was left behind, which nobody takes back"

    return check


def one_producer(run: Stepping) -> Check:
    """The same with one put, small enough to switch at every line."""
    kicks = Kicks(run)
    inbox = kicks.inbox
    taken: deque[Any] = deque()

    def home() -> None:
        while not taken:
            if inbox.begin_sleep():
                run.until("asleep", lambda: kicks.signals)
                inbox.end_sleep()
            inbox.take(taken)

    run.thread("home", home)
    run.thread("producer", lambda: inbox.put("a"))
    return kicks.check


@pytest.mark.parametrize(("where", "old", "new"), [
    ("begin_sleep_locked", "if self.entries:", "if False:"),
    ("put_locked", "if self._sleepers and not self._kicked:", "if False:"),
    ("put", "if not self._sleepers or self._kicked:", "if True:"),
    ("end_sleep_locked", "self._kicked = 0", "pass"),
    ("end_sleep_locked", "self._settle()", "pass"),
    ("take", "batch, self.entries = self.entries, deque()", "batch = self.entries"),
], ids=["no look before the sleep", "no kick", "no kick behind the lock", "kicked for ever",
        "kick not taken back", "taken twice"])
def test_notify_without_the_crucial_line(monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str) -> None:
    monkeypatch.setattr(Inbox, where, mutated(getattr(Inbox, where), old, new))
    finds(notify)


@pytest.mark.parametrize(("where", "old", "new"), [
    ("put", "self._kick_after_all_locked()", "pass"),
    ("_kick_after_all_locked", "mine = self._kicked == get_ident()", "mine = bool(self._kicked)"),
], ids=["no kick on the way out", "another's kick repeated"])
def test_notify_with_a_ctrl_c_without_the_crucial_line(
    monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str
) -> None:
    monkeypatch.setattr(Inbox, where, mutated(getattr(Inbox, where), old, new))
    finds(ctrl_c)


def test_notify_leaves_a_kick_owed_that_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for settled, it would end every sleep that comes, and nobody would take it back."""
    mutant = mutated(Inbox.end_sleep_locked, "return\n", "pass\n")
    monkeypatch.setattr(Inbox, "end_sleep_locked", mutant)
    finds(wakes_by_itself)


def test_notify_needs_its_order_where_there_is_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look before the announcement, and both without the lock: the classic lost wake."""
    naive = mutated(Inbox.begin_sleep, "with self.lock:\n        return self.begin_sleep_locked()",
                    "if self.entries:\n        return False\n    self._sleepers += 1\n    return True")
    monkeypatch.setattr(Inbox, "begin_sleep", naive)
    finds(one_producer, lines=[naive, *NOTIFY_LINES])
