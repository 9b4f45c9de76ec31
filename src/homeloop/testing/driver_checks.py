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
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias, cast

from homeloop.block.driver import PAYLOAD_BYTES_MAX, Driver, traits_of
from homeloop.block.filters.requests import Request, perform
from homeloop.errors import BlockError
from homeloop.testing.driver_bench import Bench, Skipped

__all__ = ["CHECKS", "Check"]

_CONCURRENT: Final = 16
_NO_RESIZE: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EFBIG, errno.ENOSPC)


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


class _Without:
    """A driver without some of its methods; subclasses have the driver's name."""

    def __init__(self, driver: Driver, hidden: tuple[str, ...]) -> None:
        self._driver = driver
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(name)
        return getattr(self._driver, name)


def _without(bench: Bench, *hidden: str) -> Bench:
    """A bench for the same driver, as if it did not have these methods."""
    named = type(type(bench.driver).__name__, (_Without,), {})
    return Bench(cast(Driver, named(bench.driver, hidden)), seed=bench.seed, moves=bench.moves)


async def _check_quick_paths(bench: Bench) -> None:
    """read_nowait says what read says, or None. (Behind a Device the writes of write_nowait are in every check.)"""
    quick = getattr(bench.driver, "read_nowait", None)
    bench.needs(quick is not None, "read_nowait")
    start, end = bench.windows[0]
    if bench.device.can_write:
        await bench.fill(start, end)
    slow = _without(bench, "read_nowait")
    assert quick is not None
    for offset, length in bench.ranges():
        if offset + length <= end:
            data = quick(offset, length)
            wanted = await slow.read(offset, length)
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


async def _check_read_into(bench: Bench) -> None:
    """read_into fills all of its buffer, with what read says, and leaves it alone afterwards."""
    bench.needs(getattr(bench.driver, "read_into", None) is not None, "read_into")
    if traits_of(bench.driver).thread_model == "direct":
        raise Skipped("it is direct: its read_into is not used")
    await _as_good(bench, _without(bench, "read", "read_nowait"))
    if getattr(bench.driver, "read", None) is not None:
        await _as_good(bench, _without(bench, "read_into"))     # which else nobody may have asked


async def _as_good(bench: Bench, other: Bench) -> None:
    for check in (_check_reads, _check_read_answers_are_kept, _check_random_requests, _check_concurrent_requests):
        with contextlib.suppress(Skipped):
            await check(other)
    bench.requests += other.requests


async def _check_request_bytes_max(bench: Bench) -> None:
    """It takes as many bytes at once as it says; longer requests are cut, and then it takes the parts."""
    longest = traits_of(bench.driver).request_bytes_max
    if longest > min(bench.device.size, PAYLOAD_BYTES_MAX):
        raise Skipped("no request is longer than its request_bytes_max")
    end = min(bench.device.size, 2 * longest + bench.granule)
    model = await bench.contents(0, end)
    for length in (longest, end):
        text = f"a request of {length} bytes, with request_bytes_max={longest}"
        await bench.expect(0, model[:length], f"a read, {text}")
        if bench.device.can_write:
            model[:length] = data = bench.chance.randbytes(length)
            await bench.write(0, data)
            await bench.expect(0, model, f"a write, {text}")
            await bench.ask(Request("write_zeroes", end - length, length))
            model[end - length :] = bytes(length)
            await bench.expect(0, model, f"zeroes, {text}")
        await _compare_extents(bench, 0, length)


async def _check_emulated_alignment(bench: Bench) -> None:
    """Behind a Device(emulate_alignment=True) it is a device of bytes: what is beside a request is kept."""
    if bench.granule == 1:
        raise Skipped("it takes requests of any bytes")
    other = Bench(bench.driver, seed=bench.seed, moves=bench.moves, emulate_alignment=True)
    await _check_random_requests(other)
    await _check_concurrent_requests(other)
    bench.requests += other.requests


async def _check_resize(bench: Bench) -> None:
    """Made longer and shorter it keeps what it has, up to the shorter end; what is new can be read, and written."""
    bench.needs(bench.device.can_resize, "resize")
    bench.needs_room()
    size = bench.device.size
    start = size - min(bench.up(4096), size)
    model = await bench.fill(start, size)
    for new in (size + bench.granule, size + bench.up(70_000), size, size - bench.granule, start + bench.granule, size):
        await _resized(bench, new, start, model)
        del model[new - start :]
        await bench.expect(start, model, f"after a resize to {new} bytes")
        if start + len(model) < new:
            model += await bench.read(start + len(model), new - start - len(model))
            data = bench.chance.randbytes(bench.granule)
            await bench.write(new - bench.granule, data)
            model[-bench.granule :] = data
            await bench.expect(start, model, f"after a write at the end of now {new} bytes")
    await _check_traits(bench)


async def _resized(bench: Bench, size: int, start: int, model: bytearray) -> None:
    bench.requests += 1
    what = f"resize from {bench.device.size} to {size} bytes"
    try:
        await bench.device.resize(size)
    except BlockError as error:
        if error.errno not in _NO_RESIZE:
            raise AssertionError(f"{what} failed: {error}") from error
        # Its size is what it says now, the old one or another; so many bytes it must have.
        await bench.expect(start, model[: max(0, bench.device.size - start)], f"after a {what} that was refused")
        raise Skipped(f"it refuses a {what}: {error}") from error
    found = traits_of(bench.driver).size
    assert found == size, f"after a {what} its size is {found}"


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
    _check_read_into,
    _check_request_bytes_max,
    _check_emulated_alignment,
    _check_resize,
    _check_random_requests,
    _check_concurrent_requests,
    _check_cancelled_requests,
    _check_errors,
    _check_close,
)
