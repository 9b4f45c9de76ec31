"""The strict guard around one driver: the only place where a request is checked.

    request -> Device (range, rights, alignment; counts; errors) -> driver

A request that its driver can answer without waiting is answered by the call itself: no coroutine, no task, no
thread. For any other the call returns a coroutine object, and the request begins when that is run. The caller
looks at the type (types.CoroutineType) and needs no second function for either case.

A caller with many requests in flight, such as a connection, can hand read() and write() a function `caller`. Where
the request then has to go to a worker, it is under way when the call returns, and what is returned is a Queued (see
homeloop.block.lane): caller(queued) is called at home when it has ended. That saves the coroutine.

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
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import NoReturn, TypeAlias, TypeVar, cast, overload

from homeloop.block.answers import check_written, read_extents
from homeloop.block.calling import (
    Method,
    Unrun,
    Way,
    block_error_of,
    has_option,
    method_of,
    plain_bytes,
    quick_path_of,
)
from homeloop.block.changes import AT_ONCE, ZERO_PIECE, Changes, Step, zeroing_steps
from homeloop.block.counting import Counts, DeviceStatistics
from homeloop.block.driver import BlockSize, BytesLike, Driver, traits_of
from homeloop.block.extents import EXTENTS_MAX, Extent
from homeloop.block.lane import Lane, Queued
from homeloop.block.life import Life, State
from homeloop.block.zeroes import are_zeroes
from homeloop.errors import BlockError, ContextClosed, UsageError

__all__ = ["Answer", "Device", "DeviceStatistics"]

T = TypeVar("T")
Answer: TypeAlias = T | Coroutine[object, object, T]
Caller: TypeAlias = Callable[[Queued], object]


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

    def __init__(self, driver: Driver, *, name: str | None = None, read_only: bool | None = None) -> None:
        """Take the driver over: from now on only this device calls it.

        read_only: None for what the driver says; True to refuse changes; False to insist on a driver that can
        write. Raises UsageError, naming the driver, for one that breaks its contract (see
        homeloop.block.driver).
        """
        traits = traits_of(driver)
        self._label = type(driver).__name__                 # for errors
        self.name = self._label if name is None else name
        self.size = traits.size
        self.block_size: BlockSize = traits.block_size

        self._lane = lane = Lane(parallel=traits.thread_model == "parallel")
        read, self._write, self._flush, self._write_fua, self._trim, self._write_zeroes, self._close = (
            method_of(driver, method, traits.thread_model, lane)
            for method in ("read", "write", "flush", "write_fua", "trim", "write_zeroes", "close")
        )
        self._cache, self._extents = (
            method_of(driver, method, traits.thread_model, lane) for method in ("cache", "extents")
        )
        if read is None:
            raise UsageError(f"driver {self._label} has no read method")
        self._read = read
        self._read_is_inline = read.way in AT_ONCE
        self._write_is_inline = self._write is not None and self._write.way in AT_ONCE
        # What may answer before the method itself is asked: (offset, length) -> data, None: ask the method.
        self._read_quick = read.fn if self._read_is_inline else quick_path_of(driver, "read_nowait")
        self._write_quick = quick_path_of(driver, "write_nowait")

        unwritable = traits.read_only or self._write is None
        if read_only is False and unwritable:
            raise UsageError(f"driver {self._label} cannot write: its device can only be read-only")
        self.read_only = unwritable or bool(read_only)
        self.can_write = not self.read_only
        self.can_flush = self.can_write and self._flush is not None
        self.can_fua = self.can_flush
        self.can_trim = self.can_write and self._trim is not None
        self.can_write_zeroes = self.can_write              # emulated if need be
        self.can_fast_zero = self.can_write and has_option(self._write_zeroes, "fast")
        self.can_cache = self._cache is not None
        # Without writes the promise is empty, and kept (NBD X7).
        self.can_multi_conn = self.read_only or traits.multi_conn

        # Home thread only, all of them.
        self._unaligned = self.block_size.minimum - 1       # the bits that offset and length must not have
        self._counts = counts = Counts()
        self._reads, self._writes = counts.reads, counts.writes
        self._life = Life(counts)
        self._changes = Changes(counts, self._begin, self._life.end, (self._write, self._write_fua))

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
            or self._life.state is not State.OPEN
        ):
            self._refuse("read", offset, length)
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
            return self._queue(self._read, (offset, length), self._end_read, caller)
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
            or not self.can_write
            or (fua and not self.can_fua)
            or self._life.state is not State.OPEN
        ):
            self._refuse("write", offset, length, fua=fua)
        if not length:
            return None
        assert self._write is not None, "can_write without a write method"
        if fua:
            own = self._write_fua
            step: Step = (own or self._write, (offset, data), {})
            return self._change(self._writes, length, step, flush=own is None)
        if self._write_is_inline:
            try:
                done = self._write.fn(offset, data)
            except Exception as error:
                self._fail(block_error_of(error, self._write.label), error)
            if type(done) is CoroutineType and self._write.way is Way.DIRECT:
                step = self._write, (offset, data), {}
                return self._changes.later(self._writes, length, iter([step]), Unrun(done))
            if done is not None:
                self._check_inline_write(done, offset, length)
        elif self._write_quick is None or not self._written_quickly(self._write_quick, offset, data):
            if caller is not None and self._write.way is Way.WORKER:
                return self._queue(self._write, (offset, data), self._end_write, caller)
            return self._changes.later(self._writes, length, iter([(self._write, (offset, data), {})]))
        self._writes[0] += 1
        self._writes[1] += length
        return None

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
        return self._change(self._counts.flushes, 0, (self._flush, (), {}), flush=False)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> Answer[None]:
        """Tell the driver that these bytes are of no more use; what they read as then is open (NBD TR1)."""
        self._check_change("trim", offset, length, fua, self.can_trim)
        if not length:
            return None
        assert self._trim is not None, "can_trim without a trim method"
        return self._change(self._counts.trims, length, (self._trim, (offset, length), {}), flush=fua)

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
        if self._write_zeroes is not None:
            options: dict[str, object] = {"may_trim": may_trim, "fast": True} if fast else {"may_trim": may_trim}
            step: Step = (self._write_zeroes, (offset, length), options)
            return self._change(self._counts.zeroings, length, step, flush=fua)
        assert self._write is not None, "can_write_zeroes without a write method"
        if length <= len(ZERO_PIECE):
            step = (self._write, (offset, ZERO_PIECE[:length]), {})
            return self._change(self._counts.zeroings, length, step, flush=fua)
        flush = self._flush if fua else None
        steps = zeroing_steps(self._write, offset, length, flush)
        return self._changes.later(self._counts.zeroings, length, steps)

    def cache(self, offset: int, length: int) -> Answer[None]:
        """Tell the driver that these bytes will be read soon; no more than a hint (NBD CA1)."""
        self._check_range("cache", offset, length)
        if self._cache is None:
            self._fail(BlockError(errno.EINVAL, f"driver {self._label} has no cache"))
        if not length:
            return None
        return self._change(self._counts.caches, length, (self._cache, (offset, length), {}), flush=False)

    def extents(self, offset: int, length: int, *, extents_max: int = EXTENTS_MAX) -> Answer[list[Extent]]:
        """Tell what the range is made of, from its offset on: see homeloop.block.extents.

        At least one extent and at most `extents_max`; they may end before the range does, never behind it. A
        driver that cannot tell has data everywhere, which is always a safe answer (NBD BS5). Zero bytes: EINVAL.
        """
        self._check_range("extents", offset, length)
        if not length:
            self._fail(BlockError(errno.EINVAL, f"extents of no bytes at {offset}"))
        if self._extents is None:
            return self._counted_extents([(length, False, False)])
        if self._extents.way not in AT_ONCE:
            return self._extents_waiting(self._extents, offset, length, extents_max)
        try:
            found = self._extents.now(offset, length)
            if type(found) is Unrun:
                return self._extents_waiting(self._extents, offset, length, extents_max, found)
            return self._counted_extents(self._read_extents(found, offset, length, extents_max))
        except BlockError:
            self._counts.errors += 1
            raise

    # Life

    async def drain(self) -> None:
        """Wait until nothing is in flight. Home thread.

        It refuses no new requests: stop their source first. Cancelling it changes nothing for the requests.
        """
        await self._life.drain()

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

    async def _read_waiting(self, offset: int, length: int, begun: Unrun | None = None) -> BytesLike:
        self._begin(begun)
        try:
            try:
                method = self._read
                data = await (method.later(offset, length) if begun is None else method.finish(begun))
            except BlockError:
                self._counts.errors += 1
                raise
            return self._read_checked(data, offset, length)
        finally:
            self._life.end()

    def _queue(
        self, method: Method, args: tuple[object, ...], done: Callable[[Queued], object], caller: Caller
    ) -> Queued:
        self._life.begin()
        queued = Queued(method.fn, args, done, caller)
        self._lane.put(queued)
        return queued

    def _end_read(self, queued: Queued) -> None:
        """A worker has read: check and count it, then tell the caller."""
        if queued.error is not None:
            queued.error = self._queued_error(self._read, queued.error)
        else:
            try:
                queued.answer = self._read_checked(queued.answer, *queued.args)
            except BlockError as error:
                queued.error = error
        self._life.end()
        queued.caller(queued)

    def _end_write(self, queued: Queued) -> None:
        """A worker has written: likewise."""
        offset, data = queued.args
        assert self._write is not None, "written without a write method"
        if queued.error is not None:
            queued.error = self._queued_error(self._write, queued.error)
        else:
            try:
                if queued.answer is not None:
                    self._check_inline_write(queued.answer, offset, len(data))
                self._writes[0] += 1
                self._writes[1] += len(data)
            except BlockError as error:
                queued.error = error
        self._life.end()
        queued.caller(queued)

    def _queued_error(self, method: Method, error: BaseException) -> BaseException:
        """What a worker raised, for the caller. The end of the home, and what ends a program, stays what it is."""
        self._counts.errors += 1
        if isinstance(error, ContextClosed) or not isinstance(error, Exception):
            return error
        failure = block_error_of(error, method.label)
        if failure is not error:
            failure.__cause__ = error
        return failure

    def _settled(self, method: Method, offset: int, length: int, extents_max: int) -> list[Extent]:
        """Call a plain extents method and read what it returns: a generator runs here, too. Any thread."""
        return self._read_extents(method.now(offset, length), offset, length, extents_max)

    def _read_extents(self, found: object, offset: int, length: int, extents_max: int) -> list[Extent]:
        label = f"{self._label}.extents"
        granule = self.block_size.minimum
        return read_extents(found, label, offset, length, granule=granule, extents_max=extents_max)

    def _counted_extents(self, found: list[Extent]) -> list[Extent]:
        self._counts.extents[0] += 1
        self._counts.extents[1] += sum(length for length, _, _ in found)
        return found

    async def _extents_waiting(
        self, method: Method, offset: int, length: int, extents_max: int, begun: Unrun | None = None
    ) -> list[Extent]:
        self._begin(begun)
        try:
            try:
                if method.way is Way.WORKER:
                    reading = method.running(self._settled, method, offset, length, extents_max)
                    return self._counted_extents(cast(list[Extent], await reading))
                found = await (method.later(offset, length) if begun is None else method.finish(begun))
                return self._counted_extents(self._read_extents(found, offset, length, extents_max))
            except BlockError:
                self._counts.errors += 1
                raise
        finally:
            self._life.end()

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

    def _change(self, counted: list[int], length: int, step: Step, *, flush: bool) -> Answer[None]:
        """Run one step, then flush if asked to: inline if both are."""
        steps = [step]
        if flush:
            assert self._flush is not None, "fua without a flush method"
            steps.append((self._flush, (), {}))
        return self._changes.run(counted, length, steps)

    def _begin(self, begun: Unrun | None) -> None:
        """Count a request in. Its first step: closing may have begun since it was checked."""
        if self._life.state is not State.OPEN:
            if begun is not None:
                begun.coroutine.close()     # now: the error's traceback may keep it longer
            text = f"device {self.name} is {self._life.state.value}, and the request had not begun"
            self._fail(BlockError(errno.ESHUTDOWN, text))
        self._life.begin()

    def _check_range(self, kind: str, offset: int, length: int) -> None:
        if (
            offset < 0
            or length < 0
            or offset + length > self.size
            or (offset | length) & self._unaligned
            or self._life.state is not State.OPEN
        ):
            self._refuse(kind, offset, length)

    def _check_change(self, kind: str, offset: int, length: int, fua: bool, can: bool) -> None:
        if (
            offset < 0
            or length < 0
            or offset + length > self.size
            or (offset | length) & self._unaligned
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

