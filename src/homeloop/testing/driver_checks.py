"""What a driver must do, one function for each thing: see homeloop.testing.drivers for how they are run.

A check gets a Bench with a driver that nobody used before. It raises AssertionError, saying what was asked and what
came; what the bench asks in vain is one, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from asyncio import iscoroutine
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeAlias, cast

from homeloop.block.device import Device
from homeloop.block.driver import Driver, traits_of
from homeloop.block.filters.requests import Request, perform
from homeloop.errors import BlockError

__all__ = ["CHECKS", "Bench", "Check", "Skipped"]

# Of the driver, what is looked at: so much from its start, and so much before its end.
_WINDOW: Final = 1 << 20
_LENGTHS: Final = (1, 511, 512, 513, 4096, 10_000, 65_536, 65_537, 200_000)
_CONCURRENT: Final = 16


class Skipped(Exception):
    """The check is about something that this driver does not have."""


class Bench:
    """One driver behind a Device, and a bytearray that says what its windows must hold."""

    def __init__(self, driver: Driver, *, seed: int, moves: int, fail_next: Callable[[Any], object] | None) -> None:
        self.driver = driver
        self.device = Device(driver)
        self.chance = random.Random(seed)
        self.moves = moves
        self.fail_next = fail_next
        self.requests = 0
        self.granule = self.device.block_size.minimum
        size = self.device.size
        window = min(size, _WINDOW)
        window -= window % self.granule
        self.windows = sorted({(0, window), (size - window, size)})     # (start, end), perhaps overlapping
        if len(self.windows) == 2 and self.windows[1][0] < window:
            self.windows = [(0, size)]

    def needs(self, ability: bool, what: str) -> None:
        if not ability:
            raise Skipped(f"the driver has no {what}")

    def needs_room(self) -> None:
        if self.device.size < 4 * self.granule:
            raise Skipped(f"{self.device.size} bytes are too few")

    async def ask(self, request: Request) -> Any:
        """Ask and wait for the answer. AssertionError if it is an error: nothing that the checks ask is wrong."""
        self.requests += 1
        try:
            answer = perform(self.device, request)
            return await answer if iscoroutine(answer) else answer
        except BlockError as error:
            cause = error.__cause__ if error.__cause__ is not None else error
            raise AssertionError(f"{request} failed: {error}") from cause

    async def close(self) -> None:
        """Close the device. AssertionError if that fails; twice is fine."""
        try:
            await self.device.close()
        except BlockError as error:
            raise AssertionError(f"close failed: {error}") from error

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(await self.ask(Request("read", offset, length)))

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await self.ask(Request("write", offset, len(data), data, fua=fua))

    async def fill(self, start: int, end: int) -> bytearray:
        """Write random bytes; return them."""
        data = bytearray(self.chance.randbytes(end - start))
        for at in range(0, len(data), 1 << 18):
            await self.write(start + at, bytes(data[at : at + (1 << 18)]))
        return data

    async def contents(self, start: int, end: int) -> bytearray:
        """What a range holds: random bytes, if the driver can write."""
        if self.device.can_write:
            return await self.fill(start, end)
        return bytearray(await self.read(start, end - start))

    async def expect(self, offset: int, wanted: bytes | bytearray, after: str) -> None:
        """Read, and compare: the message says which byte is wrong."""
        found = await self.read(offset, len(wanted))
        if found != wanted:
            at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
            count = sum(a != b for a, b in zip(found, wanted, strict=True))
            raise AssertionError(
                f"{after}: {count} of {len(wanted)} bytes at {offset} are wrong, the first at {offset + at}: "
                f"{found[at]:#04x}, not {wanted[at]:#04x}"
            )

    def up(self, number: int) -> int:
        return -(-number // self.granule) * self.granule

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges with edges in odd places, at the start, the middle and the end of each window."""
        for start, end in self.windows:
            for length in _LENGTHS:
                length = self.up(length)
                middle = start + self.up((end - start) // 3)
                for offset in (start, middle, end - length):
                    if start <= offset and offset + length <= end:
                        yield offset, length

    def random_range(self, start: int, end: int) -> tuple[int, int]:
        granules = (end - start) // self.granule
        first = self.chance.randrange(granules)
        most = min(granules - first, max(1, self.chance.choice(_LENGTHS) // self.granule))
        return start + first * self.granule, self.chance.randint(1, most) * self.granule


async def _check_traits(bench: Bench) -> None:
    """Its attributes say the same whenever they are asked."""
    before = traits_of(bench.driver)
    start, end = bench.windows[0]
    if end > start:
        await bench.ask(Request("extents", 0, bench.granule))
        await bench.read(start, bench.granule)
    after = traits_of(bench.driver)
    assert before == after, f"its attributes changed by being used: {before}, then {after}"


async def _check_reads(bench: Bench) -> None:
    """Reads of every length at every place return so many bytes, and the same as one large read."""
    for start, end in bench.windows:
        whole = await bench.read(start, end - start) if end > start else b""
        for offset, length in bench.ranges():
            if start <= offset and offset + length <= end:
                await bench.expect(offset, whole[offset - start : offset - start + length], "read again, in parts")


async def _check_read_answers_are_kept(bench: Bench) -> None:
    """What a read returned does not change when the device does, nor with the next read."""
    bench.needs_room()
    offset, length = bench.windows[0][0], min(bench.up(4096), bench.windows[0][1])
    if bench.device.can_write:
        await bench.fill(offset, offset + length)
    answer = await bench.ask(Request("read", offset, length))
    kept = bytes(answer)
    await bench.read(bench.windows[-1][1] - length, length)
    if bench.device.can_write:
        await bench.write(offset, bytes(byte ^ 0xFF for byte in kept))
    assert bytes(answer) == kept, (
        f"the bytes that read returned for {length} bytes at {offset} changed with a later request: return a copy"
    )


async def _check_writes(bench: Bench) -> None:
    """A write changes its bytes, and none beside it."""
    bench.needs(bench.device.can_write, "write")
    for start, end in bench.windows:
        model = await bench.fill(start, end)
        await bench.expect(start, model, "after filling it")
        for offset, length in bench.ranges():
            if start <= offset and offset + length <= end:
                data = bench.chance.randbytes(length)
                await bench.write(offset, data)
                model[offset - start : offset - start + length] = data
                around = max(start, offset - bench.granule), min(end, offset + length + bench.granule)
                await bench.expect(
                    around[0], model[around[0] - start : around[1] - start],
                    f"after a write of {length} bytes at {offset}",
                )
        await bench.expect(start, model, "after writes of every length")


async def _check_overlapping_writes(bench: Bench) -> None:
    """Of writes one after the other, the last counts where they overlap."""
    bench.needs(bench.device.can_write, "write")
    bench.needs_room()
    for start, end in bench.windows:
        model = await bench.fill(start, end)
        step = max(bench.granule, bench.up(min(50_000, (end - start) // 8)))
        for offset in range(start, end - 2 * step, step):
            data = bench.chance.randbytes(2 * step)
            await bench.write(offset, data)
            model[offset - start : offset - start + 2 * step] = data
        await bench.expect(start, model, "after overlapping writes")


async def _check_written_data_is_copied(bench: Bench) -> None:
    """The buffer of a write is the caller's again when the write has returned."""
    bench.needs(bench.device.can_write, "write")
    bench.needs_room()
    start, end = bench.windows[0]
    for length in (bench.granule, min(bench.up(65_536), end - start)):
        buffer = bytearray(bench.chance.randbytes(length))
        wanted = bytes(buffer)
        await bench.ask(Request("write", start, length, memoryview(buffer)))
        buffer[:] = bytes(byte ^ 0xFF for byte in wanted)
        await bench.expect(start, wanted, "after the caller used the buffer of the write again (copy what is kept)")


async def _check_zeroes(bench: Bench) -> None:
    """write_zeroes zeroes its bytes and none beside it, as a hole or not; a fast one does it, or changes nothing."""
    bench.needs(bench.device.can_write_zeroes, "write")
    ways = [(True, False), (False, False)] + ([(True, True), (False, True)] if bench.device.can_fast_zero else [])
    for start, end in bench.windows:
        model = await bench.fill(start, end)
        for number, (offset, length) in enumerate(bench.ranges()):
            if not (start <= offset and offset + length <= end):
                continue
            may_trim, fast = ways[number % len(ways)]
            request = Request("write_zeroes", offset, length, may_trim=may_trim, fast=fast)
            if await _zeroed(bench, request):
                model[offset - start : offset - start + length] = bytes(length)
            name = f"after write_zeroes(may_trim={may_trim}, fast={fast}) of {length} bytes at {offset}"
            await bench.expect(start, model, name)
            data = bench.chance.randbytes(length)       # and a hole can be written again
            await bench.write(offset, data)
            model[offset - start : offset - start + length] = data
        await bench.expect(start, model, "after zeroes and writes in turns")


async def _zeroed(bench: Bench, request: Request) -> bool:
    """Ask for zeroes; False if a fast one was refused, as it may be."""
    if not request.fast:
        await bench.ask(request)
        return True
    try:
        answer = perform(bench.device, request)
        if iscoroutine(answer):
            await answer
    except BlockError as error:
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
            return False
        raise AssertionError(
            f"{request} with fast failed with {error}: ENOTSUP is how to say that it would be no faster"
        ) from error
    return True


async def _check_trim(bench: Bench) -> None:
    """A trim harms nothing beside it, and what its bytes read as then stays so until they are written."""
    bench.needs(bench.device.can_trim, "trim")
    bench.needs_room()
    for start, end in bench.windows:
        model = await bench.fill(start, end)
        for offset, length in bench.ranges():
            if start <= offset and offset + length <= end:
                await bench.ask(Request("trim", offset, length))
                model[offset - start : offset - start + length] = await bench.read(offset, length)
                await bench.expect(start, model, f"after a trim of {length} bytes at {offset}")
        data = bench.chance.randbytes(bench.granule)
        await bench.write(start, data)
        model[: bench.granule] = data
        await bench.expect(start, model, "after a write where it was trimmed")


async def _check_flush(bench: Bench) -> None:
    """A flush, and a write with fua, succeed and change nothing; also on a device that nobody wrote to."""
    bench.needs(bench.device.can_flush, "flush")
    await bench.ask(Request("flush"))
    start, end = bench.windows[0]
    if end > start:
        data = bench.chance.randbytes(bench.granule)
        await bench.write(start, data, fua=True)
        await bench.expect(start, data, "after a write with fua")
        await bench.ask(Request("flush"))
        await bench.expect(start, data, "after a flush")


async def _check_extents(bench: Bench) -> None:
    """Extents cover what was asked for, piece by piece, and what they call zero reads as zeroes."""
    for start, end in bench.windows:
        if end == start:
            raise Skipped("it has no bytes")
        if bench.device.can_write:
            await bench.fill(start, end)
            for offset, length in ((start, (end - start) // 4), (start + (end - start) // 2, (end - start) // 8)):
                offset, length = bench.up(offset), bench.up(length)
                if offset + length <= end:
                    await bench.ask(Request("write_zeroes", offset, length))
        await _compare_extents(bench, start, end)
        for _ in range(8):
            offset, length = bench.random_range(start, end)
            await _compare_extents(bench, offset, offset + length)


async def _compare_extents(bench: Bench, start: int, end: int) -> None:
    offset = start
    while offset < end:
        for length, hole, zero in await bench.ask(Request("extents", offset, end - offset)):
            if zero:
                kind = "a hole that reads as zeroes" if hole else "zeroes"
                after = f"extents say that {length} bytes at {offset} are {kind}"
                await bench.expect(offset, bytes(length), after)
            offset += length
    assert offset == end, f"extents of {end - start} bytes at {start} end at {offset}"


async def _check_cache(bench: Bench) -> None:
    """cache is a hint: it succeeds, and nothing is changed by it."""
    bench.needs(bench.device.can_cache, "cache")
    for start, end in bench.windows:
        before = await bench.read(start, end - start)
        for offset, length in bench.ranges():
            await bench.ask(Request("cache", offset, length))
        await bench.expect(start, before, "after cache")


class _Slow:
    """A driver without its quick path."""

    read_nowait = None

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


async def _check_quick_paths(bench: Bench) -> None:
    """read_nowait says what read says, or None. (Behind a Device the writes of write_nowait are in every check.)"""
    quick = getattr(bench.driver, "read_nowait", None)
    bench.needs(quick is not None, "read_nowait")
    start, end = bench.windows[0]
    if bench.device.can_write:
        await bench.fill(start, end)
    slow = Device(cast(Driver, _Slow(bench.driver)))
    assert quick is not None
    for offset, length in bench.ranges():
        if offset + length <= end:
            data = quick(offset, length)
            answer = slow.read(offset, length)
            wanted = bytes(await answer if iscoroutine(answer) else answer)
            assert data is None or bytes(data) == wanted, (
                f"read_nowait and read do not agree about {length} bytes at {offset}"
            )


async def _check_random_requests(bench: Bench) -> None:
    """Any requests in any order: the device is a bytearray."""
    for start, end in bench.windows:
        if end - start < bench.granule:
            raise Skipped("it has no bytes")
        model = await bench.contents(start, end)
        for number in range(bench.moves):
            await _random_move(bench, start, end, model, f"move {number}")
        await bench.expect(start, model, f"after {bench.moves} random requests")


async def _random_move(bench: Bench, start: int, end: int, model: bytearray, where: str) -> None:
    device = bench.device
    offset, length = bench.random_range(start, end)
    at = slice(offset - start, offset - start + length)
    kind = bench.chance.choice(("read", "read", "write", "write", "write_zeroes", "trim", "flush", "extents", "cache"))
    fua = device.can_fua and bench.chance.random() < 0.1
    if kind == "read":
        await bench.expect(offset, model[at], where)
    elif kind == "write" and device.can_write:
        data = bench.chance.randbytes(length)
        await bench.write(offset, data, fua=fua)
        model[at] = data
    elif kind == "write_zeroes" and device.can_write_zeroes:
        may_trim = bench.chance.random() < 0.5
        await bench.ask(Request(kind, offset, length, may_trim=may_trim))
        model[at] = bytes(length)
    elif kind == "trim" and device.can_trim:
        await bench.ask(Request(kind, offset, length))
        model[at] = await bench.read(offset, length)
    elif kind == "flush" and device.can_flush:
        await bench.ask(Request(kind))
    elif kind == "extents":
        await _compare_extents(bench, offset, offset + length)
    elif kind == "cache" and device.can_cache:
        await bench.ask(Request(kind, offset, length))


async def _check_concurrent_requests(bench: Bench) -> None:
    """Many requests in flight at once, each actor in blocks of its own that lie between those of the others."""
    start, end = bench.windows[0]
    piece = max(bench.granule, bench.up(1000))
    if end - start < _CONCURRENT * piece:
        raise Skipped(f"{bench.device.size} bytes are too few")
    rounds = min((end - start) // (_CONCURRENT * piece), 24)
    before = bytearray(await bench.read(start, end - start))
    wanted = bytearray(before)

    async def act(number: int, chance: random.Random) -> None:
        for turn in range(rounds):
            offset = start + (turn * _CONCURRENT + number) * piece
            at = slice(offset - start, offset - start + piece)
            if bench.device.can_write and chance.random() < 0.7:
                wanted[at] = data = chance.randbytes(piece)
                await bench.write(offset, data)
            await bench.expect(offset, wanted[at], f"with {_CONCURRENT} requests in flight")

    seeds = [bench.chance.randrange(2**32) for _ in range(_CONCURRENT)]
    await _all_of([act(number, random.Random(seed)) for number, seed in enumerate(seeds)])
    await bench.expect(start, wanted, f"after {_CONCURRENT} actors at once")


async def _check_cancelled_requests(bench: Bench) -> None:
    """Cancelled requests leave the others, and the bytes beside them, alone; the next are answered."""
    start, end = bench.windows[0]
    piece = max(bench.granule, bench.up(4096))
    if end - start < 8 * piece:
        raise Skipped(f"{bench.device.size} bytes are too few")
    wanted = await bench.contents(start, end)
    waited = False
    for steps in range(8):
        offset = start + steps % 4 * 2 * piece
        new = bench.chance.randbytes(piece)
        requests = [Request("read", offset, piece)]
        if bench.device.can_write:
            requests.append(Request("write", offset, piece, new))
        for request in requests:
            answer = perform(bench.device, request)
            if not iscoroutine(answer):
                if request.kind == "write":
                    wanted[offset - start : offset - start + piece] = new
                continue
            waited = True
            await _cancelled_after(answer, steps, request)
            if request.kind == "write":                 # done, in part, or not: each byte is the old or the new
                _settle(wanted, offset - start, new, await bench.read(offset, piece), request)
        assert bench.device.in_flight == 0, f"{bench.device.in_flight} requests in flight after they were cancelled"
    await bench.expect(start, wanted, "after cancelled requests")
    if not waited:
        raise Skipped("it answers inline: nothing to cancel")


async def _cancelled_after(answer: Any, steps: int, request: Request) -> None:
    task = asyncio.ensure_future(answer)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    except BlockError as error:
        text = f"{request} failed because it was cancelled, with {error}: let CancelledError pass"
        raise AssertionError(text) from error


def _settle(wanted: bytearray, at: int, new: bytes, found: bytes, request: Request) -> None:
    old = wanted[at : at + len(new)]
    wrong = [i for i, byte in enumerate(found) if byte not in (old[i], new[i])]
    assert not wrong, f"{request} was cancelled: {len(wrong)} bytes are neither the old nor the new ones"
    wanted[at : at + len(new)] = found


async def _check_errors(bench: Bench) -> None:
    """A request that fails is that one's affair: the next succeed. Needs `fail_next`."""
    if bench.fail_next is None:
        raise Skipped("no fail_next was given")
    start, end = bench.windows[0]
    wanted = await bench.contents(start, end)
    for _ in range(3):
        done = bench.fail_next(bench.driver)
        if isinstance(done, Awaitable):
            await done
        failed: BlockError | None = None
        try:
            answer = bench.device.read(start, bench.granule)
            if iscoroutine(answer):
                await answer
        except BlockError as error:
            failed = error
        assert failed is not None, "fail_next was called, and the next read succeeded"
        await bench.expect(start, wanted, "after a request that failed")
    assert bench.device.in_flight == 0, f"{bench.device.in_flight} requests in flight after they failed"


async def _check_close(bench: Bench) -> None:
    """close() ends, after use; whatever was written and flushed before does not hinder it."""
    start, end = bench.windows[0]
    if end > start:
        if bench.device.can_write:
            await bench.write(start, bytes(bench.granule))
        else:
            await bench.read(start, bench.granule)
    await bench.close()


async def _all_of(coroutines: list[Any]) -> None:
    """Run all to their ends; raise the first failure."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


Check: TypeAlias = Callable[[Bench], Awaitable[None]]
CHECKS: Final[tuple[Check, ...]] = (
    _check_traits,
    _check_reads,
    _check_read_answers_are_kept,
    _check_writes,
    _check_overlapping_writes,
    _check_written_data_is_copied,
    _check_zeroes,
    _check_trim,
    _check_flush,
    _check_extents,
    _check_cache,
    _check_quick_paths,
    _check_random_requests,
    _check_concurrent_requests,
    _check_cancelled_requests,
    _check_errors,
    _check_close,
)
