"""The end of a context under load (rules 14 and 16): no result of a worker is lost, nothing that ran is denied."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

import homeloop
from homeloop.errors import ContextClosed
from tests.core.bounded import STRESS_S, Plain, until


class Calls:
    """What ran, by number. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ran: set[int] = set()              # under _lock
        self._next = 0                          # under _lock

    def number(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def run(self, number: int) -> int:
        with self._lock:
            assert number not in self.ran, "ran twice"
            self.ran.add(number)
        if number % 7 == 0:
            raise ValueError(number)
        return number


class Submitter:
    """A coroutine that submits one call after the other until it is told that there are no more."""

    def __init__(self, calls: Calls, seed: int) -> None:
        self._calls = calls
        self._random = random.Random(seed)
        self.told: dict[int, str] = {}          # home: how each call ended for who awaited it
        self.ended = ""

    async def run(self) -> None:
        while not self.ended:
            number = self._calls.number()
            try:
                result = await homeloop.to_worker(self._calls.run, number)
                assert result == number
                self.told[number] = "result"
            except ValueError as error:
                self.told[number] = "error" if error.args == (number,) else f"wrong: {error!r}"
            except asyncio.CancelledError:
                self.told[number] = "cancelled, ran" if number in self._calls.ran else "cancelled, did not run"
                if self._random.random() < 0.5:         # clean-up goes on working: the end waits for it
                    self.ended = "went on"
                    number = self._calls.number()
                    try:
                        self.told[number] = "result" if await self._again(number) == number else "wrong"
                    except ValueError:
                        self.told[number] = "error"
                    except (ContextClosed, asyncio.CancelledError) as error:
                        self.told[number] = f"refused: {error}"
                self.ended = self.ended or "cancelled"
                raise
            except ContextClosed as error:
                self.told[number] = f"refused: {error}"
                self.ended = "refused"

    async def _again(self, number: int) -> int:
        return await homeloop.to_worker(self._calls.run, number)


@pytest.mark.stress
def test_rule16_stress_shutdown_cannot_lose_a_result(seed: int) -> None:
    """Many coroutines submit while the context is stopped: each await ends, with a result, an error, a cancellation or
    a refusal; every call that ran has told its waiter so, unless that was cancelled; what was refused did not run."""
    rnd = random.Random(seed)
    before = set(threading.enumerate())
    end = time.monotonic() + STRESS_S
    rounds = 0
    while rounds < 3 or time.monotonic() < end:
        rounds += 1
        calls = Calls()
        io = homeloop.IOThread(worker_max=rnd.choice([1, 2, 8])).start()
        submitters = [Submitter(calls, rnd.randrange(1 << 30)) for _ in range(rnd.choice([1, 5, 40]))]
        cos = [io.spawn(submitter.run()) for submitter in submitters]
        enough = rnd.randrange(60)
        until(lambda calls=calls, enough=enough: len(calls.ran) >= enough, io)     # type: ignore[misc]
        Plain(io.stop).result(io)
        told: dict[int, str] = {}
        for submitter, co in zip(submitters, cos, strict=True):
            assert co.done()
            assert co.cancelled() or co.exception() is None, repr(co)
            told |= submitter.told
        for number, how in told.items():
            if how in ("result", "error"):
                assert number in calls.ran, (number, how)
                assert (how == "error") == (number % 7 == 0)
            elif how.startswith("refused"):
                assert number not in calls.ran, (number, how)
            else:       # what is true when it is told stays true
                assert how == ("cancelled, ran" if number in calls.ran else "cancelled, did not run"), number
        assert calls.ran <= told.keys(), "ran, and nobody was told"
    assert rounds >= 3
    until(lambda: set(threading.enumerate()) <= before)
