"""A thread that ends while it holds the big lock: the lock is handed on, and the loop's handler is told by whom."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Any

import pytest

import homeloop
from homeloop.core import current
from tests.core.bounded import Plain, acquired, asleep, until, usable, wait, waiting


def dies_with_it(rt: homeloop.Runtime, before: Callable[[], Any]) -> None:
    rt.big_lock.acquire()
    before()


@pytest.mark.parametrize("waiter", [False, True])
def test_rule8_a_thread_ends_while_it_holds_the_big_lock(waiter: bool) -> None:
    """Who waits has it next, the main loop goes on, and the text names the thread."""
    told = threading.Event()
    messages: list[str] = []

    def handler(_loop: Any, what: dict[str, Any]) -> None:
        messages.append(what["message"])
        told.set()

    def before() -> None:
        if waiter:
            until(lambda: waiting(rt.big_lock) > 0, rt.big_lock)

    def takes() -> str:
        acquired(rt.big_lock)
        rt.big_lock.release()
        return "had it"

    with homeloop.Runtime() as rt:
        rt.main.loop.set_exception_handler(handler)
        asleep(rt.main)
        dying = threading.Thread(target=dies_with_it, args=(rt, before), name="the dying one")
        dying.start()
        if waiter:
            assert Plain(takes).result(rt.big_lock) == "had it"
        dying.join()
        wait(told, rt.big_lock)
        usable(rt)
        assert "'the dying one'" in messages[0]
        assert len(messages) == 1


def test_rule8_a_thread_that_python_did_not_start() -> None:
    told = threading.Event()
    with homeloop.Runtime() as rt:
        rt.main.loop.set_exception_handler(lambda loop, what: told.set())
        asleep(rt.main)
        _thread.start_new_thread(dies_with_it, (rt, int))
        wait(told, rt.big_lock)
        usable(rt)


def test_rule8_two_locks_at_once() -> None:
    told = threading.Semaphore(0)
    with homeloop.Runtime() as one, homeloop.Runtime() as two:
        for rt in (one, two):
            rt.main.loop.set_exception_handler(lambda loop, what: told.release())
            asleep(rt.main)
        thread = threading.Thread(target=dies_with_it, args=(one, two.big_lock.acquire))
        thread.start()
        thread.join()
        for rt in (one, two):
            assert told.acquire(timeout=10)
            usable(rt)


def test_rule8_a_thread_that_let_go_is_not_mentioned() -> None:
    messages: list[Any] = []
    with homeloop.Runtime() as rt:
        rt.main.loop.set_exception_handler(lambda loop, what: messages.append(what))
        thread = threading.Thread(target=dies_with_it, args=(rt, rt.big_lock.release))
        thread.start()
        thread.join()
        usable(rt)
    assert messages == []


def test_at_the_end_of_the_interpreter_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the main thread may go when the names of modules are gone already."""
    asked: list[str] = []
    monkeypatch.setattr(current, "at_thread_end", [asked.append])
    act = current._LastAct()
    act.__del__(lambda: True)
    assert asked == []
    act.__del__(lambda: False)
    assert asked == [threading.current_thread().name]
