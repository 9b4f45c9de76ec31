"""Copying one device to another, or comparing two: in lanes, many requests in flight in each, holes kept.

    result = await copy(source, target, plan, progress)

A lane is an IOThread with a side of both ends (see copy_ends). Lanes take regions of the device from one cursor. In a
region the source tells its extents; what it says is zero becomes zeroes of the target in one request, or nothing where
the target is known to be zero there. The rest is cut into requests, of which each lane has `requests` on their way.

Memory: lanes x requests x request_bytes, at most. The order of writes is open; there is one flush, after the last of
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final, TypeVar

from homeloop.block.extents import settle
from homeloop.block.zeroes import ZEROES, are_zeroes
from homeloop.core.iothread import IOThread
from homeloop.core.workers import to_worker
from homeloop.errors import BlockError, PeerError, UsageError
from homeloop.nbd.copy_ends import End, Side
from homeloop.nbd.sending import BytesLike

__all__ = ["CopyPlan", "CopyResult", "Lanes", "Moved", "check_ends", "compare", "copy"]

T = TypeVar("T")
_REGION_BYTES_MAX: Final = 1 << 30  # a sparse image of 1 TiB is asked for its extents 1024 times
_ZERO_GRAIN: Final = 64 << 10  # of detect_zeroes: a smaller hole costs more requests than it saves
_GRAIN_OF_ZEROES: Final = bytes(_ZERO_GRAIN)
_EXTENTS_MAX: Final = 1 << 14  # looked at at once


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """How to copy. request_bytes is lowered to what both ends take, lanes to how many they allow. For any thread."""

    lanes: int = 2
    requests: int = 16  # in flight, in each lane
    request_bytes: int = 256 << 10
    sparse: bool = True  # ask the source for its holes, and keep them
    detect_zeroes: bool = False  # also of what it calls data
    flush: bool = True


@dataclass(slots=True)
class Moved:
    """What has been done so far, in bytes; written by the lanes, one each; any thread may look."""

    data: int = 0
    zeroes: int = 0  # written as such
    skipped: int = 0  # zeroes that the target had


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyResult:
    """What was done, in bytes. A value, for any thread."""

    data: int
    zeroes: int
    skipped: int


@dataclass(slots=True)
class _Job:
    """What the lanes share."""

    source: End
    target: End
    plan: CopyPlan
    size: int
    granule: int
    request_bytes: int
    region_bytes: int
    lock: threading.Lock = field(default_factory=threading.Lock)  # a leaf
    next_region: int = 0  # under lock
    moved: list[Moved] = field(default_factory=list)  # one for each lane

    def take_region(self) -> tuple[int, int] | None:
        """The next (offset, length) that nobody has taken. Any thread."""
        with self.lock:
            offset = self.next_region
            self.next_region = min(offset + self.region_bytes, self.size)
            return None if offset == self.next_region else (offset, self.next_region - offset)



class Lanes:
    """The threads of copies, kept from one to the next: a device that has been used in one is at home there.

    `async with` it, in a coroutine of a homeloop context.
    """

    def __init__(self) -> None:
        self._threads: list[IOThread] = []

    async def __aenter__(self) -> Lanes:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._threads:
            await to_worker(self._threads.pop().stop)

    async def take(self, count: int) -> list[IOThread]:
        """The first so many, started."""
        while len(self._threads) < count:
            thread = IOThread(f"copy-{len(self._threads)}")
            try:
                await to_worker(thread.start)
            except BaseException:
                await to_worker(thread.stop)  # cancelled, it may run all the same
                raise
            self._threads.append(thread)
        return self._threads[:count]

    async def close(self, end: End) -> None:
        """Close an end where its device is at home."""
        (first,) = await self.take(1)
        await first.run(end.close())


def check_ends(source: End, target: End, *, writes: bool = True) -> None:
    """Raise UsageError if the one cannot be copied to the other. A target that is larger keeps its end."""
    if writes and target.read_only:
        raise UsageError(f"the target {target.spec} is read-only")
    if target.size < source.size:
        raise UsageError(
            f"the target {target.spec} has {target.size} bytes, the source {source.spec} {source.size}: it is too small"
        )
    if source.size % target.granule:
        raise UsageError(
            f"the source {source.spec} has {source.size} bytes: the target {target.spec} takes blocks of "
            f"{target.granule}"
        )


async def copy(
    source: End, target: End, plan: CopyPlan, moved: list[Moved] | None = None, *, lanes: Lanes | None = None
) -> CopyResult:
    """Copy all of source to the beginning of target. From a coroutine of a homeloop context.

    moved: filled with what each lane has done, to be looked at meanwhile. lanes: to use, where the ends are used again
    or are devices with a home; None: new ones. Cancelled: requests in flight are dropped or
    waited for, the lanes end. UsageError as check_ends(); BlockError that names the end, the request and its offset.
    """
    check_ends(source, target)
    return await _in_lanes(_job(source, target, plan, moved), _Copying, lanes, flush=plan.flush)


async def compare(
    source: End, target: End, plan: CopyPlan, moved: list[Moved] | None = None, *, lanes: Lanes | None = None
) -> CopyResult:
    """Read both and compare them, as far as source goes; BlockError with the offset of the first byte that was found
    to differ. Else as copy()."""
    check_ends(source, target, writes=False)
    return await _in_lanes(_job(source, target, plan, moved), _Comparing, lanes, flush=False)


def _job(source: End, target: End, plan: CopyPlan, moved: list[Moved] | None) -> _Job:
    granule = max(source.granule, target.granule)
    largest = min(plan.request_bytes, source.payload_bytes_max, target.payload_bytes_max)
    request_bytes = max(granule, largest - largest % granule)
    lanes = max(1, min(plan.lanes, source.lanes_max, target.lanes_max, -(-source.size // request_bytes)))
    # Several regions for each lane, so that none has nothing to do while another has all that is left.
    region_bytes = min(_REGION_BYTES_MAX, max(request_bytes, source.size // (lanes * 8)))
    region_bytes -= region_bytes % request_bytes
    job = _Job(source, target, plan, source.size, granule, request_bytes, region_bytes)
    job.moved = [] if moved is None else moved
    job.moved.extend(Moved() for _ in range(lanes))
    return job


async def _in_lanes(job: _Job, make: type[_Lane], kept: Lanes | None, *, flush: bool) -> CopyResult:
    """Run the job in IOThreads; flush; close what the lanes used."""
    async with contextlib.AsyncExitStack() as stack:
        if kept is None:
            kept = await stack.enter_async_context(Lanes())
        threads = await kept.take(len(job.moved))
        lanes = [make(job, moved) for moved in job.moved]
        for thread, lane in zip(threads, lanes, strict=True):
            # One by one: the first connection is there already, and one that cannot be had is no reason to begin.
            stack.push_async_callback(_run_in, thread, lane.close)
            await thread.run(lane.open())
        await _all([thread.run(lane.run()) for thread, lane in zip(threads, lanes, strict=True)])
        if flush:
            await threads[0].run(lanes[0].flush())
    return CopyResult(
        data=sum(moved.data for moved in job.moved),
        zeroes=sum(moved.zeroes for moved in job.moved),
        skipped=sum(moved.skipped for moved in job.moved),
    )


async def _run_in(thread: IOThread, what: Callable[[], Coroutine[object, object, None]]) -> None:
    await thread.run(what())


async def _all(work: list[Awaitable[None]]) -> None:
    """Wait for all; the first that fails ends the others, and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise
    failed = [task for task in done if not task.cancelled() and task.exception() is not None]
    if failed:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in failed or tasks:
        task.result()


