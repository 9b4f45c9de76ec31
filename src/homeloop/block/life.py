"""The life of a device: open, closing, closed; and the wait until nothing is in flight."""

from __future__ import annotations

import asyncio
import enum

from homeloop.block.calling import Method, Turns
from homeloop.block.counting import Counts
from homeloop.errors import BlockError

__all__ = ["Life", "State"]


class State(enum.Enum):
    """open: takes requests. closing: refuses new ones, the others end. closed: so is the driver."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Life:
    """Who is in flight, and what that holds up. Home thread only."""

    def __init__(self, counts: Counts) -> None:
        self.state = State.OPEN
        self._counts = counts
        self._drainers: list[asyncio.Future[None]] = []     # one for each drain() that waits
        self._close_turns = Turns()

    def begin(self) -> None:
        """Count a request in."""
        counts = self._counts
        counts.waited += 1
        counts.in_flight += 1
        if counts.in_flight > counts.in_flight_max:
            counts.in_flight_max = counts.in_flight

    def end(self) -> None:
        """Count a request out."""
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
