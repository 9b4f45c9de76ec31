"""A request as steps: methods of the driver, one after the other. What a driver lacks is made of those that it has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeAlias, cast

from homeloop.block.answers import check_written
from homeloop.block.calling import Method, Unrun, Way
from homeloop.block.counting import Counts
from homeloop.block.driver import BytesLike
from homeloop.block.zeroes import ZEROES
from homeloop.errors import BlockError

__all__ = ["AT_ONCE", "ZERO_PIECE", "Changes", "Step", "zeroing_steps"]

# A driver's method, its arguments and its options.
Step: TypeAlias = tuple[Method, tuple[object, ...], dict[str, object]]

# The ways of methods that are called in the request's own call.
AT_ONCE: Final = (Way.INLINE, Way.DIRECT)

# What write_zeroes is made of where the driver has none: one piece is one write, and other requests run
# between two. A multiple of every block_size_min. 1 MiB: a worker's hop (about 50 us) is small against it,
# its answer comes soon.
ZERO_PIECE: Final = ZEROES[: 1 << 20]


def zeroing_steps(write: Method, offset: int, length: int, flush: Method | None) -> Iterator[Step]:
    """Yield the writes of zeroes that make up a write_zeroes, and the flush behind them if there is to be one."""
    end = offset + length
    while offset < end:
        piece = ZERO_PIECE[: end - offset]
        yield write, (offset, piece), {}
        offset += len(piece)
    if flush is not None:
        yield flush, (), {}


class Changes:
    """Runs the steps of a device's requests. Home thread only."""

    def __init__(
        self,
        counts: Counts,
        begin: Callable[[Unrun | None], None],
        end: Callable[[], None],
        writes: tuple[Method | None, ...],
    ) -> None:
        self._counts = counts
        self._begin = begin             # counts a request in, or raises BlockError
        self._end = end
        self._writes = writes           # methods (offset, data), whose answer is checked

    def run(self, counted: list[int], length: int, steps: list[Step]) -> Coroutine[Any, Any, None] | None:
        """Run steps now, if none of them has to wait; else return the coroutine that does.

        counted: the requests and bytes of this kind.
        """
        if any(method.way not in AT_ONCE for method, _, _ in steps):
            return self.later(counted, length, iter(steps))
        for number, (method, args, options) in enumerate(steps):
            try:
                done = method.now(*args, **options)
                if type(done) is Unrun:
                    return self.later(counted, length, iter(steps[number:]), done)
                self._check(method, args, done)
            except BlockError:
                self._counts.errors += 1
                raise
        counted[0] += 1
        counted[1] += length
        return None

    async def later(
        self, counted: list[int], length: int, steps: Iterator[Step], begun: Unrun | None = None
    ) -> None:
        """Run steps one after the other; the first that fails ends the request. begun: what the first has begun."""
        self._begin(begun)
        try:
            for method, args, options in steps:
                try:
                    if begun is None:
                        done = await method.call(*args, **options)
                    else:
                        done, begun = await method.finish(begun), None
                    self._check(method, args, done)
                except BlockError:
                    self._counts.errors += 1
                    raise
                if method.way is Way.INLINE:
                    await asyncio.sleep(0)          # many pieces: the others' requests run in between
            counted[0] += 1
            counted[1] += length
        finally:
            self._end()

    def _check(self, method: Method, args: tuple[object, ...], done: object) -> None:
        if done is not None and method in self._writes:
            offset, data = cast(tuple[int, BytesLike], args)
            check_written(done, method.label, offset, len(data))
