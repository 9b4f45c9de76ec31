"""Reads and writes that go to a worker without a coroutine: counted in, checked, counted out, their caller told.

Home thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from homeloop.block.answers import check_written
from homeloop.block.calling import Method, block_error_of, plain_bytes
from homeloop.block.counting import Counts
from homeloop.block.lane import NOT_BEGUN, Job, Lane
from homeloop.block.life import Age, Life
from homeloop.errors import BlockError, ContextClosed

__all__ = ["Caller", "Queue", "Queued"]


class Queued(Job):
    """A read or a write that waits for a worker. caller(queued) is called at home, once, when it has ended.

    What it came to is in `answer`, or `error`: a BlockError; ContextClosed if the home ended first; else what ends a
    program. `tag` is the caller's own.
    """

    __slots__ = ("age", "caller", "method", "tag")

    def __init__(
        self, method: Method, args: tuple[Any, ...], done: Callable[[Any], object], caller: Caller, age: Age
    ) -> None:
        super().__init__(method.fn, args, done)
        self.method = method
        self.caller = caller
        self.age = age
        self.tag: Any = None


Caller: TypeAlias = Callable[[Queued], object]


class Queue:
    """The queued requests of one device."""

    def __init__(self, lane: Lane, counts: Counts, life: Life) -> None:
        self._lane = lane
        self._counts = counts
        self._life = life

    def read(self, method: Method, offset: int, length: int, caller: Caller) -> Queued:
        """Put a read that was found right."""
        queued = Queued(method, (offset, length), self._end_read, caller, self._life.begin())
        self._lane.put(queued)
        return queued

    def write(self, method: Method, offset: int, data: Any, caller: Caller) -> Queued:
        """Put a write that was found right."""
        queued = Queued(method, (offset, data), self._end_write, caller, self._life.begin())
        self._lane.put(queued)
        return queued

    def _end_read(self, queued: Queued) -> None:
        offset, length = queued.args
        if queued.error is None:
            try:
                queued.answer = plain_bytes(queued.answer, queued.method.label, offset, length)
            except BlockError as error:
                queued.error = error
        self._end(queued, self._counts.reads, length)

    def _end_write(self, queued: Queued) -> None:
        offset, data = queued.args
        if queued.error is None and queued.answer is not None:
            try:
                check_written(queued.answer, queued.method.label, offset, len(data))
            except BlockError as error:
                queued.error = error
        self._end(queued, self._counts.writes, len(data))

    def _end(self, queued: Queued, counted: list[int], length: int) -> None:
        if queued.error is None:
            counted[0] += 1
            counted[1] += length
        else:
            self._counts.errors += 1
            queued.error = _as_told(queued.error, queued.method.label, begun=queued.answer is not NOT_BEGUN)
        self._life.end(queued.age)
        queued.caller(queued)


def _as_told(error: BaseException, label: str, *, begun: bool) -> BaseException:
    if not isinstance(error, Exception) or (isinstance(error, ContextClosed) and not begun):
        return error
    failure = block_error_of(error, label)
    if failure is not error:
        failure.__cause__ = error
    return failure
