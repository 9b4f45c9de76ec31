"""The life of a device: open, closing, closed; and the wait until nothing is in flight."""

from __future__ import annotations

import asyncio
import enum

from homeloop.block.calling import Method, Turns
from homeloop.block.counting import Counts
from homeloop.errors import BlockError

__all__ = ["Age", "Life", "State"]


class State(enum.Enum):
    """open: takes requests. closing: refuses new ones, the others end. closed: so is the driver."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Age:
    """The requests that began between two turn_over()."""

    __slots__ = ("ended", "in_flight")

    def __init__(self) -> None:
        self.in_flight = 0
        self.ended: asyncio.Future[None] | None = None      # somebody waits for the last of them


class Life:
    """Who is in flight, and what that holds up. Home thread only."""

    def __init__(self, counts: Counts) -> None:
        self.state = State.OPEN
        self._counts = counts
        self._drainers: list[asyncio.Future[None]] = []     # one for each drain() that waits
        self._ages = [Age()]                                # the last is the one that requests begin in
        self._close_turns = Turns()

    def begin(self) -> Age:
        """Count a request in. Hand what this returns to end()."""
        counts = self._counts
        counts.waited += 1
        counts.in_flight += 1
        if counts.in_flight > counts.in_flight_max:
            counts.in_flight_max = counts.in_flight
        age = self._ages[-1]
        age.in_flight += 1
        return age

    def end(self, age: Age) -> None:
        """Count a request out."""
        age.in_flight -= 1
        if age.ended is not None and not age.in_flight and not age.ended.done():
            age.ended.set_result(None)
        counts = self._counts
        counts.in_flight -= 1
        assert counts.in_flight >= 0, f"{counts.in_flight} requests in flight"
        if counts.in_flight == 0:
            for idle in self._drainers:
                if not idle.done():                 # done: its drain() was cancelled
                    idle.set_result(None)

    async def drain(self) -> None:
        """See Device.drain."""
        while self._counts.in_flight:
            idle = asyncio.get_running_loop().create_future()
            self._drainers.append(idle)
            try:
                await idle
            finally:
                if idle in self._drainers:
                    self._drainers.remove(idle)

    async def turn_over(self) -> None:
        """Wait for the requests that are in flight now, and not for those that begin from here on."""
        self._ages.append(Age())
        # One that was cancelled here before has left ages behind that have not ended.
        while len(self._ages) > 1:
            age = self._ages[0]
            if age.in_flight:
                age.ended = asyncio.get_running_loop().create_future()
                await age.ended
            self._ages.remove(age)

    async def close(self, flush: Method | None, close: Method | None) -> None:
        """See Device.close. flush: the driver's, if changes are possible."""
        if self.state is State.OPEN:
            self.state = State.CLOSING
        await self._close_turns.take()
        try:
            if self.state is State.CLOSED:
                return
            await self.drain()
            failed = [error for error in (await _failure_of(flush), await _failure_of(close)) if error is not None]
            self.state = State.CLOSED
            if failed:
                raise failed[0]
        finally:
            self._close_turns.give()


async def _failure_of(method: Method | None) -> BlockError | None:
    """Call a method without arguments, if there is one; return its BlockError if it fails."""
    if method is None:
        return None
    try:
        await method.call()
    except BlockError as error:
        return error
    return None
