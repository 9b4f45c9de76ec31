"""The inbox: order, the notify protocol (rule 7), signal handlers, the end."""

from __future__ import annotations

import linecache
import os
import random
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import homeloop
from homeloop.core import inbox as inbox_module
from homeloop.core.inbox import Inbox
from homeloop.errors import ContextClosed
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, asleep, in_plain_thread, until, wait


class Sleep:
    """What a kick ends, and settling takes back; counts both."""

    def __init__(self) -> None:
        self.kicks = 0
        self.settled = 0
        self.ended = threading.Event()

    def kick(self) -> None:
        self.kicks += 1
        self.ended.set()

    def settle(self) -> None:
        if not self.ended.is_set():
            raise BlockingIOError       # the kick is on its way
        self.settled += 1
        self.ended.clear()


def fresh() -> tuple[Inbox, Sleep]:
    sleep = Sleep()
    return Inbox("box", sleep.kick, sleep.settle), sleep


def taken(inbox: Inbox) -> list[object]:
    entries: deque[object] = deque()
    inbox.take(entries)
    return list(entries)


# Order


def test_entries_are_taken_once_in_the_order_of_the_puts() -> None:
    inbox, _ = fresh()
    for entry in range(5):
        inbox.put(entry)
    assert taken(inbox) == [0, 1, 2, 3, 4]
    assert taken(inbox) == []


def test_take_appends_behind_what_is_there() -> None:
    inbox, _ = fresh()
    ready: deque[object] = deque(["ready"])
    inbox.put("new")
    inbox.take(ready)
    assert list(ready) == ["ready", "new"]


# Rule 7


def test_rule7_puts_while_awake_make_no_system_call() -> None:
    """Nobody sleeps: no put kicks, however many."""
    inbox, sleep = fresh()
    for entry in range(1000):
        inbox.put(entry)
    assert sleep.kicks == inbox.kicks == 0


def test_rule7_one_kick_per_sleep() -> None:
    """The first put into a sleep kicks; those behind it count on that kick; the next sleep has a kick of its own."""
    inbox, sleep = fresh()
    for sleeps in range(1, 4):
        assert inbox.begin_sleep()
        assert sleep.kicks == sleeps - 1
        for entry in range(100):
            inbox.put(entry)
        assert sleep.kicks == inbox.kicks == sleeps
        inbox.end_sleep()
        assert sleep.settled == sleeps
        assert len(taken(inbox)) == 100


def test_rule7_puts_between_the_end_of_a_sleep_and_the_take_do_not_kick() -> None:
    """The home is awake and will look: the put is in its next take()."""
    inbox, sleep = fresh()
    assert inbox.begin_sleep()
    inbox.end_sleep()
    inbox.put("late")
    assert sleep.kicks == sleep.settled == 0
    assert taken(inbox) == ["late"]


def test_rule7_a_put_between_the_look_and_the_sleep_is_seen() -> None:
    """The home looks, finds nothing, announces its sleep, and looks again: what came in between is not slept over.

        home                        producer
        ----                        --------
        1 looks: empty
                                    2 put(): nobody asleep, no kick
        3 begin_sleep(): False
    """
    inbox, sleep = fresh()
    assert not inbox.entries
    inbox.put("between")
    assert not inbox.begin_sleep()
    assert not inbox.sleeping()
    assert sleep.kicks == 0
    assert taken(inbox) == ["between"]
    assert inbox.begin_sleep()                  # and the refused one has left nothing behind
    inbox.put("now")
    assert sleep.kicks == 1


def test_rule7_a_sleep_that_nobody_ended_settles_nothing() -> None:
    """A sleep that ended by itself has no kick to take back: settling would block, or eat the next one."""
    inbox, sleep = fresh()
    assert inbox.begin_sleep()
    inbox.end_sleep()
    assert sleep.settled == 0


def test_rule7_notify_ends_a_sleep_and_queues_nothing() -> None:
    """A bare notification: one kick per sleep, shared with the puts; none while awake."""
    inbox, sleep = fresh()
    inbox.notify()
    assert sleep.kicks == 0
    assert inbox.begin_sleep()
    inbox.notify()
    inbox.notify()
    inbox.put("with it")
    assert sleep.kicks == inbox.kicks == 1
    inbox.end_sleep()
    assert taken(inbox) == ["with it"]


def test_rule7_a_kick_ends_the_sleep_of_all() -> None:
    """The home sleeps and one who stands in for it does: the kick is taken back when both are up, not before.

    They wait on the same descriptor, where the kernel wakes one; a kick that this one takes back leaves the other
    asleep, whatever it waits for.
    """
    inbox, sleep = fresh()
    assert inbox.begin_sleep()
    assert inbox.begin_sleep()
    inbox.put("first")
    inbox.end_sleep()
    assert (sleep.kicks, sleep.settled) == (1, 0)
    assert inbox.sleeping()
    inbox.put("second")                         # counts on the same kick
    assert sleep.kicks == 1
    inbox.end_sleep()
    assert sleep.settled == 1
    assert not inbox.sleeping()
    assert taken(inbox) == ["first", "second"]
    assert inbox.begin_sleep()                  # and the next sleep has one of its own
    inbox.put("third")
    assert sleep.kicks == 2


