"""A device that is no faster than it is told to be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from homeloop.block.device import Answer, Device
from homeloop.block.driver import Driver
from homeloop.block.filters.passing import Funnel
from homeloop.block.filters.requests import Request, perform
from homeloop.errors import UsageError

__all__ = ["Bucket", "Rate"]

_PAYLOAD = frozenset({"read", "write"})


class Bucket:
    """A token bucket as a clock: each request books the time that it costs, in the order in which they come.

    What was not used is kept for up to `burst_s` seconds. Nobody overtakes: a small request behind a large one waits
    for its turn. Home thread.
    """

    def __init__(self, per_second: float, burst_s: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst_s = burst_s
        self._clock = clock
        self._booked_until = float("-inf")                  # all that was booked will have been used up then

    def wait_s(self, amount: float) -> float:
        """Book `amount`; return the seconds until it may begin."""
        now = self._clock()
        begins = max(self._booked_until, now - self._burst_s)
        self._booked_until = begins + amount / self._per_second
        return max(0.0, begins - now)

    def give_back(self, amount: float) -> None:
        """It was booked, and will not be used after all: those that come later have it."""
        self._booked_until -= amount / self._per_second

    def is_idle(self) -> bool:
        """Could a request begin now?"""
        return self._booked_until <= self._clock()


class Rate(Funnel):
    """At most so many payload bytes, and so many requests, a second; first come, first served.

    bytes_per_s: of reads and writes. requests_per_s: of all kinds but flush, which is not held up. burst_s: what was
    not used of so much time may be used at once. None: no limit. Cancelled in its wait: what it booked is given back.
    Home thread.
    """

    def __init__(
        self,
        driver: Driver | Device,
        *,
        bytes_per_s: float | None = None,
        requests_per_s: float | None = None,
        burst_s: float = 0.1,
    ) -> None:
        for name, limit in (("bytes_per_s", bytes_per_s), ("requests_per_s", requests_per_s)):
            if limit is not None and not 0 < limit < float("inf"):
                raise UsageError(f"rate: {name}={limit} is not a number above 0")
        if not 0 <= burst_s < float("inf"):
            raise UsageError(f"rate: burst_s={burst_s} is not a time in seconds")
        super().__init__(driver)
        self._bytes = None if bytes_per_s is None else Bucket(bytes_per_s, burst_s, _now)
        self._requests = None if requests_per_s is None else Bucket(requests_per_s, burst_s, _now)

    def ask(self, request: Request) -> Answer[Any]:
        booked = [
            (bucket, amount)
            for bucket, amount in (
                (self._requests, 0 if request.kind == "flush" else 1),
                (self._bytes, request.length if request.kind in _PAYLOAD else 0),
            )
            if bucket is not None and amount
        ]
        if all(bucket.is_idle() for bucket, _ in booked):
            for bucket, amount in booked:
                bucket.wait_s(amount)
            return perform(self.inner, request)
        return self._in_turn(request, booked)

    async def _in_turn(self, request: Request, booked: list[tuple[Bucket, int]]) -> Any:
        # Booked in its first step: one that is never run costs the others nothing.
        seconds = max(bucket.wait_s(amount) for bucket, amount in booked)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            for bucket, amount in booked:
                bucket.give_back(amount)
            raise
        answer = perform(self.inner, request)
        return await answer if asyncio.iscoroutine(answer) else answer


def _now() -> float:
    """The clock of the loop that sleeps; without one, the clock that loops have."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()
