"""Drivers that fill a buffer: read_into(offset, buffer) as a read.

For who receives into memory (readinto, recv_into, an mmap): no bytes object is made to be copied out of.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import cast

from homeloop.block.calling import Method, Way, method_of, reject_awaitable
from homeloop.block.driver import Driver, ThreadModel
from homeloop.block.lane import Lane
from homeloop.errors import BlockError

__all__ = ["reading_of"]


def reading_of(driver: Driver, thread_model: ThreadModel, lane: Lane) -> Method | None:
    """Return how the driver is read: by read_into on workers, and where it has no read; else by read."""
    read, into = (method_of(driver, name, thread_model, lane) for name in ("read", "read_into"))
    if into is None or into.way is Way.DIRECT or (read is not None and read.way is not Way.WORKER):
        return read
    fill = into.fn
    label = into.label

    def read_plain(offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        # A view, so that nobody can make the buffer longer or shorter.
        _check_filled(fill(offset, memoryview(buffer)), label, offset, length)
        return buffer

    async def read_async(offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        done = await cast("Awaitable[object]", fill(offset, memoryview(buffer)))
        _check_filled(done, label, offset, length)
        return buffer

    run: Callable[..., object] = read_async if into.way is Way.COROUTINE else read_plain
    return Method(run, label, into.way, lane if into.way is Way.WORKER else None)


def _check_filled(done: object, label: str, offset: int, length: int) -> None:
    reject_awaitable(done, label)
    if done is not None and (type(done) is not int or done != length):
        raise BlockError(errno.EIO, f"{label} returned {done!r} for {length} bytes at {offset}")
