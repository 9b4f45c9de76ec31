"""The scheduler itself: it runs all interleavings, no more, and finds what only one of them shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.proof.stepping import Broken, StepLock, Stepping, StepRLock, explore, mutated


def test_every_interleaving_of_two_times_two_steps() -> None:
    seen: set[str] = set()

    def model(run: Stepping) -> Callable[[], None]:
        log: list[str] = []

        def steps(*names: str) -> None:
            for name in names:
                run.point(name)         # what follows belongs to the step
                log.append(name)

        run.thread("first", lambda: steps("a", "b"))
        run.thread("second", lambda: steps("1", "2"))
        return lambda: seen.add("".join(log))

    assert explore(model) == 6          # C(4, 2)
    assert seen == {"ab12", "a1b2", "a12b", "1ab2", "1a2b", "12ab"}


class Counter:
    def __init__(self) -> None:
        self.lock = StepLock()
        self.value = 0

    def add(self) -> None:
        with self.lock:
            value = self.value
            self.value = value + 1


def adds(add: Callable[[Counter], None]) -> Callable[[Stepping], Callable[[], None]]:
    def model(run: Stepping) -> Callable[[], None]:
        counter = Counter()
        for name in ("first", "second"):
            run.thread(name, lambda: add(counter))

        def check() -> None:
            assert counter.value == 2, f"{counter.value} of 2 additions"

        return check

    return model


def test_a_lost_update_is_found_when_the_lock_is_taken_away() -> None:
    explore(adds(Counter.add), lines=[Counter.add])
    naive = mutated(Counter.add, "with self.lock:", "if True:")
    with pytest.raises(Broken, match="1 of 2 additions"):
        explore(adds(naive), lines=[naive])


def test_a_deadlock_is_found_and_drawn() -> None:
    def model(run: Stepping) -> Callable[[], None]:
        one, other = StepLock(), StepRLock()

        def takes(first: StepLock, second: StepLock) -> None:
            with first, second:
                pass

        run.thread("this way", lambda: takes(one, other))
        run.thread("that way", lambda: takes(other, one))
        return lambda: None

    with pytest.raises(Broken, match="nobody can go on") as broken:
        explore(model)
    assert "this way waits, that way waits" in str(broken.value)


def test_a_time_out_happens_at_every_moment() -> None:
    seen: set[bool] = set()

    def model(run: Stepping) -> Callable[[], None]:
        lock = StepLock()

        def hold() -> None:
            with lock:
                run.point("holds it")

        def ask() -> None:
            got = lock.acquire(timeout=1.0)
            seen.add(got)
            if got:
                lock.release()

        run.thread("holder", hold)
        run.thread("asker", ask)
        return lambda: None

    explore(model)
    assert seen == {True, False}


def test_what_a_thread_raises_is_the_failure() -> None:
    def model(run: Stepping) -> Callable[[], None]:
        run.thread("breaks", lambda: 1 // 0)
        run.thread("waits", lambda: run.until("for ever", lambda: False))
        return lambda: None

    with pytest.raises(Broken, match="breaks raised ZeroDivisionError"):
        explore(model)


def test_a_mutant_that_is_out_of_date_says_so() -> None:
    with pytest.raises(AssertionError, match="out of date"):
        mutated(Counter.add, "with self.mutex:", "if True:")
