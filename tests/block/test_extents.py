"""What a driver says of its extents, made fit for a client: BS2 to BS4 of the NBD checklist, for any answer."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import homeloop
from homeloop.block.device import Device
from homeloop.block.extents import EXTENTS_MAX, Extent, settle
from homeloop.block.file import File
from homeloop.block.memory import PAGE, Memory
from homeloop.errors import BlockError
from tests.block.answers import finish, is_inline
from tests.block.drivers import Least, Recorder, refused
from tests.block.images import need_holes

MIB = 1 << 20
DATA, ZERO, HOLE = (False, False), (False, True), (True, True)

Run = Callable[[Coroutine[Any, Any, Any]], Any]
runs = pytest.mark.parametrize("run", [asyncio.run, homeloop.run], ids=["asyncio", "homeloop"])


@pytest.mark.parametrize(("found", "settled"), [
    ([(4096, *DATA)], [(4096, *DATA)]),
    ([(9999, *HOLE)], [(4096, *HOLE)]),                                         # not beyond the range
    ([(1024, *DATA), (3072, *HOLE)], [(1024, *DATA), (3072, *HOLE)]),
    ([(512, *HOLE)] * 8, [(4096, *HOLE)]),                                      # neighbours differ
    ([(512, *DATA)], [(512, *DATA)]),                                           # a short answer is one
    ([(1, 1, 1), (4095, 1, 1)], [(4096, *HOLE)]),
    ([(100, *DATA), (3996, *HOLE)], [(512, *DATA), (3584, *HOLE)]),             # partly data is data
    ([(3000, *HOLE), (1096, *DATA)], [(2560, *HOLE), (1536, *DATA)]),
    ([(3000, *HOLE), (1, *DATA), (1095, *HOLE)], [(2560, *HOLE), (512, *DATA), (1024, *HOLE)]),
    ([(700, *HOLE), (900, *ZERO), (2496, *HOLE)], [(512, *HOLE), (1536, *ZERO), (2048, *HOLE)]),
    ([(100, *HOLE)], [(512, *DATA)]),                                           # who knows what the rest is
    ([(1100, *HOLE)], [(1024, *HOLE), (512, *DATA)]),
])
def test_bs3_bs4_settled(found: list[Extent], settled: list[Extent]) -> None:
    assert settle(found, "x", 8192, 4096) == settled
    assert settle(iter(found), "x", 8192, 4096) == settled


@pytest.mark.parametrize(("found", "says"), [
    (None, "x returned NoneType, not an iterable"),
    ([], "x gave no extent of 4096 bytes at 8192"),
    ([(512, 1)], r"x gave \(512, 1\), not"),
    ([7], "x gave 7, not"),
    ([(512, 1, 1), (0, 1, 1)], "x gave an extent of length 0 at 8704"),
    ([(-1, 1, 1)], "length -1"),
    ([("512", 1, 1)], "length '512'"),
])
def test_wrong_answers_are_eio_and_named(found: object, says: str) -> None:
    with pytest.raises(BlockError, match=says) as caught:
        settle(found, "x", 8192, 4096)
    assert caught.value.errno == errno.EIO


def test_an_endless_answer_is_left_early() -> None:
    def endless() -> Iterator[Extent]:
        for number in itertools.count():
            yield 512, bool(number & 1), False

    assert settle(endless(), "x", 0, 1 << 40, extents_max=1) == [(512, *DATA)]
    assert len(settle(endless(), "x", 0, 1 << 40)) == EXTENTS_MAX


PIECES = st.lists(
    st.tuples(st.sampled_from([1, 100, 511, 512, 513, 1024, 5000]), st.booleans(), st.booleans()),
    min_size=1, max_size=12,
)


@settings(deadline=None)
@given(PIECES, st.sampled_from([0, 1, 511, 512, 4096]), st.integers(1, 20_000), st.sampled_from([1, 2, 3, 1000]),
       st.sampled_from([512, 4096]))
def test_any_answer_against_a_map_of_bytes(
    pieces: list[Extent], offset: int, length: int, extents_max: int, granule: int
) -> None:
    said = [(hole, zero) for size, hole, zero in pieces for _ in range(size)][:length]
    extents = settle(pieces, "x", offset, length, granule=granule, extents_max=extents_max)
    assert 1 <= len(extents) <= extents_max
    assert all(a[1:] != b[1:] for a, b in itertools.pairwise(extents))
    position = offset
    for size, hole, zero in extents:
        assert size > 0
        end = position + size
        assert end <= offset + length
        assert end % granule == 0 or end == offset + length
        told = said[position - offset:end - offset]
        whole = len(told) == size
        # What is told as a hole or as zeroes was told so, every byte of it.
        assert not hole or (whole and all(h for h, _ in told))
        assert not zero or (whole and all(z for _, z in told))
        position = end
    if extents_max == 1000:
        assert position >= offset + len(said)
        # ... and a granule that was told so as a whole is not forgotten.
        for first in range(-(-offset // granule) * granule, offset + len(said) - granule + 1, granule):
            if set(said[first - offset:first - offset + granule]) == {HOLE}:
                assert covers(extents, first - offset, granule) == {HOLE}


def covers(extents: list[Extent], start: int, length: int) -> set[tuple[bool, bool]]:
    """The kinds of the bytes of a range, of which `start` counts from the first extent's beginning."""
    found, position = set(), 0
    for size, hole, zero in extents:
        if position < start + length and position + size > start:
            found.add((hole, zero))
        position += size
    return found


# Through the guard


