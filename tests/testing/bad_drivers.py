"""Drivers with one fault each: BAD says which check finds it, and what its message says."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from homeloop.block.driver import BytesLike
from homeloop.block.memory import Memory

SIZE = 300 << 10


class _Memory(Memory):
    def __init__(self) -> None:
        super().__init__(SIZE)


class ShortRead(_Memory):
    def read(self, offset: int, length: int) -> BytesLike:
        return super().read(offset, min(length, 60_000))


class SharedAnswer(_Memory):
    """Answers every read with a view of the same buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = bytearray(SIZE)

    def read(self, offset: int, length: int) -> BytesLike:
        self._buffer[:length] = super().read(offset, length)
        return memoryview(self._buffer)[:length]


class LiveAnswer:
    """Answers reads with views of what it holds."""

    size = SIZE
    thread_model = "inline"

    def __init__(self) -> None:
        self._data = bytearray(SIZE)

    def read(self, offset: int, length: int) -> BytesLike:
        return memoryview(self._data)[offset : offset + length]

    def write(self, offset: int, data: BytesLike) -> None:
        self._data[offset : offset + len(data)] = data


class LostTail(_Memory):
    def write(self, offset: int, data: BytesLike) -> None:
        super().write(offset, data[: len(data) - len(data) % 512] if len(data) > 512 else data)


class OneByteOff(_Memory):
    """Writes one byte too many."""

    def write(self, offset: int, data: BytesLike) -> None:
        end = offset + len(data)
        super().write(offset, bytes(data) + (b"\xa5" if end < SIZE and len(data) == 513 else b""))


class FirstCounts(_Memory):
    """Keeps what was written first where writes overlap at their beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self._last = (0, 0)

    def write(self, offset: int, data: BytesLike) -> None:
        start, stop = self._last
        skip = stop - offset if start < offset < stop < offset + len(data) else 0
        super().write(offset + skip, memoryview(data)[skip:])
        self._last = offset, offset + len(data)


class KeptBuffer(_Memory):
    """Writes later what it was given, from the caller's own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._later: list[tuple[int, BytesLike]] = []

    def read(self, offset: int, length: int) -> BytesLike:
        for where, data in self._later:
            super().write(where, data)
        self._later.clear()
        return super().read(offset, length)

    def write(self, offset: int, data: BytesLike) -> None:
        self._later.append((offset, data))


class WrongCount(_Memory):
    def write(self, offset: int, data: BytesLike) -> int:      # type: ignore[override]
        super().write(offset, data)
        return len(data) - 1


