"""Requests that are too long for the driver, or not in its blocks."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.reshaping import cut_extents, pieces
from homeloop.errors import BlockError, UsageError
from tests.block.answers import BOUND_S, finish, is_inline, turns
from tests.block.drivers import Least, Recorder, refused

BLOCK = 512
SIZE = 1 << 16


class Blocks:
    """Knows blocks of 512 bytes, eight of them at once, and says so if it is asked for anything else."""

    size = SIZE
    block_size_min = BLOCK
    request_bytes_max = 8 * BLOCK

    def __init__(self, thread_model: str = "inline") -> None:
        self.thread_model = thread_model
        self.data = bytearray(self.size)
        self.calls: list[tuple[Any, ...]] = []

    def note(self, kind: str, offset: int, length: int, *more: object) -> None:
        assert not (offset | length) & (BLOCK - 1), (kind, offset, length)
        assert 0 < length <= self.request_bytes_max, (kind, offset, length)
        self.calls.append((kind, offset, length, *more))

    def read(self, offset: int, length: int) -> bytes:
        self.note("read", offset, length)
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.note("write", offset, len(data))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.calls.append(("flush",))

    def trim(self, offset: int, length: int) -> None:
        self.note("trim", offset, length)

    def cache(self, offset: int, length: int) -> None:
        self.note("cache", offset, length)


class Zeroing(Blocks):
    """Has zeroes of its own, and fast ones."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        self.note("zero", offset, length, may_trim, fast)
        self.data[offset : offset + length] = bytes(length)


