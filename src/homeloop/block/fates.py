"""What a rule of Faults does to a request: values, and the one that holds requests up until it is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from homeloop.block.driver import BytesLike
from homeloop.block.filters.errnos import name_of
from homeloop.core.current import current_context
from homeloop.errors import WouldBlockLoop

__all__ = ["Crash", "Damage", "Delayed", "Drop", "Fail", "Fate", "Keep", "Stall", "Torn", "check_may_wait"]

# What survives a crash of the changes that were not flushed: nothing, a random part of them, the first of them (as many
# as chance says), or the first so many.
Keep: TypeAlias = Literal["none", "random", "prefix"] | int

WAIT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Fail:
    """The request fails, and is not passed on."""

    errno: int
    text: str = ""

    def __str__(self) -> str:
        return f"error {name_of(self.errno)}"


@dataclass(frozen=True, slots=True)
class Delayed:
    """The request waits, then goes on."""

    seconds: float

    def __str__(self) -> str:
        return f"delay {self.seconds:g} s"


@dataclass(frozen=True, slots=True)
class Torn:
    """Only the first sectors of a write are written; then it fails, or claims to be done, or the device crashes."""

    sectors: int
    sector_bytes: int
    then: Literal["error", "success", "crash"]
    errno: int
    keep: Keep

    def __str__(self) -> str:
        return f"torn after {self.sectors} sectors, then {self.then}"


@dataclass(frozen=True, slots=True)
class Drop:
    """The connection is cut."""

    def __str__(self) -> str:
        return "dropped connection"


@dataclass(frozen=True, slots=True)
class Crash:
    """The device crashes before the request is done."""

    keep: Keep

    def __str__(self) -> str:
        return f"crash, {self.keep} survives" if isinstance(self.keep, str) else f"crash, {self.keep} survive"


@dataclass(frozen=True, slots=True)
class Damage:
    """Bits of what is read, or written, are not what they were."""

    bits: tuple[int, ...] | None        # of the request, counted from its first byte's lowest; None: one by chance
    length: int                         # bytes to be overwritten with random ones; 0: a bit is flipped

    def __str__(self) -> str:
        if self.length:
            return f"corrupt {self.length} bytes"
        return "bit flip" if self.bits is None else f"flip of bits {', '.join(map(str, self.bits))}"

    def done_to(self, data: BytesLike, chance: random.Random) -> bytes:
        """Return a damaged copy. Bits behind its end are left out."""
        found = bytearray(data)
        if self.length:
            length = min(self.length, len(found))
            start = chance.randrange(len(found) - length + 1)
            for at in range(start, start + length):
                found[at] ^= chance.randrange(1, 256)       # never what it was
            return bytes(found)
        bits = (chance.randrange(8 * len(found)),) if self.bits is None else self.bits
        for bit in bits:
            if bit < 8 * len(found):
                found[bit >> 3] ^= 1 << (bit & 7)
        return bytes(found)


class Stall:
    """Requests stand here until they are let go. Made by a rule's stall(). All methods but wait(): any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()                                               # its lock is a leaf
        # Under _changed, all of them.
        self._stalled: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []    # one for each in flight
        self._reached = 0
        self._open = False

    def __str__(self) -> str:
        return "stall"

    def __repr__(self) -> str:
        state = "released" if self._open else f"{len(self._stalled)} stalled"
        return f"<Stall {state}, {self._reached} so far>"

    @property
    def stalled(self) -> int:
        """How many stand here now."""
        return len(self._stalled)

    @property
    def reached(self) -> int:
        """How many have come here, since the beginning."""
        return self._reached

    def release(self, count: int | None = None) -> None:
        """Let the first `count` go; None: all, and those that come later do not stop here any more."""
        with self._changed:
            if count is None:
                self._open = True
                count = len(self._stalled)
            going, self._stalled = self._stalled[:count], self._stalled[count:]
        for loop, waiter in going:
            with contextlib.suppress(RuntimeError):         # its loop has ended, and the request with it
                loop.call_soon_threadsafe(_let_go, waiter)

    def hold(self) -> None:
        """Stop those that come from now on, after a release() of all."""
        with self._changed:
            self._open = False

    def wait_reached(self, timeout: float = WAIT_S, *, count: int = 1) -> None:
        """Wait until `count` requests have come here, since the beginning. A thread that serves no loop.

        AssertionError if they do not within `timeout` seconds.
        """
        check_may_wait("wait_reached()")
        with self._changed:
            if not self._changed.wait_for(lambda: self._reached >= count, timeout):
                raise AssertionError(f"{self._reached} requests reached the stall in {timeout:g} s, not {count}")

    async def wait(self) -> None:
        """Stand here, as a request. Its home."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        standing = loop, waiter
        with self._changed:
            self._reached += 1
            is_open = self._open
            if not is_open:
                self._stalled.append(standing)
            self._changed.notify_all()
        if is_open:
            return
        try:
            await waiter
        finally:
            with self._changed:
                if standing in self._stalled:               # cancelled
                    self._stalled.remove(standing)


def check_may_wait(what: str) -> None:
    """Raise WouldBlockLoop in a thread whose loop would stand still: the request waited for may be at home in it."""
    context = current_context()
    running = context is not None
    if not running:
        try:
            asyncio.get_running_loop()
            running = True
        except RuntimeError:
            pass
    if running:
        raise WouldBlockLoop(f"{what} would block the loop of this thread: call it through to_worker()")


def _let_go(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():                                   # done: cancelled meanwhile
        waiter.set_result(None)


Fate: TypeAlias = Fail | Delayed | Torn | Drop | Crash | Damage | Stall
