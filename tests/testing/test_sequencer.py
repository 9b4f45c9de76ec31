"""Steps happen in their order; who waits in vain learns who is where."""

from __future__ import annotations

import threading

import pytest

from homeloop.testing.sequencer import Sequencer
from tests.core.bounded import Plain, until


def test_steps_happen_in_the_order_given() -> None:
    log: list[str] = []
    sequencer = Sequencer("a", "b", "c", "d")

    def takes(*names: str) -> None:
        for name in names:
            with sequencer.step(name):
                log.append(name)

    threads = [Plain(takes, "b", "d"), Plain(takes, "a", "c")]
    for thread in threads:
        thread.result()
    sequencer.wait_all()
    assert log == ["a", "b", "c", "d"]


def test_a_step_ends_with_its_block() -> None:
    sequencer = Sequencer("first", "second")
    inside, let_go = threading.Event(), threading.Event()
    log: list[str] = []

    def first() -> None:
        with sequencer.step("first"):
            inside.set()
            assert let_go.wait(10)
            log.append("first")

    def second() -> None:
        assert inside.wait(10)
        sequencer.reach("second")
        log.append("second")

    threads = [Plain(first), Plain(second)]
    until(lambda: sequencer._waiting)
    let_go.set()
    for thread in threads:
        thread.result()
    assert log == ["first", "second"]


def test_a_step_that_never_comes_says_who_is_where() -> None:
    sequencer = Sequencer("never", "mine", limit_s=0.05)
    with pytest.raises(AssertionError, match="'mine' did not come within") as failure:
        sequencer.reach("mine")
    assert "due: never" in str(failure.value)
    assert "waits for 'mine'" in str(failure.value)
    with pytest.raises(AssertionError, match="the end"):
        sequencer.wait_all()


def test_a_step_that_raises_breaks_the_sequence() -> None:
    sequencer = Sequencer("a", "b")
    waiter = Plain(sequencer.reach, "b")
    with pytest.raises(ZeroDivisionError), sequencer.step("a"):
        raise ZeroDivisionError("oops")
    with pytest.raises(AssertionError, match="step 'a' raised ZeroDivisionError: oops"):
        waiter.result()


def test_misuse_is_named() -> None:
    sequencer = Sequencer("a", "b")
    sequencer.reach("a")
    with pytest.raises(AssertionError, match="'a' comes a second time"):
        sequencer.reach("a")
    with pytest.raises(ValueError, match="no step 'c'"):
        sequencer.reach("c")
    with pytest.raises(ValueError, match="named twice"):
        Sequencer("a", "a")