def test_rule7_a_foreign_loop_is_kicked_once_per_batch() -> None:
    """A loop of another make does not say when it sleeps: the first put after each take kicks."""
    inbox, sleep = fresh()
    inbox.serve_foreign(lambda: False)
    inbox.put(1)
    inbox.put(2)
    assert sleep.kicks == 1
    with inbox.lock:
        assert taken(inbox) == [1, 2]
        inbox.rearm()
    inbox.put(3)
    assert sleep.kicks == 2


def test_rule7_wakes_into_a_busy_context_make_no_system_call() -> None:
    """The same through the public door: n posts and wakes into a loop that runs cost none, into one asleep one."""
    async def sleeper() -> None:
        while True:
            await homeloop.park()

    async def busy() -> None:
        in_plain_thread(many)

    def many() -> None:
        for co in cos:
            co.wake()
            io.post(seen.append, None)

    seen: list[None] = []
    with homeloop.IOThread() as io:
        cos = [io.spawn(sleeper()) for _ in range(50)]
        asleep(io.context)
        before = io.context.statistics().kicks
        busy_one = io.context.create(busy())
        busy_one.wake()                         # the one kick
        busy_one.result(LIMIT_S)
        asleep(io.context)                      # a second one, its own
        assert len(seen) == 50
        assert io.context.statistics().kicks - before <= 2


# Signal handlers: put() from inside any of its methods, on the same thread


def test_a_signal_handler_may_put_while_its_thread_is_inside_the_inbox() -> None:
    """A handler runs between two bytecodes of the home, perhaps inside take(): nothing hangs, nothing is lost."""
    inbox, sleep = fresh()
    handled = 0
    home: list[object] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal handled
        inbox.put(("signal", handled))
        handled += 1

    old = signal.signal(signal.SIGUSR1, on_signal)
    main = threading.main_thread().ident
    assert main is not None
    stop = threading.Event()

    def shoot() -> None:
        while not stop.wait(0.0002):
            signal.pthread_kill(main, signal.SIGUSR1)

    try:
        shooter = Plain(shoot)
        for number in range(20_000):
            inbox.put(("home", number))
            if inbox.begin_sleep():
                inbox.end_sleep()
            home += taken(inbox)
        stop.set()
        shooter.result()
    finally:
        stop.set()
        signal.signal(signal.SIGUSR1, old)
    home += taken(inbox)
    assert [n for who, n in home if who == "home"] == list(range(20_000))       # type: ignore[misc]
    assert [n for who, n in home if who == "signal"] == list(range(handled))    # type: ignore[misc]
    assert handled > 0
    assert sleep.kicks - sleep.settled in (0, 1)        # one: it came inside a begin_sleep() that was refused for it


# Ctrl-C: a handler that raises


def interrupted_at(place: int, fn: Callable[[], object]) -> bool:
    """Run fn and raise KeyboardInterrupt at the place-th line of inbox.py that it comes to, or before a kick.

    False: it came to fewer. Not where a `with` block ends: Python does not look at signals there.
    """
    left = place

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal left
        code = frame.f_code
        if code.co_filename != inbox_module.__file__ and code is not Sleep.kick.__code__:
            return None
        line = linecache.getline(code.co_filename, frame.f_lineno).strip()
        if event in ("call", "line") and not line.startswith("with "):
            left -= 1
            if not left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        fn()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


@pytest.mark.parametrize("method", ["put", "put_locked", "notify"])
def test_rule7_ctrl_c_between_a_decision_and_its_kick_loses_no_later_wake(method: str) -> None:
    """Wherever it comes: what was queued has its kick, the next put arrives, and no kick is left behind."""
    place = kicks = 0
    while True:
        place += 1
        inbox, sleep = fresh()
        assert inbox.begin_sleep()

        def puts(inbox: Inbox = inbox) -> None:
            if method == "notify":
                inbox.notify()
            elif method == "put":
                inbox.put("interrupted")
            else:
                with inbox.lock:
                    inbox.put_locked("interrupted")

        if not interrupted_at(place, puts):
            break
        kicks += sleep.ended.is_set()
        assert sleep.ended.is_set() or not inbox.entries, f"asleep beside an entry, place {place}"
        in_plain_thread(inbox.put, "later")
        assert sleep.ended.is_set(), f"no kick, place {place}"
        assert inbox.kick_is_owed()
        for _ in range(2):
            inbox.end_sleep()
            assert not sleep.ended.is_set(), f"a kick that nobody takes back, place {place}"
            assert not inbox.kick_is_owed()
            assert taken(inbox)[-1] == "later"
            assert inbox.begin_sleep()
            inbox.put("later")
            assert sleep.ended.is_set(), f"the next kick is lost, place {place}"
    assert place > 5
    assert kicks > 1


