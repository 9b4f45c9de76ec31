"""Requests written once, whether they wait or not: generators whose yields are answers of a Device.

    def _twice(self, offset, length):
        first = yield self._inner.read(offset, length)
        second = yield self._inner.read(offset, length)
        return bytes(first) + bytes(second)

`at_once(self._twice(0, 512))` is the answer if both reads were answered inline, else a coroutine object that goes on
from the first that was not. So a filter over a driver that never waits never waits either. Home thread.

Claims keep requests that wait apart: who has claimed a range of blocks is alone with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import CoroutineType
from typing import Any, TypeAlias, TypeVar

from homeloop.block.calling import Unrun
from homeloop.block.device import Answer

__all__ = ["Claim", "Claims", "Steps", "at_once"]

T = TypeVar("T")
Steps: TypeAlias = Generator[Any, Any, T]
"""Yields what a request method of a Device returned, or any coroutine object; is sent the result."""


def at_once(steps: Steps[T]) -> Answer[T]:
    """Run steps until one must wait. Return their result, or a coroutine object that goes on from there.

    A coroutine that is never run closes the steps where they stand: their `finally` is what they can rely on.
    """
    try:
        answer = next(steps)
        while type(answer) is not CoroutineType:
            answer = steps.send(answer)
    except StopIteration as end:
        return end.value                                    # type: ignore[no-any-return]
    return _go_on(steps, Unrun(answer))


async def _go_on(steps: Steps[T], begun: Unrun) -> T:
    try:
        coroutine: Coroutine[Any, Any, Any] = begun.coroutine
        while True:
            try:
                result = await coroutine
            except BaseException as error:
                answer = steps.throw(error)
            else:
                answer = steps.send(result)
            while type(answer) is not CoroutineType:
                answer = steps.send(answer)
            coroutine = answer
    except StopIteration as end:
        return end.value                                    # type: ignore[no-any-return]
    finally:
        steps.close()


class Claim:
    """A range of numbers that one request has, or waits for."""

    __slots__ = ("ended", "first", "shared", "stop")

    def __init__(self, first: int, stop: int, shared: bool) -> None:
        self.first = first
        self.stop = stop
        self.shared = shared
        self.ended: list[asyncio.Future[None]] = []         # of those that wait for this one's end


class Claims:
    """Ranges that nobody else may have meanwhile; first come, first served. Shared ones may overlap each other.

    Home thread.

    One claim each: who holds one and takes another may wait for somebody who waits for him. A claim is taken when it
    is asked for: a request whose coroutine is kept and not run holds up those behind it until it is dropped.
    """

    def __init__(self) -> None:
        self._claims: list[Claim] = []                      # in the order of take(): one for each request in flight

    def __len__(self) -> int:
        return len(self._claims)

    def is_free(self, first: int, stop: int, *, shared: bool = False) -> bool:
        """Return True if nobody has, or waits for, any of first <= number < stop; shared: but for those who share."""
        return not any(
            claim.first < stop and first < claim.stop and not (shared and claim.shared) for claim in self._claims
        )

    def take(self, first: int, stop: int, *, shared: bool = False) -> Steps[Claim]:
        """Steps that return the claim once everybody before us has given up what overlaps with it."""
        claim = Claim(first, stop, shared)
        if self.is_free(first, stop, shared=shared):
            self._claims.append(claim)
            return claim
        self._claims.append(claim)
        try:
            while (other := self._before(claim)) is not None:
                yield _end_of(other)
        except BaseException:
            self.give(claim)
            raise
        return claim

    def give(self, claim: Claim) -> None:
        """End a claim; those that wait for it look again."""
        self._claims.remove(claim)
        for waiter in claim.ended:
            if not waiter.done():                           # done: cancelled, its task has yet to run
                waiter.set_result(None)

    def _before(self, claim: Claim) -> Claim | None:
        for other in self._claims:
            if other is claim:
                return None
            if other.first < claim.stop and claim.first < other.stop and not (claim.shared and other.shared):
                return other
        raise AssertionError("a claim that is not listed")


async def _end_of(claim: Claim) -> None:
    waiter = asyncio.get_running_loop().create_future()
    claim.ended.append(waiter)
    await waiter