class Pausing(Blocks):
    """Async; reads wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = asyncio.Event()
        self.let_go = asyncio.Event()

    async def read(self, offset: int, length: int) -> bytes:        # type: ignore[override]
        data = Blocks.read(self, offset, length)
        self.reading.set()
        await self.let_go.wait()
        return data                             # as it was before

    async def write(self, offset: int, data: bytes) -> None:        # type: ignore[override]
        Blocks.write(self, offset, data)


class Fua(Blocks):
    """Writes through."""

    def write_fua(self, offset: int, data: bytes) -> None:
        self.note("fua", offset, len(data))
        self.data[offset : offset + len(data)] = data


# Splitting


def test_long_requests_are_split() -> None:
    async def main() -> None:
        driver = Blocks()
        device = Device(driver)
        data = random.Random(1).randbytes(20 * BLOCK)
        assert is_inline(device.write(0, data))
        assert driver.calls == [("write", 0, 4096), ("write", 4096, 4096), ("write", 8192, 2048)]
        assert driver.data[: len(data)] == data
        assert device.read(0, len(data)) == data
        driver.calls.clear()
        device.write(0, data, fua=True)
        assert driver.calls[2:] == [("write", 8192, 2048), ("flush",)]
        driver.calls.clear()
        await finish(device.trim(0, 10 * BLOCK, fua=True))
        await finish(device.cache(0, 10 * BLOCK))
        assert driver.calls == [
            ("trim", 0, 4096), ("trim", 4096, 1024), ("flush",), ("cache", 0, 4096), ("cache", 4096, 1024)
        ]
        driver.calls.clear()
        await finish(device.write_zeroes(0, 10 * BLOCK))
        assert driver.calls == [("write", 0, 4096), ("write", 4096, 1024)]
        assert driver.data[: 10 * BLOCK] == bytes(10 * BLOCK)
        s = device.statistics()
        assert (s.reads, s.writes, s.trims, s.write_zeroes, s.caches) == (1, 2, 1, 1, 1)
        assert s.written_bytes == 2 * len(data)

    asyncio.run(main())


@pytest.mark.parametrize("longest", [0, -512, 100, 513, True, "1"])
def test_request_bytes_max_is_checked(longest: Any) -> None:
    driver = Blocks()
    driver.request_bytes_max = longest
    with pytest.raises(UsageError, match=r"Blocks\.request_bytes_max"):
        Device(driver)


def test_unaligned_is_refused_unless_asked_for() -> None:
    device = Device(Blocks())
    for call in (device.read, device.trim, device.write_zeroes, device.cache):
        assert refused(call, 1, 512).errno == errno.EINVAL
    assert refused(device.write, 1, b"x").errno == errno.EINVAL
    assert device.block_size.minimum == BLOCK


# Alignment


def test_inline_stays_inline() -> None:
    driver = Blocks()
    device = Device(driver, emulate_alignment=True)
    assert device.block_size.minimum == 1
    assert device.write(510, b"abcd") is None
    assert driver.calls == [("read", 0, 512), ("read", 512, 512), ("write", 0, 1024)]
    assert device.read(509, 6) == b"\0abcd\0"
    driver.calls.clear()
    assert device.write(1, b"x", fua=True) is None
    assert driver.calls == [("read", 0, 512), ("write", 0, 512), ("flush",)]
    assert device.write(512, bytes(1024)) is None       # whole blocks: nothing is read
    assert driver.calls[3:] == [("write", 512, 1024)]
    assert device.statistics().waited == 0


def test_only_the_edges_are_read() -> None:
    driver = Blocks()
    device = Device(driver, emulate_alignment=True)
    device.write(512, bytes(513))
    assert driver.calls == [("read", 1024, 512), ("write", 512, 1024)]
    driver.calls.clear()
    device.write(1, bytes(1023))
    assert driver.calls == [("read", 0, 512), ("write", 0, 1024)]


def test_own_write_fua() -> None:
    driver = Fua()
    Device(driver, emulate_alignment=True).write(1, b"x", fua=True)
    assert driver.calls == [("read", 0, 512), ("fua", 0, 512)]


def test_hints_keep_to_blocks() -> None:
    driver = Blocks()
    device = Device(driver, emulate_alignment=True)
    device.trim(1, 510)                         # no whole block
    device.trim(1, 1535)
    device.cache(1, 512)
    assert driver.calls == [("trim", 512, 1024), ("cache", 0, 1024)]
    assert device.statistics().trims == 2


@pytest.mark.parametrize("kind", [Blocks, Zeroing])
def test_zeroes_around_blocks(kind: type[Blocks]) -> None:
    async def main() -> None:
        driver = kind()
        driver.data[:] = b"x" * SIZE
        device = Device(driver, emulate_alignment=True)
        await finish(device.write_zeroes(100, 1000, fua=True))
        assert driver.data[:1200] == b"x" * 100 + bytes(1000) + b"x" * 100
        assert driver.calls[-1] == ("flush",)
        await finish(device.write_zeroes(2000, 7))
        assert driver.data[1999:2008] == b"x" + bytes(7) + b"x"

    asyncio.run(main())


def test_fast_zeroes_of_no_whole_block() -> None:
    async def main() -> None:
        driver = Zeroing()
        device = Device(driver, emulate_alignment=True)
        with pytest.raises(BlockError) as caught:
            await finish(device.write_zeroes(100, 200, fast=True))
        assert caught.value.errno == errno.ENOTSUP
        assert driver.calls == []
        await finish(device.write_zeroes(100, 1000, fast=True, may_trim=False))
        assert driver.calls[0] == ("zero", 512, 512, False, True)

    asyncio.run(main())


def test_errors_are_counted_once() -> None:
    driver = Recorder(OSError(errno.ENOSPC, "full"))
    driver.block_size_min = 512                 # type: ignore[attr-defined]
    device = Device(driver, emulate_alignment=True)
    assert refused(device.write, 1, b"x").errno == errno.ENOSPC
    assert refused(device.read, 1, 1).errno == errno.ENOSPC
    assert refused(device.write, -1, b"x").errno == errno.EINVAL
    assert refused(device.write, driver.size, b"x").errno == errno.ENOSPC
    assert device.statistics().errors == 4
    assert device.statistics().in_flight == 0


# What is modified and written back is one change


@pytest.mark.parametrize("other", ["whole", "part", "zeroes"])
def test_nothing_comes_between_read_and_write_back(other: str) -> None:
    """Without waiting for each other the second change is lost.

    first                              second
    1. read block 0
                                       2. write into block 0
    3. write back what was read in 1
    """

    async def main() -> None:
        driver = Pausing()
        driver.data[:] = b"." * SIZE
        device = Device(driver, emulate_alignment=True)
        first = asyncio.create_task(finish(device.write(1, b"first")))
        await asyncio.wait_for(driver.reading.wait(), BOUND_S)
        if other == "whole":
            second = asyncio.create_task(finish(device.write(0, b"s" * 512)))
        elif other == "part":
            second = asyncio.create_task(finish(device.write(100, b"second")))
        else:
            second = asyncio.create_task(finish(device.write_zeroes(0, 512)))
        await turns()
        beside = asyncio.create_task(finish(device.write(512, b"b" * 512)))
        await asyncio.wait_for(beside, BOUND_S)         # does not overlap: does not wait
        assert not second.done()
        driver.let_go.set()
        await asyncio.wait_for(asyncio.gather(first, second), BOUND_S)
        if other == "whole":
            assert driver.data[:512] == b"s" * 512
        elif other == "part":
            assert driver.data[:6] == b".first"
            assert driver.data[100:106] == b"second"
        else:
            assert driver.data[:512] == bytes(512)
        assert driver.data[512:1024] == b"b" * 512

    asyncio.run(main())


def test_cancelled_while_it_waits_for_its_turn() -> None:
    async def main() -> None:
        driver = Pausing()
        device = Device(driver, emulate_alignment=True)
        first, second, third = (
            asyncio.create_task(finish(device.write(number, bytes([number])))) for number in (1, 2, 3)
        )
        await asyncio.wait_for(driver.reading.wait(), BOUND_S)
        second.cancel()
        await turns()
        assert second.cancelled()
        driver.let_go.set()
        await asyncio.wait_for(asyncio.gather(first, third), BOUND_S)
        assert driver.data[:5] == b"\0\1\0\3\0"
        assert device.in_flight == 0

    asyncio.run(main())


@pytest.mark.parametrize("model", ["inline", "serialised", "parallel"])
def test_against_a_model(model: str, seed: int) -> None:
    """Many at once, each on bytes of its own: blocks are shared, and nothing is lost."""

    async def main() -> None:
        chance = random.Random(seed)
        driver = Blocks(model)
        device = Device(driver, emulate_alignment=True)
        expected = bytearray(SIZE)
        for _ in range(6):
            cuts = sorted(chance.sample(range(SIZE), 60))
            work = []
            for start, end in itertools.pairwise(cuts):
                if chance.random() < 0.2:
                    work.append(device.write_zeroes(start, end - start))
                    expected[start:end] = bytes(end - start)
                else:
                    data = chance.randbytes(end - start)
                    work.append(device.write(start, data, fua=chance.random() < 0.2))
                    expected[start:end] = data
            await asyncio.wait_for(asyncio.gather(*(finish(answer) for answer in work)), BOUND_S)
            assert driver.data == expected
            start, end = sorted(chance.sample(range(SIZE), 2))
            assert await finish(device.read(start, end - start)) == expected[start:end]

    asyncio.run(main())


# The parts


def test_pieces() -> None:
    assert list(pieces(3, 0, 4)) == []
    assert list(pieces(3, 9, 4)) == [(3, 4), (7, 4), (11, 1)]


def test_cut_extents() -> None:
    found = [(10, False, False), (10, True, True), (10, False, False)]
    assert cut_extents(found, 0, 30) == found
    assert cut_extents(found, 12, 3) == [(3, True, True)]
    assert cut_extents(found, 5, 100) == [(5, False, False), (10, True, True), (10, False, False)]


def test_without_hidden_blocks_nothing_changes() -> None:
    device = Device(Least(), emulate_alignment=True)
    assert device.block_size.minimum == 1
    assert not is_inline(device.read(0, 1))
