"""The strict guard around one driver: the only place where a request is checked.

    request -> Device (range, rights, alignment; counts; errors) -> driver

A request that its driver can answer without waiting is answered by the call itself: no coroutine, no task, no
thread. For any other the call returns a coroutine object, and the request begins when that is run. The caller
looks at the type (types.CoroutineType) and needs no second function for either case.

A caller with many requests in flight, such as a connection, can hand read() and write() a function `caller`. Where
the request then has to go to a worker, it is under way when the call returns, and what is returned is a Queued (see
homeloop.block.queueing): caller(queued) is called at home when it has ended. That saves the coroutine.

Flush. A driver's flush() covers every write, trim and write_zeroes that had returned when it was called. The
Device answers none of these before the driver has, and calls flush() after flush() was asked for. So a flush
covers what was answered before it was asked for (NBD D1); and as there is one Device per driver, whoever
asked for the write, on whichever connection (NBD X7), as far as the driver's promise goes (`multi_conn`).
What is still in flight when a flush is asked for may or may not be covered. A request with fua=True is
answered after it and a flush behind it, or the driver's own write_fua, are done (NBD D3).

Nothing here knows about connections, exports or payload limits.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from types import CoroutineType
from typing import NoReturn, TypeAlias, TypeVar, overload

from homeloop.block.answers import check_written
from homeloop.block.asking import Questions
from homeloop.block.calling import (
    Method,
    Turns,
    Unrun,
    Way,
    block_error_of,
    has_option,
    method_of,
    plain_bytes,
    quick_path_of,
)
from homeloop.block.changes import AT_ONCE, NO_OPTIONS, ZERO_PIECE, Changes, Step
from homeloop.block.counting import Counts, DeviceStatistics
from homeloop.block.driver import SIZE_BYTES_MAX, BlockSize, BytesLike, Driver, Traits, size_after, traits_of
from homeloop.block.extents import EXTENTS_MAX, Extent
from homeloop.block.filling import reading_of
from homeloop.block.lane import Lane
from homeloop.block.lending import lending_of
from homeloop.block.life import Age, Life, State
from homeloop.block.queueing import Caller, Queue, Queued
from homeloop.block.ranges import Ranges
from homeloop.block.reshaping import Reshaper, Writing, pieces
from homeloop.block.zeroes import are_zeroes
from homeloop.errors import BlockError, UsageError

__all__ = ["Answer", "Device", "DeviceStatistics"]

T = TypeVar("T")
Answer: TypeAlias = T | Coroutine[object, object, T]
"""What a request method returns: the answer, or a coroutine object whose result it is."""


class Device:
    """One driver behind a strict guard: see the module's text for flush and fua.

    Request methods, drain and close are for the home thread of the export that uses the device. The request
    methods check synchronously and raise BlockError: EINVAL for what is unaligned, negative or, for read and
    trim, past the end, and for what the device cannot do; ENOSPC for write and write_zeroes past the end;
    EPERM for changes of a read-only device; ESHUTDOWN after close() was called. They return the answer
    (bytes-like for read, None for the others), or a coroutine object that the caller runs at home to its end,
    and whose result is that answer. The driver's errors are BlockErrors too, raised by the call or by the
    coroutine. Zero bytes are answered at once.

    The coroutine counts as in flight from its first step on: one that is never run holds nothing up, and one
    that starts after close() was called fails with ESHUTDOWN. Cancelled, it raises CancelledError after what
    runs on a worker for it has ended; a change may then be done, in part or in full, or not.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        name: str | None = None,
        read_only: bool | None = None,
        emulate_alignment: bool = False,
    ) -> None:
        """Take the driver over: from now on only this device calls it.

        read_only: None for what the driver says; True to refuse changes; False to insist on a driver that can
        write. emulate_alignment: take requests of any bytes, whatever the driver's block_size_min; what is not in
        whole blocks is read, modified and written back.

        Raises UsageError, naming the driver, for one that breaks its contract (see homeloop.block.driver).
        """
        traits = traits_of(driver)
        self._label = type(driver).__name__                 # for errors
        self.name = self._label if name is None else name
        self.size = traits.size             # home: changed by resize()
        block_size = traits.block_size
        self.block_size: BlockSize = replace(block_size, minimum=1) if emulate_alignment else block_size

        self._lane = lane = Lane(parallel=traits.thread_model == "parallel")
        read = reading_of(driver, traits.thread_model, lane)
        self._write, self._flush, self._write_fua, self._trim, self._write_zeroes, self._close = (
            method_of(driver, method, traits.thread_model, lane)
            for method in ("write", "flush", "write_fua", "trim", "write_zeroes", "close")
        )
        self._cache, extents, self._resize = (
            method_of(driver, method, traits.thread_model, lane) for method in ("cache", "extents", "resize")
        )
        self._driver = driver
        if read is None:
            raise UsageError(f"driver {self._label} has no read method, nor read_into")
        self._read = read
        self._read_is_inline = read.way in AT_ONCE
        self._write_is_inline = self._write is not None and self._write.way in AT_ONCE
        # What may answer before the method itself is asked: (offset, length) -> data, None: ask the method.
        self._read_quick = read.fn if self._read_is_inline else quick_path_of(driver, "read_nowait")
        self._write_quick = quick_path_of(driver, "write_nowait")

        self._set_rights(traits, read_only)

        # Home thread only, all of them.
        self.on_resize: list[Callable[[int], object]] = []  # told of the new size, at home; must not raise
        self._block = traits.block_size.minimum
        self._unaligned = self._block - 1                   # the bits that offset and length must not have
        self._longest = traits.request_bytes_max            # of one call of the driver
        self._emulates = emulate_alignment
        self._counts = counts = Counts()
        self._reads, self._writes = counts.reads, counts.writes
        self._life, self._resizing = Life(counts), Turns()
        self._ranges = Ranges() if emulate_alignment and self._unaligned else None
        writes = Writing(write=self._write, write_fua=self._write_fua, flush=self._flush)
        self._reshaper = Reshaper(self._block, self._longest, self._ranges, read, writes)
        self._questions = Questions(extents, self._reshaper, self._block, self._longest, self._label)
        self._queue = Queue(lane, counts, self._life)
        self.lending = lending_of(self, driver, read, counts)   # home; None: large reads are copied
        self._changes = Changes(counts, self._begin, self._life.end, (self._write, self._write_fua), self._ranges)

    def _set_rights(self, traits: Traits, read_only: bool | None) -> None:
        """Say what the device can do; fixed from here on."""
        unwritable = traits.read_only or self._write is None
        if read_only is False and unwritable:
            raise UsageError(f"driver {self._label} cannot write: its device can only be read-only")
        self.read_only = unwritable or bool(read_only)
        self.can_write = not self.read_only
        self.can_flush = self.can_write and self._flush is not None
        self.can_fua = self.can_flush
        self.can_trim = self.can_write and self._trim is not None
        self.can_write_zeroes = self.can_write              # emulated if need be
        self.can_resize = self.can_write and self._resize is not None
        self.can_fast_zero = self.can_write and has_option(self._write_zeroes, "fast")
        self.can_cache = self._cache is not None
        # Without writes the promise is empty, and kept (NBD X7).
        self.can_multi_conn = self.read_only or traits.multi_conn

    def __repr__(self) -> str:
        return f"<Device {self.name} {self._life.state.value} size={self.size} in_flight={self.in_flight}>"

    @property
    def in_flight(self) -> int:
        """Requests between their first step and their end. Any thread may look."""
        return self._counts.in_flight

    # Requests. read() and write() are the hot path: every statement here is paid by each 4 KiB block.

    @overload
    def read(self, offset: int, length: int) -> Answer[BytesLike]: ...

    @overload
    def read(self, offset: int, length: int, caller: Caller | None) -> Answer[BytesLike] | Queued: ...

    def read(self, offset: int, length: int, caller: Caller | None = None) -> Answer[BytesLike] | Queued:
        """Read `length` bytes at `offset`.

        The answer is the caller's to keep: later writes do not change it. caller: see the module's text.
        """
        if (
            offset < 0
            or length < 0
            or offset + length > self.size
            or (offset | length) & self._unaligned
            or length > self._longest
            or self._life.state is not State.OPEN
        ):
            return self._read_reshaped(offset, length)
        if not length:
            return b""
        quick = self._read_quick
        if quick is not None:
            try:
                data = quick(offset, length)
            except Exception as error:
                self._fail(block_error_of(error, self._read.label), error)
            kind = type(data)
            if (
                kind is bytes or kind is bytearray or are_zeroes(data)
            ) and len(data) == length:                                          # type: ignore[arg-type]
                self._reads[0] += 1
                self._reads[1] += length
                return data                                                     # type: ignore[return-value]
            if kind is CoroutineType and self._read.way is Way.DIRECT:
                return self._read_waiting(offset, length, Unrun(data))          # type: ignore[arg-type]
            if data is not None or self._read_is_inline:
                return self._read_checked(data, offset, length)
        if caller is not None and self._read.way is Way.WORKER:
            return self._queue.read(self._read, offset, length, caller)
        return self._read_waiting(offset, length)

    @overload
    def write(self, offset: int, data: BytesLike, *, fua: bool = False) -> Answer[None]: ...

    @overload
    def write(
        self, offset: int, data: BytesLike, *, fua: bool = False, caller: Caller | None
    ) -> Answer[None] | Queued: ...

    def write(
        self, offset: int, data: BytesLike, *, fua: bool = False, caller: Caller | None = None
    ) -> Answer[None] | Queued:
        """Write `data` (of bytes: len() is its size) at `offset`.

        `data` must stay as it is until the answer is there; it is not kept beyond. fua: on stable storage
        when answered. caller: see the module's text.
        """
        length = len(data)
        if (
            offset < 0
            or offset + length > self.size
            or (offset | length) & self._unaligned
            or length > self._longest
            or not self.can_write
            or (fua and not self.can_fua)
            or self._life.state is not State.OPEN
        ):
            return self._write_reshaped(offset, data, fua)
        if not length:
            return None
        assert self._write is not None, "can_write without a write method"
        if fua:
            own = self._write_fua
            step: Step = (own or self._write, (offset, data), {})
            return self._change(self._writes, offset, length, step, flush=own is None)
        if self._ranges is not None:
            return self._changes.run(self._writes, offset, length, [(self._write, (offset, data), {})])
        if self._write_is_inline:
            try:
                done = self._write.fn(offset, data)
            except Exception as error:
                self._fail(block_error_of(error, self._write.label), error)
            if type(done) is CoroutineType and self._write.way is Way.DIRECT:
                step = self._write, (offset, data), {}
                return self._changes.later(self._writes, offset, length, iter([step]), Unrun(done))
            if done is not None:
                self._check_inline_write(done, offset, length)
        elif self._write_quick is None or not self._written_quickly(self._write_quick, offset, data):
            if caller is not None and self._write.way is Way.WORKER:
                return self._queue.write(self._write, offset, data, caller)
            return self._changes.write(self._writes, offset, data, self._write)
        self._writes[0] += 1
        self._writes[1] += length
        return None

    def takes(self, offset: int, length: int) -> bool:
        """Whether read() hands this request to the driver as it is. Home thread."""
        right = 0 <= offset <= offset + length <= self.size and not (offset | length) & self._unaligned
        return right and length <= self._longest and self._life.state is State.OPEN

    def push(self) -> None:
        """Let what was queued for workers in this turn of the loop go there now, and not at the turn's end."""
        self._lane.push()

    def flush(self) -> Answer[None]:
        """Bring every change that was answered before this call to stable storage: see the module's text.

        A device that is read-only has nothing to flush: answered at once.
        """
        if self._life.state is not State.OPEN:
            self._refuse("flush", 0, 0)
        if self.read_only:
            return None
        if self._flush is None:
            self._fail(BlockError(errno.EINVAL, f"driver {self._label} has no flush"))
        return self._change(self._counts.flushes, 0, 0, (self._flush, (), {}), flush=False)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> Answer[None]:
        """Tell the driver that these bytes are of no more use; what they read as then is open (NBD TR1)."""
        self._check_change("trim", offset, length, fua, self.can_trim)
        if not length:
            return None
        assert self._trim is not None, "can_trim without a trim method"
        start, end = self._reshaper.inner(offset, length)       # no more than a hint: what is no whole block stays
        steps = ((self._trim, part, NO_OPTIONS) for part in pieces(start, end - start, self._longest))
        return self._run_parts(self._counts.trims, offset, length, steps, self._longest, fua)

    def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, may_trim: bool = True, fast: bool = False
    ) -> Answer[None]:
        """Make these bytes read as zeroes; may_trim: they may become a hole.

        A driver without write_zeroes is given zeroes to write, 1 MiB at a time; other requests run in
        between. fast: ENOTSUP at once, and nothing changed, unless it is faster than writing (NBD WZ2).
        """
        self._check_change("write_zeroes", offset, length, fua, self.can_write_zeroes)
        if fast and not self.can_fast_zero:
            text = f"fast write_zeroes of {length} bytes at {offset}: driver {self._label} has none"
            self._fail(BlockError(errno.EINVAL, text))
        if not length:
            return None
        if (offset | length) & self._unaligned:
            whole = partial(self._zeroing, may_trim=may_trim, fast=fast)
            work = self._reshaper.write_zeroes(offset, length, fua=fua, fast=fast, whole=whole)
            return self._changes.work(self._counts.zeroings, offset, length, work)
        steps = self._zeroing(offset, length, may_trim=may_trim, fast=fast)
        longest = self._longest if self._write_zeroes is not None else min(self._longest, len(ZERO_PIECE))
        return self._run_parts(self._counts.zeroings, offset, length, steps, longest, fua)

    def _run_parts(
        self, counted: list[int], offset: int, length: int, steps: Iterator[Step], longest: int, fua: bool
    ) -> Answer[None]:
        """Run steps of at most `longest` bytes each, and flush if asked to; inline if it is one that is."""
        if fua:
            assert self._flush is not None, "fua without a flush method"
            steps = chain(steps, [(self._flush, (), NO_OPTIONS)])
        if length <= longest:
            return self._changes.run(counted, offset, length, list(steps))
        return self._changes.later(counted, offset, length, steps)

    def _zeroing(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> Iterator[Step]:
        """The steps that zero a range of whole blocks."""
        if self._write_zeroes is None:
            assert self._write is not None, "can_write_zeroes without a write method"
            for at, piece in pieces(offset, length, min(self._longest, len(ZERO_PIECE))):
                yield self._write, (at, ZERO_PIECE[:piece]), {}
            return
        options: dict[str, object] = {"may_trim": may_trim, "fast": True} if fast else {"may_trim": may_trim}
        for at, piece in pieces(offset, length, self._longest):
            yield self._write_zeroes, (at, piece), options

    def cache(self, offset: int, length: int) -> Answer[None]:
        """Tell the driver that these bytes will be read soon; no more than a hint (NBD CA1)."""
        self._check_range("cache", offset, length)
        if self._cache is None:
            self._fail(BlockError(errno.EINVAL, f"driver {self._label} has no cache"))
        if not length:
            return None
        start, end = self._reshaper.outer(offset, length)
        steps = ((self._cache, part, NO_OPTIONS) for part in pieces(start, end - start, self._longest))
        return self._run_parts(self._counts.caches, offset, length, steps, self._longest, False)

    def extents(self, offset: int, length: int, *, extents_max: int = EXTENTS_MAX) -> Answer[list[Extent]]:
        """Tell what the range is made of, from its offset on: see homeloop.block.extents.

        At least one extent and at most `extents_max`; they may end before the range does, never behind it. A
        driver that cannot tell has data everywhere, which is always a safe answer (NBD BS5). Zero bytes: EINVAL.
        """
        self._check_range("extents", offset, length)
        if not length:
            self._fail(BlockError(errno.EINVAL, f"extents of no bytes at {offset}"))
        try:
            found = self._questions.now(offset, length, extents_max)
        except BlockError:
            self._counts.errors += 1
            raise
        if isinstance(found, list):
            return self._counted_extents(found)
        return self._extents_waiting(offset, length, extents_max, found)

    # Life

    async def drain(self) -> None:
        """Wait until nothing is in flight. Home thread.

        It refuses no new requests: stop their source first. Cancelling it changes nothing for the requests.
        """
        await self._life.drain()

    async def resize(self, size: int) -> None:
        """Make the device `size` bytes long; every request that begins when this returns finds it so. Home thread.

        Smaller: new requests keep to the new size from now on, and those in flight are waited for; what lay beyond
        is lost. Then the driver is asked; if it fails, the size is what the driver says. Then on_resize is told.
        Raises BlockError: ENOTSUP if the driver cannot, EPERM if the device is read-only, EINVAL for a size that no
        device of this driver can have, ESHUTDOWN after close() was called, and the driver's own. Cancelled while it
        waits: nothing has changed; while the driver works: its end is waited for, or it sees it.
        """
        await self._resizing.take()
        try:
            method = self._check_resize(size)
            before = self.size
            if size == before:
                return
            if size < before:
                self.size = size
                try:
                    await self._life.turn_over()
                    self._check_resize(size)                # closing may have begun meanwhile
                except BaseException:
                    self.size = before
                    raise
            age = self._life.begin()
            try:
                await method.call(size)
                self.size = size
            except BaseException:
                self.size = size_after(self._driver, before)
                raise
            finally:
                self._life.end(age)
        finally:
            self._resizing.give()
        for listener in tuple(self.on_resize):
            listener(self.size)

    async def close(self) -> None:
        """Refuse new requests, drain, flush if changes are possible, close the driver.

        Home thread; twice is fine, at the same time too. Raises the BlockError of the flush, after the driver
        was closed, or else that of the driver's close. Cancelled: the device stays closing, and a later
        close() goes on where this one ended.
        """
        await self._life.close(self._flush if self.can_flush else None, self._close)

    def statistics(self) -> DeviceStatistics:
        """Return the counts. Any thread: each is right, together they may be of neighbouring moments."""
        return self._counts.statistics()

    # Below: what the request methods are made of.

    def _read_checked(self, data: object, offset: int, length: int) -> BytesLike:
        """Count a driver's answer to a read, or raise for one that is not `length` bytes."""
        try:
            answer = plain_bytes(data, self._read.label, offset, length)
        except BlockError as error:
            self._fail(error)
        self._reads[0] += 1
        self._reads[1] += length
        return answer

    def _read_reshaped(self, offset: int, length: int) -> Answer[BytesLike]:
        """Refuse a read, or make it of what the driver can do."""
        self._check_range("read", offset, length)
        if not length:
            return b""
        return self._changes.work(self._reads, offset, length, self._reshaper.read(offset, length),
                                  now=self._reshaper.reads_inline)

    def _write_reshaped(self, offset: int, data: BytesLike, fua: bool) -> Answer[None]:
        length = len(data)
        self._check_change("write", offset, length, fua, self.can_write)
        if not length:
            return None
        now = self._reshaper.can_write_now(offset, length)
        work = self._reshaper.write(offset, data, fua=fua)
        return self._changes.work(self._writes, offset, length, work, now=now)

    async def _read_waiting(self, offset: int, length: int, begun: Unrun | None = None) -> BytesLike:
        age = self._begin(offset + length, begun)
        try:
            try:
                method = self._read
                data = await (method.later(offset, length) if begun is None else method.finish(begun))
            except BlockError:
                self._counts.errors += 1
                raise
            return self._read_checked(data, offset, length)
        finally:
            self._life.end(age)

    def _counted_extents(self, found: list[Extent]) -> list[Extent]:
        self._counts.extents[0] += 1
        self._counts.extents[1] += sum(length for length, _, _ in found)
        return found

    async def _extents_waiting(
        self, offset: int, length: int, extents_max: int, begun: Unrun | None
    ) -> list[Extent]:
        age = self._begin(offset + length, begun)
        try:
            return self._counted_extents(await self._questions.later(offset, length, extents_max, begun))
        except BlockError:
            self._counts.errors += 1
            raise
        finally:
            self._life.end(age)

    def _check_inline_write(self, done: object, offset: int, length: int) -> None:
        assert self._write is not None, "an answer without a write method"
        try:
            check_written(done, self._write.label, offset, length)
        except BlockError as error:
            self._fail(error)

    def _written_quickly(self, quick: Callable[..., object], offset: int, data: BytesLike) -> bool:
        assert self._write is not None, "a quick write without a write method"
        try:
            done = quick(offset, data)
        except Exception as error:
            self._fail(block_error_of(error, f"{self._label}.write_nowait"), error)
        if done is True:
            return True
        if done is not False:
            text = f"{self._label}.write_nowait returned {done!r}, not True or False"
            self._fail(BlockError(errno.EIO, text))
        return False

    def _change(self, counted: list[int], offset: int, length: int, step: Step, *, flush: bool) -> Answer[None]:
        """Run one step, then flush if asked to: inline if both are."""
        steps = [step]
        if flush:
            assert self._flush is not None, "fua without a flush method"
            steps.append((self._flush, (), {}))
        return self._changes.run(counted, offset, length, steps)

    def _begin(self, end: int, begun: Unrun | None) -> Age:
        """Count a request in that reaches up to `end`. Its first step: closing or resizing may have come before."""
        if self._life.state is not State.OPEN or end > self.size:
            if begun is not None:
                begun.coroutine.close()     # now: the error's traceback may keep it longer
            if self._life.state is not State.OPEN:
                text = f"device {self.name} is {self._life.state.value}, and the request had not begun"
                self._fail(BlockError(errno.ESHUTDOWN, text))
            text = f"device {self.name} has become {self.size} bytes, and the request had not begun"
            self._fail(BlockError(errno.EINVAL, text))
        return self._life.begin()

    def _check_resize(self, size: int) -> Method:
        """Return the driver's resize method, if the device may be made that size."""
        what = f"resize of device {self.name} to {size} bytes"
        if self._life.state is not State.OPEN:
            self._fail(BlockError(errno.ESHUTDOWN, f"{what}: it is {self._life.state.value}"))
        if self._resize is None:
            self._fail(BlockError(errno.ENOTSUP, f"{what}: driver {self._label} has no resize"))
        if self.read_only:
            self._fail(BlockError(errno.EPERM, f"{what}: it is read-only"))
        if not 0 <= size <= SIZE_BYTES_MAX or size % self._block:
            self._fail(BlockError(errno.EINVAL, f"{what}: not a size in blocks of {self._block} bytes"))
        return self._resize

    def _check_range(self, kind: str, offset: int, length: int) -> None:
        if (
            offset < 0
            or length < 0
            or offset + length > self.size
            or ((offset | length) & self._unaligned and not self._emulates)
            or self._life.state is not State.OPEN
        ):
            self._refuse(kind, offset, length)

    def _check_change(self, kind: str, offset: int, length: int, fua: bool, can: bool) -> None:
        if (
            offset < 0
            or length < 0
            or offset + length > self.size
            or ((offset | length) & self._unaligned and not self._emulates)
            or not can
            or (fua and not self.can_fua)
            or self._life.state is not State.OPEN
        ):
            self._refuse(kind, offset, length, fua=fua, can=can)

    def _refuse(
        self, kind: str, offset: int, length: int, *, fua: bool = False, can: bool = True
    ) -> NoReturn:
        """Raise the BlockError for a request that was found wrong; the first reason in this order."""
        what = f"{kind} of {length} bytes at {offset}"
        changes = kind not in ("read", "flush", "cache", "extents")
        if self._life.state is not State.OPEN:
            error = BlockError(errno.ESHUTDOWN, f"{what}: device {self.name} is {self._life.state.value}")
        elif changes and self.read_only:
            error = BlockError(errno.EPERM, f"{what}: device {self.name} is read-only")
        elif not can:
            error = BlockError(errno.EINVAL, f"{what}: driver {self._label} has no {kind}")
        elif fua and not self.can_fua:
            error = BlockError(errno.EINVAL, f"{what} with fua: driver {self._label} has no flush")
        elif offset < 0 or length < 0:
            error = BlockError(errno.EINVAL, f"{what}: negative")
        elif offset + length > self.size:
            number = errno.ENOSPC if kind in ("write", "write_zeroes") else errno.EINVAL    # NBD E1, E2
            error = BlockError(number, f"{what}: past the end of device {self.name}, {self.size} bytes")
        else:
            minimum = self.block_size.minimum
            error = BlockError(errno.EINVAL, f"{what}: not in blocks of {minimum} bytes")   # NBD E4
        self._fail(error)

    def _fail(self, error: BlockError, cause: BaseException | None = None) -> NoReturn:
        self._counts.errors += 1
        if cause is None or cause is error:
            raise error
        raise error from cause

