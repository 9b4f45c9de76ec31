"""A request as steps: methods of the driver, one after the other. What a driver lacks is made of those that it has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeAlias, TypeVar, cast

from homeloop.block.answers import check_written
from homeloop.block.calling import Method, Unrun, Way, drive
from homeloop.block.counting import Counts
from homeloop.block.driver import BytesLike
from homeloop.block.life import Age
from homeloop.block.ranges import Ranges
from homeloop.block.zeroes import ZEROES
from homeloop.errors import BlockError

__all__ = ["AT_ONCE", "NO_OPTIONS", "ZERO_PIECE", "Changes", "Step"]

T = TypeVar("T")

# A driver's method, its arguments and its options.
Step: TypeAlias = tuple[Method, tuple[object, ...], dict[str, object]]

NO_OPTIONS: Final[dict[str, object]] = {}

# The ways of methods that are called in the request's own call.
AT_ONCE: Final = (Way.INLINE, Way.DIRECT)

# What write_zeroes is made of where the driver has none: one piece is one write, and other requests run
# between two. A multiple of every block_size_min. 1 MiB: a worker's hop (about 50 us) is small against it,
# its answer comes soon.
ZERO_PIECE: Final = ZEROES[: 1 << 20]


class Changes:
    """Runs the steps of a device's requests. Home thread only."""

    def __init__(
        self,
        counts: Counts,
        begin: Callable[[int, Unrun | None], Age],
        end: Callable[[Age], None],
        writes: tuple[Method | None, ...],
        ranges: Ranges | None,
    ) -> None:
        self._counts = counts
        self._begin = begin             # (end of the request, ...) counts it in, or raises BlockError
        self._end = end
        self._writes = writes           # methods (offset, data), whose answer is checked
        self._ranges = ranges           # of a device that emulates alignment

    def run(
        self, counted: list[int], offset: int, length: int, steps: list[Step]
    ) -> Coroutine[Any, Any, None] | None:
        """Run steps now, if none of them has to wait; else return the coroutine that does.

        counted: the requests and bytes of this kind. offset, length: what the request is about.
        """
        if any(method.way not in AT_ONCE for method, _, _ in steps) or not self._is_free(offset, length):
            return self.later(counted, offset, length, iter(steps))
        for number, (method, args, options) in enumerate(steps):
            try:
                done = method.now(*args, **options)
                if type(done) is Unrun:
                    return self.later(counted, offset, length, iter(steps[number:]), done)
                self._check(method, args, done)
            except BlockError:
                self._counts.errors += 1
                raise
        counted[0] += 1
        counted[1] += length
        return None

    async def later(
        self, counted: list[int], offset: int, length: int, steps: Iterator[Step], begun: Unrun | None = None
    ) -> None:
        """Run steps one after the other; the first that fails ends the request. begun: what the first has begun."""
        age = self._begin(offset + length, begun)
        taken = None
        try:
            if self._ranges is not None:
                taken = await self._ranges.take(offset, offset + length)
            await self._run(steps, begun)
            counted[0] += 1
            counted[1] += length
        except BlockError:
            self._counts.errors += 1
            raise
        finally:
            if taken is not None and self._ranges is not None:
                self._ranges.give(taken)
            self._end(age)

    async def write(self, counted: list[int], offset: int, data: BytesLike, method: Method) -> None:
        """As later() with one step, a write that has to wait, of a device that emulates no alignment.

        The hot path of async drivers: each coroutine on the way is paid by every block.
        """
        length = len(data)
        age = self._begin(offset + length, None)
        try:
            done = await method.later(offset, data)
            if done is not None:
                check_written(done, method.label, offset, length)
            counted[0] += 1
            counted[1] += length
        except BlockError:
            self._counts.errors += 1
            raise
        finally:
            self._end(age)

    def work(
        self, counted: list[int], offset: int, length: int, work: Coroutine[Any, Any, T], *, now: bool = False
    ) -> T | Coroutine[Any, Any, T]:
        """Run a request that is one coroutine: now, if the caller knows that it waits for nothing."""
        if not now:
            return self._work_later(counted, offset, length, Unrun(work))
        try:
            done = drive(work)
        except BlockError:
            self._counts.errors += 1
            raise
        counted[0] += 1
        counted[1] += length
        return done

    async def _work_later(self, counted: list[int], offset: int, length: int, work: Unrun) -> Any:
        age = self._begin(offset + length, work)
        try:
            done = await work.coroutine
            counted[0] += 1
            counted[1] += length
            return done
        except BlockError:
            self._counts.errors += 1
            raise
        finally:
            self._end(age)

    async def _run(self, steps: Iterator[Step], begun: Unrun | None) -> None:
        for method, args, options in steps:
            if begun is None:
                done = await method.call(*args, **options)
            else:
                done, begun = await method.finish(begun), None
            self._check(method, args, done)
            if method.way is Way.INLINE:
                await asyncio.sleep(0)          # many pieces: the others' requests run in between

    def _is_free(self, offset: int, length: int) -> bool:
        return self._ranges is None or self._ranges.is_free(offset, offset + length)

    def _check(self, method: Method, args: tuple[object, ...], done: object) -> None:
        if done is not None and method in self._writes:
            offset, data = cast("tuple[int, BytesLike]", args)
            check_written(done, method.label, offset, len(data))