class Mapped(Recorder):
    """Inline; `answer` is what extents returns."""

    def extents(self, offset: int, length: int) -> Any:
        return self._note("extents", offset, length)


def test_bs5_a_driver_that_cannot_tell_has_data() -> None:
    assert Device(Least()).extents(5, 100) == [(100, *DATA)]


@pytest.mark.parametrize(("offset", "length", "number"), [
    (-1, 1, errno.EINVAL), (0, -1, errno.EINVAL), (0, MIB + 1, errno.EINVAL), (MIB, 1, errno.EINVAL),
    (0, 0, errno.EINVAL),
])
def test_e1_what_is_refused(offset: int, length: int, number: int) -> None:
    for device in (Device(Memory(MIB)), Device(Memory(MIB), read_only=True)):
        assert refused(device.extents, offset, length).errno == number
        assert device.statistics().errors == 1


def test_bs4_the_drivers_block_is_the_granule() -> None:
    driver = Mapped([(4096, *DATA), (12288, *HOLE), (4096, *DATA)])
    driver.block_size_min = 8192        # type: ignore[attr-defined]
    assert Device(driver).extents(0, 32768) == [(8192, *DATA), (8192, *HOLE), (8192, *DATA)]


def test_an_inline_driver_that_fails() -> None:
    def failing() -> Iterator[Extent]:
        yield 512, False, False
        raise OSError(errno.ENODEV, "gone")

    error = refused(Device(Mapped(failing())).extents, 0, 4096)
    assert (error.errno, error.text) == (errno.ENODEV, "Mapped.extents: OSError: [Errno 19] gone")
    assert refused(Device(Mapped(OSError(errno.EIO, "x"))).extents, 0, 4096).errno == errno.EIO
    assert refused(Device(Mapped(17)).extents, 0, 4096).errno == errno.EIO


@runs
def test_a_generator_of_a_blocking_driver_runs_on_the_worker(run: Run) -> None:
    class Blocking(Least):
        thread = None

        def extents(self, offset: int, length: int) -> Iterator[Extent]:
            self.thread = threading.current_thread()
            yield length, True, True

    async def main() -> None:
        driver = Blocking()
        device = Device(driver)
        assert await finish(device.extents(0, 4096)) == [(4096, *HOLE)]
        assert driver.thread not in (None, threading.current_thread())
        assert device.statistics().waited == 1
        await device.close()

    run(main())


@runs
def test_async_and_failing_drivers(run: Run) -> None:
    class Async(Least):
        async def extents(self, offset: int, length: int) -> Any:
            if offset:
                raise OSError(errno.ENODEV, "gone")
            return iter([(512, *HOLE), (1024, *DATA)])

    class Blocking(Least):
        def extents(self, offset: int, length: int) -> Iterator[Extent]:
            raise ValueError("x")
            yield

    class Generator(Least):
        async def extents(self, offset: int, length: int) -> Any:
            yield 512, True, True

    async def main() -> None:
        device = Device(Async())
        assert await finish(device.extents(0, 4096)) == [(512, *HOLE), (1024, *DATA)]
        for driver, number in ((Async(), errno.ENODEV), (Blocking(), errno.EIO), (Generator(), errno.EIO)):
            device = Device(driver)
            with pytest.raises(BlockError, match=r"extents") as caught:
                await finish(device.extents(512, 4096))
            assert caught.value.errno == number
            assert device.statistics().errors == 1
            assert device.in_flight == 0

    run(main())


# Our drivers


def test_memory() -> None:
    device = Device(Memory(10 * PAGE))
    assert device.extents(0, 10 * PAGE) == [(10 * PAGE, *HOLE)]
    device.write(3 * PAGE + 5, b"x")
    device.write(5 * PAGE - 1, b"xy")
    assert device.extents(0, 10 * PAGE) == [(3 * PAGE, *HOLE), (3 * PAGE, *DATA), (4 * PAGE, *HOLE)]
    assert device.extents(0, 10 * PAGE, extents_max=1) == [(3 * PAGE, *HOLE)]
    assert device.extents(3 * PAGE - 512, 1024) == [(512, *HOLE), (512, *DATA)]
    assert is_inline(device.extents(0, PAGE))
    device.trim(0, 10 * PAGE)
    assert device.extents(PAGE, PAGE) == [(PAGE, *HOLE)]


def test_memory_answers_in_bounded_time() -> None:
    (extent,) = Device(Memory(1 << 40)).extents(0, 1 << 40)     # type: ignore[misc]
    assert extent == (8192 * PAGE, *HOLE)


@runs
def test_file(run: Run, tmp_path: Path) -> None:
    need_holes(tmp_path)
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(2 * MIB)
        file.write(os.urandom(MIB))

    async def main() -> None:
        device = Device(File(path))
        assert not is_inline(device.extents(0, 512))
        whole = [(2 * MIB, *HOLE), (MIB, *DATA), (5 * MIB, *HOLE)]
        assert await finish(device.extents(0, 8 * MIB)) == whole
        assert await finish(device.extents(MIB, 7 * MIB, extents_max=2)) == [(MIB, *HOLE), (MIB, *DATA)]
        assert await finish(device.extents(2 * MIB + 512, 512)) == [(512, *DATA)]
        assert await finish(device.extents(8 * MIB - 512, 512)) == [(512, *HOLE)]
        await finish(device.write_zeroes(2 * MIB, MIB))
        assert await finish(device.extents(0, 8 * MIB)) == [(8 * MIB, *HOLE)]
        await device.close()

    run(main())