class ZeroesWholeBlocks(_Memory):
    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        first = -(-offset // 4096) * 4096
        last = (offset + length) // 4096 * 4096
        if first < last:
            self.trim(first, last - first)


class FastButChanged(_Memory):
    """Refuses to zero fast, when it has done half of it."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        self.trim(offset, max(1, length // 2) if fast else length)
        if fast:
            raise OSError(errno.ENOTSUP, "no")


class FastFails(_Memory):
    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        if fast:
            raise OSError(errno.EPERM, "not fast")
        self.trim(offset, length)


class TrimsTooMuch(_Memory):
    def trim(self, offset: int, length: int) -> None:
        super().trim(offset - offset % 4096, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        Memory.trim(self, offset, length)


class FlushFails(_Memory):
    def flush(self) -> None:
        raise OSError(errno.EIO, "cannot flush")


class FlushForgets(_Memory):
    def flush(self) -> None:
        self._pages.clear()


class ZeroLies(_Memory):
    def extents(self, offset: int, length: int) -> Iterator[tuple[int, bool, bool]]:
        yield length, False, True


class ExtentsOfNothing(_Memory):
    def extents(self, offset: int, length: int) -> Iterator[tuple[int, bool, bool]]:
        yield 0, False, False


class CacheScribbles(_Memory):
    def cache(self, offset: int, length: int) -> None:
        super().write(offset, b"x")


class StaleQuickRead(_Memory):
    thread_model = "serialised"

    def read_nowait(self, offset: int, length: int) -> bytes:
        return bytes(length)


class _Filling(_Memory):
    """On a worker, where read_into is used."""

    thread_model = "serialised"
    read_nowait = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))


class FillsTooLittle(_Filling):
    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer[: len(buffer) - len(buffer) // 1000])


class FillsLater(_Filling):
    """Keeps the buffer, and uses it once more with the next."""

    kept: memoryview | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        if self.kept is not None:
            self.kept[:] = bytes(len(self.kept))
        self.kept = buffer


class ReadIsAnother(_Filling):
    """Its read_into is right."""

    def read(self, offset: int, length: int) -> BytesLike:
        return bytes(length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = super().read(offset, len(buffer))


class TakesLessThanItSays(_Memory):
    request_bytes_max = 8192

    def write(self, offset: int, data: BytesLike) -> None:
        super().write(offset, data[:4096])


class _Blocks(_Memory):
    block_size_min = 4096


class BlocksAreSwapped(_Blocks):
    """Of two blocks at once it writes the second twice."""

    def write(self, offset: int, data: BytesLike) -> None:
        super().write(offset, data)
        if len(data) == 4096:
            super().write(offset, bytes(data[:1]) + bytes(data[:-1]))


class KeepsItsSize(_Memory):
    def resize(self, size: int) -> None:
        """Say nothing of it in `size`."""


class ResizesToNothing(_Memory):
    def resize(self, size: int) -> None:
        self._pages.clear()
        super().resize(size)


class RefusesToResizeAndForgets(_Memory):
    def resize(self, size: int) -> None:
        self._pages.clear()
        raise OSError(errno.ENOTSUP, "not this one")


class ResizeFails(_Memory):
    def resize(self, size: int) -> None:
        raise OSError(errno.EIO, "no such luck")


class SharedPosition:
    """Seeks and reads in two steps, and calls itself parallel; the barrier brings two together."""

    size = SIZE
    thread_model = "parallel"

    def __init__(self) -> None:
        self._memory = Memory(SIZE)
        self._position = 0
        self._both = threading.Barrier(2)

    def _seek(self, offset: int) -> None:
        self._position = offset
        try:
            self._both.wait(0.002)
        except threading.BrokenBarrierError:
            self._both.reset()

    def read(self, offset: int, length: int) -> bytes:
        self._seek(offset)
        return bytes(self._memory.read(min(self._position, SIZE - length), length))

    def write(self, offset: int, data: BytesLike) -> None:
        self._memory.write(offset, bytes(data))


class _Async:
    size = SIZE

    def __init__(self) -> None:
        self._memory = Memory(SIZE)

    async def read(self, offset: int, length: int) -> bytes:
        await asyncio.sleep(0)
        return bytes(self._memory.read(offset, length))

    async def write(self, offset: int, data: BytesLike) -> None:
        await asyncio.sleep(0)
        self._memory.write(offset, data)


class LockIsNotGivenBack(_Async):
    """Cancelled, it keeps its lock: nothing is answered after that."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = asyncio.Lock()

    async def read(self, offset: int, length: int) -> bytes:
        await self._lock.acquire()
        data = await super().read(offset, length)
        self._lock.release()
        return data


class CancelledIsAnError(_Async):
    async def read(self, offset: int, length: int) -> bytes:
        try:
            return await super().read(offset, length)
        except asyncio.CancelledError:
            raise OSError(errno.EINTR, "interrupted") from None


class WedgedByAnError(_Memory):
    """After one failure it fails for ever."""

    fail = False

    def read(self, offset: int, length: int) -> BytesLike:
        if self.fail:
            raise OSError(errno.EIO, "broken")
        return super().read(offset, length)


class CloseFails(_Memory):
    def close(self) -> None:
        raise OSError(errno.EIO, "cannot close")


class Growing(_Memory):
    """Its size changes with each read."""

    def read(self, offset: int, length: int) -> BytesLike:
        self.size += 512
        return super().read(offset, length)


class NeverAnswers(_Async):
    async def read(self, offset: int, length: int) -> bytes:
        await asyncio.Event().wait()
        return b""


class OddSize(_Memory):
    block_size_min = 4096

    def __init__(self) -> None:
        super().__init__()
        self.size = SIZE + 1


@dataclass(frozen=True)
class Bad:
    """A bad driver, the check that finds it, and words of the message."""

    make: Callable[[], Any]
    check: str
    text: str


BAD = [
    Bad(ShortRead, "reads", "returned 60000 of"),
    Bad(SharedAnswer, "read_answers_are_kept", "changed with a later request: return a copy"),
    Bad(LiveAnswer, "read_answers_are_kept", "changed with a later request: return a copy"),
    Bad(LostTail, "writes", "bytes at"),
    Bad(OneByteOff, "writes", "after a write of 513 bytes"),
    Bad(FirstCounts, "overlapping_writes", "after overlapping writes"),
    Bad(KeptBuffer, "written_data_is_copied", "copy what is kept"),
    Bad(WrongCount, "writes", "WrongCount.write returned"),
    Bad(ZeroesWholeBlocks, "zeroes", "after write_zeroes(may_trim="),
    Bad(FastButChanged, "zeroes", "fast=True"),
    Bad(FastFails, "zeroes", "ENOTSUP is how to say"),
    Bad(TrimsTooMuch, "trim", "after a trim of"),
    Bad(FlushFails, "flush", "flush failed: EIO"),
    Bad(FlushForgets, "flush", "after a write with fua"),
    Bad(ZeroLies, "extents", "extents say that"),
    Bad(ExtentsOfNothing, "extents", "extent of length 0"),
    Bad(CacheScribbles, "cache", "after cache"),
    Bad(StaleQuickRead, "quick_paths", "read_nowait and read do not agree"),
    Bad(FillsTooLittle, "read_into", "bytes at"),
    Bad(FillsLater, "read_into", "changed with a later request"),
    Bad(ReadIsAnother, "read_into", "bytes at"),
    Bad(TakesLessThanItSays, "request_bytes_max", "a request of 8192 bytes, with request_bytes_max=8192: "),
    Bad(BlocksAreSwapped, "emulated_alignment", "bytes at"),
    Bad(KeepsItsSize, "resize", f"after a resize from {SIZE} to {SIZE + 1} bytes its size is {SIZE}"),
    Bad(ResizesToNothing, "resize", f"after a resize to {SIZE + 1} bytes: "),
    Bad(RefusesToResizeAndForgets, "resize", f"after a resize from {SIZE} to {SIZE + 1} bytes that was refused: "),
    Bad(ResizeFails, "resize", "bytes failed: EIO: ResizeFails.resize"),
    Bad(SharedPosition, "concurrent_requests", "requests in flight"),
    Bad(LockIsNotGivenBack, "cancelled_requests", "it hangs"),
    Bad(CancelledIsAnError, "cancelled_requests", "let CancelledError pass"),
    Bad(WedgedByAnError, "errors", "failed: EIO: WedgedByAnError.read"),
    Bad(CloseFails, "close", "close failed: EIO"),
    Bad(Growing, "traits", "changed by being used"),
    Bad(NeverAnswers, "reads", "it hangs"),
    Bad(OddSize, "traits", "not a multiple of its block_size_min"),
]