@pytest.mark.parametrize("when", ["before", "behind"])
def test_rule7_ctrl_c_while_a_kick_is_taken_back(when: str) -> None:
    """Whether it was or not: the next sleep ends at once and settles it, and the wakes after that arrive."""
    inbox, sleep = fresh()
    settle = sleep.settle

    def interrupted() -> None:
        inbox._settle = settle
        if when == "behind":
            settle()
        raise KeyboardInterrupt

    assert inbox.begin_sleep()
    inbox.put("one")
    inbox._settle = interrupted
    with pytest.raises(KeyboardInterrupt):
        inbox.end_sleep()
    assert taken(inbox) == ["one"]
    assert inbox.begin_sleep()
    assert sleep.ended.is_set()
    inbox.end_sleep()
    assert inbox.begin_sleep()
    assert not sleep.ended.is_set()
    inbox.put("two")
    assert sleep.ended.is_set()


# The end


def test_puts_after_the_end_are_refused_by_name() -> None:
    inbox, sleep = fresh()
    inbox.put("left")
    assert inbox.close() == ["left"]
    with pytest.raises(ContextClosed, match="box"):
        inbox.put("late")
    inbox.notify()
    assert sleep.kicks == 0
    assert inbox.close() == []


def test_close_if_empty_lets_nothing_fall_between() -> None:
    """It refuses to close over an entry, and closes only with the door shut behind it."""
    inbox, _ = fresh()
    inbox.put("one")
    assert not inbox.close_if_empty()
    inbox.put("two")
    assert taken(inbox) == ["one", "two"]
    assert inbox.close_if_empty()
    with pytest.raises(ContextClosed):
        inbox.put("three")


# Conservation


@pytest.mark.stress
def test_rule7_stress_nothing_lost_one_kick_per_sleep(seed: int) -> None:
    """Producers that pause at random, a home that sleeps: every entry arrives once, in its producer's order."""
    producers, each = 4, int(25_000 * STRESS_S)
    sleep = Sleep()
    inbox = Inbox("box", sleep.kick, sleep.settle)
    sleeps = 0
    arrived: list[list[int]] = [[] for _ in range(producers)]
    begin = threading.Barrier(producers + 1)

    def produce(who: int) -> None:
        pause = random.Random(seed + who)
        wait(begin)
        for number in range(each):
            inbox.put((who, number))
            if pause.random() < 0.05:           # let the home run dry, so that it does sleep
                until(lambda: not inbox.entries)

    def consume() -> None:
        nonlocal sleeps
        wait(begin)
        while sum(map(len, arrived)) < producers * each:
            if inbox.begin_sleep():
                sleeps += 1
                wait(sleep.ended)               # a lost kick ends here
                inbox.end_sleep()
            for who, number in taken(inbox):    # type: ignore[misc]
                arrived[who].append(number)

    threads = [Plain(produce, who) for who in range(producers)] + [Plain(consume)]
    for thread in threads:
        thread.result()
    assert arrived == [list(range(each))] * producers
    assert sleep.kicks == sleep.settled == inbox.kicks == sleeps
    assert sleeps > 10


def test_a_kick_that_comes_late_is_waited_for_by_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has decided to kick and not done it yet; the loop is closed. The kick must not go into another file.

    a thread                            who closes the loop
    1 put(): the home sleeps
                                        2 the sleep ends by itself
                                        3 close(): waits
    4 kick
                                        5 closes the eventfd
    """
    loop = homeloop.new_event_loop()
    inbox = loop.inbox                  # type: ignore[attr-defined]
    decided, go, log = threading.Event(), threading.Event(), []
    kick = inbox._kick

    def late() -> None:
        decided.set()
        wait(go)
        log.append("kick")
        kick()

    class Poll:
        def __init__(self) -> None:
            self._poll = real_poll()
            self.register = self._poll.register

        def poll(self, timeout: float) -> object:
            go.set()
            return self._poll.poll(timeout)

    if not hasattr(os, "eventfd"):
        pytest.skip("no eventfd here")
    real_poll = select.poll
    monkeypatch.setattr(inbox, "_kick", late)
    assert inbox.begin_sleep()
    putter = Plain(inbox.put, loop.call_soon(lambda: None))
    wait(decided)
    inbox.end_sleep()
    monkeypatch.setattr(select, "poll", Poll)
    loop.close()
    log.append("closed")
    go.set()
    putter.result()
    assert log == ["kick", "closed"]