class _Lane:
    """One lane's work. All but the constructor at its home."""

    def __init__(self, job: _Job, moved: Moved) -> None:
        self.job = job
        self.moved = moved
        self.source: Side
        self.target: Side
        self._open: list[Side] = []
        self._pieces: deque[tuple[int, int, bool]] = deque()  # offset, length, is zero
        self._looking = asyncio.Lock()  # for the next region's extents: one task, the others wait for it
        self._over = False

    async def open(self) -> None:
        """Open both sides."""
        job = self.job
        self.source = await _on(job.source, "source", "opening", job.source.side())
        self._open.append(self.source)
        self.target = await _on(job.target, "target", "opening", job.target.side())
        self._open.append(self.target)

    async def close(self) -> None:
        """Close what was opened."""
        while self._open:
            await self._open.pop().close()

    async def run(self) -> None:
        """Do pieces until there are no more."""
        await _all([self._work() for _ in range(self.job.plan.requests)])

    async def flush(self) -> None:
        """Bring all lanes' writes to stable storage: NBD X7 holds where there are several connections."""
        await _on(self.job.target, "target", "flush", self.target.flush())

    async def do_zeroes(self, offset: int, length: int) -> None:
        raise NotImplementedError

    async def do_data(self, offset: int, length: int) -> None:
        raise NotImplementedError

    async def _work(self) -> None:
        # Without a side that waits nobody else would come to run, and nobody could end us.
        yields = not (self.job.source.waits or self.job.target.waits)
        while self._pieces or await self._look():
            offset, length, zero = self._pieces.popleft()
            if zero:
                await self.do_zeroes(offset, length)
            else:
                await self.do_data(offset, length)
            if yields:
                await asyncio.sleep(0)

    async def _look(self) -> bool:
        """Find pieces to do, for all tasks of the lane; False if there are no more."""
        async with self._looking:
            while not self._pieces and not self._over:
                region = self.job.take_region()
                if region is None:
                    self._over = True
                else:
                    await self._look_at(*region)
            return bool(self._pieces)

    async def _look_at(self, offset: int, length: int) -> None:
        job, end = self.job, offset + length
        while offset < end:
            runs = [(end - offset, False, False)]
            if job.plan.sparse:
                what = f"extents of {end - offset} bytes at {offset}"
                told = await _on(job.source, "source", what, self.source.extents(offset, end - offset))
                spec, granule = job.source.spec, job.granule
                runs = settle(told, spec, offset, end - offset, granule=granule, extents_max=_EXTENTS_MAX)
            for run, _hole, zero in runs:
                if zero:
                    self._pieces.append((offset, run, True))
                    offset += run
                    continue
                run_end = offset + run
                while offset < run_end:
                    piece = min(job.request_bytes, run_end - offset)
                    self._pieces.append((offset, piece, False))
                    offset += piece

    async def read(self, offset: int, length: int) -> BytesLike:
        """Read from the source."""
        what = f"read of {length} bytes at {offset}"
        return await _on(self.job.source, "source", what, self.source.read(offset, length))

    async def zeroes_of_target(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """What the target says of a range: (offset, length, is zero)."""
        if self.job.target.is_zero:
            return [(offset, length, True)]
        runs = []
        while length:
            what = f"extents of {length} bytes at {offset}"
            told = await _on(self.job.target, "target", what, self.target.extents(offset, length))
            settled = settle(told, self.job.target.spec, offset, length, granule=self.job.granule)
            for run, _hole, zero in settled:
                runs.append((offset, run, zero))
                offset, length = offset + run, length - run
        return runs


class _Copying(_Lane):
    async def do_zeroes(self, offset: int, length: int) -> None:
        for at, run, zero in await self.zeroes_of_target(offset, length):
            if zero:
                self.moved.skipped += run
                continue
            what = f"zeroes, {run} bytes at {at}"
            await _on(self.job.target, "target", what, self.target.zero(at, run))
            self.moved.zeroes += run

    async def do_data(self, offset: int, length: int) -> None:
        data = await self.read(offset, length)
        if self.job.plan.sparse and are_zeroes(data):
            await self.do_zeroes(offset, length)
        elif self.job.plan.detect_zeroes:
            for at, run, zero in _runs(data):
                if zero:
                    await self.do_zeroes(offset + at, run)
                else:
                    await self._write(offset + at, memoryview(data)[at : at + run])
        else:
            await self._write(offset, data)

    async def _write(self, offset: int, data: BytesLike) -> None:
        length = len(data)
        what = f"write of {length} bytes at {offset}"
        await _on(self.job.target, "target", what, self.target.write(offset, data))
        self.moved.data += length


class _Comparing(_Lane):
    async def do_zeroes(self, offset: int, length: int) -> None:
        step = self.job.request_bytes
        for at, run, zero in await self.zeroes_of_target(offset, length):
            if zero:
                self.moved.skipped += run
                continue
            for piece_at in range(at, at + run, step):
                piece = min(step, at + run - piece_at)
                self._check(piece_at, bytes(piece), await self._read_target(piece_at, piece))

    async def do_data(self, offset: int, length: int) -> None:
        self._check(offset, await self.read(offset, length), await self._read_target(offset, length))

    async def _read_target(self, offset: int, length: int) -> BytesLike:
        what = f"read of {length} bytes at {offset}"
        return await _on(self.job.target, "target", what, self.target.read(offset, length))

    def _check(self, offset: int, ours: BytesLike, theirs: BytesLike) -> None:
        # A memoryview is compared byte by byte, bytes all at once.
        ours = bytes(ours) if isinstance(ours, memoryview) else ours
        theirs = bytes(theirs) if isinstance(theirs, memoryview) else theirs
        if ours != theirs:
            at = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            raise BlockError(
                errno.EIO, f"{self.job.source.spec} and {self.job.target.spec} differ at byte {offset + at}"
            )
        self.moved.data += len(ours)


def _runs(data: BytesLike) -> list[tuple[int, int, bool]]:
    """Tell zeroes from the rest in grains: (offset, length, is zero), neighbours differ."""
    if isinstance(data, memoryview):
        data = bytes(data)
    runs: list[tuple[int, int, bool]] = []
    for at in range(0, len(data), _ZERO_GRAIN):
        grain = min(_ZERO_GRAIN, len(data) - at)
        zero = data.startswith(_GRAIN_OF_ZEROES if grain == _ZERO_GRAIN else ZEROES[:grain].tobytes(), at)
        if runs and runs[-1][2] == zero:
            before = runs.pop()
            runs.append((before[0], before[1] + grain, zero))
        else:
            runs.append((at, grain, zero))
    return runs


async def _on(end: End, which: str, what: str, work: Awaitable[T]) -> T:
    """Await work on one end; its errors say on which, and what it was."""
    try:
        return await work
    except BlockError as error:
        raise BlockError(error.errno, f"{which} {end.spec}: {what}: {error.text}") from error
    except PeerError as error:
        raise BlockError(errno.EPROTO, f"{which} {end.spec}: {what}: {error}") from error
    except OSError as error:
        raise BlockError(error.errno or errno.EIO, f"{which} {end.spec}: {what}: {error.strerror or error}") from error
