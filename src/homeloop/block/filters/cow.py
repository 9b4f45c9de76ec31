"""Copy on write: changes go to an overlay, and the device below stays as it is until they are committed.

In clusters: one that is in the overlay is read and written there alone. The first write to a part of a cluster copies
the rest of it up. Which clusters are there is known in memory only: the overlay ends with the filter.

Requests that wait while they bring a cluster up have it for themselves (Claims), or two writes to two parts of it would
each bring it up without the other's part. So has a commit: it brings down what is there, and a write that was still on
its way to the overlay would be lost.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Coroutine
from types import CoroutineType
from typing import Any, Final

from homeloop.block.device import Answer, Device
from homeloop.block.driver import BytesLike, Driver
from homeloop.block.extents import EXTENTS_MAX, Extent
from homeloop.block.file import File
from homeloop.block.filters.passing import Filter
from homeloop.block.filters.steps import Claims, Steps, at_once
from homeloop.block.memory import Memory
from homeloop.errors import UsageError

__all__ = ["Cow"]

# One byte each.
_CLUSTERS_MAX: Final = 1 << 28
_BELOW: Final = 0               # the cluster is as it is below
_HERE: Final = 1                # the cluster is in the overlay
_PIECE: Final = 1 << 20         # of a commit: other requests run between two


class Cow(Filter):
    """Writable over a driver that is only read; commit() brings the changes down.

    overlay: None for memory, a path for a sparse file that must not exist yet and is removed by close(), or a driver of
    at least the size below, whose old contents do not matter. cluster: bytes, a power of two. Home thread; made by
    whoever may block if overlay is a path.
    """

    def __init__(
        self,
        driver: Driver | Device,
        *,
        overlay: Driver | Device | str | os.PathLike[str] | None = None,
        cluster: int = 1 << 16,
    ) -> None:
        super().__init__(driver)
        size, minimum = self.inner.size, self.block_size_min
        if cluster < max(512, minimum) or cluster & (cluster - 1) or cluster > self.inner.block_size.maximum:
            raise UsageError(f"cow: a cluster of {cluster} bytes: it must be a power of two from "
                             f"{max(512, minimum)} to {self.inner.block_size.maximum}")
        count = -(-size // cluster)
        if count > _CLUSTERS_MAX:
            raise UsageError(f"cow: {count} clusters of {cluster} bytes are more than we count: make them larger")
        self._path: str | None = None
        self._over = self._overlay_of(overlay, size)
        if self._over.size < size or self._over.read_only or self._over.block_size.minimum > minimum:
            raise UsageError(f"cow: {self._over!r} cannot be the overlay of a device of {size} bytes: it is smaller, "
                             f"read-only, or has larger blocks than {minimum} bytes")
        # Home thread only, all of them.
        self._cluster = cluster
        self._states = bytearray(count)             # of each cluster: _BELOW or _HERE
        self._claims = Claims()                     # of clusters that are brought up, or down
        self._base_is_dirty = False                 # commit() wrote to it, and it was not flushed since
        self._over_waits = False                    # the overlay has let a read wait
        self._offer_all()

    def __repr__(self) -> str:
        return f"<Cow {self.clusters} clusters of {self._cluster} bytes over {self.inner!r}>"

    @property
    def clusters(self) -> int:
        """How many clusters the overlay has."""
        return self._states.count(_HERE)

    def read(self, offset: int, length: int) -> Answer[BytesLike]:
        first, stop = self._clusters(offset, length)
        state = self._states[first]
        if self._run_end(first, stop) == stop:
            return self._read_layer(state, offset, length)
        return at_once(self._reading(offset, length))

    def write(self, offset: int, data: BytesLike) -> Answer[None]:
        return self._change(offset, len(data), data)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Answer[None]:
        return self._change(offset, length, None, may_trim=may_trim)

    def trim(self, offset: int, length: int) -> Answer[None]:
        """Whole clusters read as zeroes then; the rest stays as it is."""
        start = -(-offset // self._cluster) * self._cluster
        end = offset + length
        stop = end if end == self.size else end - end % self._cluster
        return None if stop <= start else self._change(start, stop - start, None)

    def flush(self) -> Answer[None]:
        return at_once(self._flushing())

    def extents(self, offset: int, length: int) -> Answer[list[Extent]]:
        return at_once(self._telling(offset, length))

    async def commit(self) -> int:
        """Write all changes to the device below and flush it; the overlay is empty then. Return the bytes written.

        Other requests go on meanwhile; a cluster that is changed after it was brought down is in the overlay again.
        Raises BlockError, EPERM if the device below is read-only; what could not be brought down is here still.
        Cancelled, part of it is done. Home thread.
        """
        answer = at_once(self._committing())
        return answer if isinstance(answer, int) else await answer

    async def close(self) -> None:
        """Forget the changes and close both devices."""
        try:
            await self._over.close()
        finally:
            if self._path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)
                self._path = None
            await self.inner.close()

    # Steps

    def _reading(self, offset: int, length: int) -> Steps[BytesLike]:
        end, pieces = offset + length, []
        while offset < end:
            stop = self._layer_end(offset, end)
            state = self._states[offset // self._cluster]
            pieces.append((yield self._read_layer(state, offset, stop - offset)))
            offset = stop
        return b"".join(pieces)

    def _change(self, offset: int, length: int, data: BytesLike | None, may_trim: bool = True) -> Answer[None]:
        """Write data, or zeroes if there is none."""
        first, stop = self._clusters(offset, length)
        here = self._states[first] and self._run_end(first, stop) == stop
        if not here or not self._claims.is_free(first, stop, shared=True):
            return at_once(self._changing(offset, length, data, may_trim))
        answer = self._write_over(offset, length, data, may_trim)
        return at_once(self._changing_here(first, stop, answer)) if type(answer) is CoroutineType else answer

    def _changing_here(self, first: int, stop: int, answer: Coroutine[Any, Any, None]) -> Steps[None]:
        """Changes of clusters that are all here need not be apart, but a commit must wait for them."""
        claim = yield from self._claims.take(first, stop, shared=True)      # it is free: this does not wait
        try:
            yield answer
        finally:
            self._claims.give(claim)

    def _changing(self, offset: int, length: int, data: BytesLike | None, may_trim: bool) -> Steps[None]:
        first, stop = self._clusters(offset, length)
        claim = yield from self._claims.take(first, stop)
        try:
            # First what the write leaves of the first and the last cluster, then the write: none is half here.
            for number in (first, stop - 1) if stop - first > 1 else (first,):
                yield from self._bring_up(number, offset, offset + length)
            yield self._write_over(offset, length, data, may_trim)
            self._states[first:stop] = bytes((_HERE,)) * (stop - first)
        finally:
            self._claims.give(claim)

    def _bring_up(self, number: int, start: int, end: int) -> Steps[None]:
        """Copy what lies outside of start to end from below, if the cluster is not here. It is claimed."""
        if self._states[number] == _HERE:
            return
        begin = number * self._cluster
        stop = min(begin + self._cluster, self.size)
        for piece, until in ((begin, min(start, stop)), (max(end, begin), stop)):
            if piece < until:
                data = yield self.inner.read(piece, until - piece)
                yield self._over.write(piece, data)

    def _flushing(self) -> Steps[None]:
        if self._over.can_flush:
            yield self._over.flush()
        if self._base_is_dirty:
            yield from self._flush_base()

    def _flush_base(self) -> Steps[None]:
        self._base_is_dirty = False
        try:
            if self.inner.can_flush:
                yield self.inner.flush()
        except BaseException:
            self._base_is_dirty = True
            raise

    def _telling(self, offset: int, length: int) -> Steps[list[Extent]]:
        end = offset + length
        found: list[Extent] = []
        while offset < end and len(found) < EXTENTS_MAX:
            stop = self._layer_end(offset, end)
            layer = self._over if self._states[offset // self._cluster] else self.inner
            extents = yield layer.extents(offset, stop - offset)
            found += extents
            told = sum(piece for piece, _, _ in extents)
            if told < stop - offset:
                break
            offset = stop
        return found

    def _committing(self) -> Steps[int]:
        written, number = 0, self._states.find(_HERE)
        while number >= 0:
            stop = min(self._run_end(number, len(self._states)), number + max(1, _PIECE // self._cluster))
            claim = yield from self._claims.take(number, stop)
            try:
                offset, end = number * self._cluster, min(stop * self._cluster, self.size)
                yield from self._bring_down(offset, end)
                self._states[number:stop] = bytes(stop - number)
                if not self._over_waits and self._over.can_trim:
                    # One that lets reads wait may have some on their way.
                    yield self._over.trim(offset, end - offset)
            finally:
                self._claims.give(claim)
            written += end - offset
            number = self._states.find(_HERE, stop)
        yield from self._flush_base()
        return written

    def _bring_down(self, offset: int, end: int) -> Steps[None]:
        self._base_is_dirty = True
        while offset < end:
            extents = yield self._over.extents(offset, end - offset)
            for length, _, zero in extents:
                if zero:
                    yield self.inner.write_zeroes(offset, length)
                else:
                    data = yield self._over.read(offset, length)
                    yield self.inner.write(offset, data)
                offset += length

    # Values

    def _read_layer(self, state: int, offset: int, length: int) -> Answer[BytesLike]:
        if not state:
            return self.inner.read(offset, length)
        answer = self._over.read(offset, length)
        self._over_waits = self._over_waits or not isinstance(answer, (bytes, bytearray, memoryview))
        return answer

    def _write_over(self, offset: int, length: int, data: BytesLike | None, may_trim: bool) -> Answer[None]:
        if data is None:
            return self._over.write_zeroes(offset, length, may_trim=may_trim)
        return self._over.write(offset, data)

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self._cluster, -(-(offset + length) // self._cluster)

    def _run_end(self, first: int, stop: int) -> int:
        """Where the clusters like `first` end, or stop."""
        other = self._states.find(_BELOW if self._states[first] else _HERE, first, stop)
        return stop if other < 0 else other

    def _layer_end(self, offset: int, end: int) -> int:
        first, stop = self._clusters(offset, end - offset)
        return min(end, self._run_end(first, stop) * self._cluster)

    def _offer_all(self) -> None:
        """It can be written whatever the device below can; flush is offered where it means something."""
        for name in ("write", "flush", "trim", "write_zeroes"):
            self.__dict__.pop(name, None)
        if not self._over.can_flush:
            setattr(self, "flush", None)                                # noqa: B010 - see Filter
        setattr(self, "write_fua", None)                                # noqa: B010 - write, then flush
        setattr(self, "resize", None)                                   # noqa: B010 - two devices, and a table
        setattr(self, "write_zeroes", self._never_fast)                 # noqa: B010
        self.read_only = False
        self.multi_conn = self._over.can_multi_conn

    def _never_fast(self, offset: int, length: int, *, may_trim: bool) -> Answer[None]:
        return self._change(offset, length, None, may_trim=may_trim)

    def _overlay_of(self, overlay: Driver | Device | str | os.PathLike[str] | None, size: int) -> Device:
        if overlay is None:
            return Device(Memory(size))
        if isinstance(overlay, Device):
            return overlay
        if not isinstance(overlay, str | os.PathLike):
            return Device(overlay)
        path = os.fspath(overlay)
        if os.path.lexists(path):
            raise UsageError(f"cow: {path} exists: an overlay is a new file, and is removed at the end")
        file = File(path, size=size, create=True)
        self._path = path
        return Device(file)
