"""Reads that come one after the other are answered from a larger one: for a device where each costs a journey."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from homeloop.block.device import Answer, Device
from homeloop.block.driver import BytesLike, Driver
from homeloop.block.filters.passing import Filter
from homeloop.block.filters.steps import Claims, Steps, at_once
from homeloop.errors import BlockError, UsageError

__all__ = ["Readahead"]


class Readahead(Filter):
    """A read that begins where the last one ended makes the filter read more than was asked for, for the next ones.

    The window doubles from `window_min` to `window_max` bytes while reads stay sequential, and is given up when they
    do not. It holds one window at a time; a change of the device forgets it. Nothing is read that nobody waits for:
    there is no task behind it. Home thread.
    """

    def __init__(self, driver: Driver | Device, *, window_min: int = 1 << 16, window_max: int = 1 << 22) -> None:
        super().__init__(driver)
        minimum = self.block_size_min
        if not 0 < window_min <= window_max <= self.inner.block_size.maximum:
            raise UsageError(f"readahead: a window from {window_min} to {window_max} bytes: it must be from 1 to "
                             f"{self.inner.block_size.maximum}")
        # Home thread only, all of them.
        self._window_min = -(-window_min // minimum) * minimum
        self._window_max = -(-window_max // minimum) * minimum
        self._window = self._window_min         # bytes of the next one
        self._next = -1                         # where a sequential read would begin
        self._start = 0                         # of what is held
        self._data: memoryview = memoryview(b"")
        self._fetching = Claims()               # ranges that are being read
        self._changes = 0                       # what was read before a change is not kept after it

    def read(self, offset: int, length: int) -> Answer[BytesLike]:
        held = self._held(offset, length)
        sequential = offset == self._next
        self._next = offset + length
        if held is not None:
            return held
        if not self._fetching.is_free(offset, offset + length):
            return at_once(self._fetched(offset, length, length))       # somebody is about to have it
        if not sequential:
            self._window = self._window_min
            return self.inner.read(offset, length)
        window = min(max(self._window, length), self.size - offset)
        self._window = min(2 * self._window, self._window_max)
        return at_once(self._fetched(offset, length, window))

    def write(self, offset: int, data: BytesLike) -> Answer[None]:
        return at_once(self._changing(partial(self.inner.write, offset, data)))

    def write_fua(self, offset: int, data: BytesLike) -> Answer[None]:
        return at_once(self._changing(partial(self.inner.write, offset, data, fua=True)))

    def trim(self, offset: int, length: int) -> Answer[None]:
        return at_once(self._changing(partial(self.inner.trim, offset, length)))

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Answer[None]:
        ask = partial(self.inner.write_zeroes, offset, length, may_trim=may_trim, fast=fast)
        return at_once(self._changing(ask))

    async def resize(self, size: int) -> None:
        self._forget()
        await super().resize(size)
        self._forget()

    def _held(self, offset: int, length: int) -> BytesLike | None:
        start = offset - self._start
        if start < 0 or start + length > len(self._data):
            return None
        return self._data[start : start + length]

    def _fetched(self, offset: int, length: int, window: int) -> Steps[BytesLike]:
        claim = yield from self._fetching.take(offset, offset + window)
        try:
            held = self._held(offset, length)
            if held is not None:
                return held
            if window == length:
                return (yield self.inner.read(offset, length))       # type: ignore[no-any-return]
            changes = self._changes
            try:
                data = yield self.inner.read(offset, window)
            except BlockError:
                # What nobody asked for may be what cannot be read.
                return (yield self.inner.read(offset, length))       # type: ignore[no-any-return]
            view = memoryview(data)
            if changes == self._changes:
                self._start, self._data = offset, view
            return view[:length]
        finally:
            self._fetching.give(claim)

    def _changing(self, ask: Callable[[], Answer[None]]) -> Steps[None]:
        """Forget what is held, and what is being read, before the change and after it."""
        self._forget()
        try:
            yield ask()
        finally:
            self._forget()

    def _forget(self) -> None:
        self._changes += 1
        self._data = memoryview(b"")
