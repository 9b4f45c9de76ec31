"""Sequential reads are answered from a larger one, which a change makes forgotten."""

from __future__ import annotations

import asyncio
import errno

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.readahead import Readahead
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from tests.block.answers import finish, is_inline, turns
from tests.block.filters.waiting import Waiting

KIB = 1 << 10
MIB = 1 << 20


def filled() -> Waiting:
    driver = Waiting(MIB)
    driver.memory.write(0, bytes(range(256)) * (MIB // 256))
    return driver


def wanted(offset: int, length: int) -> bytes:
    return bytes((offset + i) & 0xFF for i in range(length))


def test_windows_double_and_serve_what_is_in_them() -> None:
    async def main() -> None:
        driver = filled()
        device = Device(Readahead(driver, window_min=64 * KIB, window_max=256 * KIB))
        for offset in range(0, MIB, 16 * KIB):
            assert bytes(await finish(device.read(offset, 16 * KIB))) == wanted(offset, 16 * KIB)
        assert [(offset // KIB, length // KIB) for _, offset, length in driver.begun] == [
            (0, 16), (16, 64), (80, 128), (208, 256), (464, 256), (720, 256), (976, 48),
        ]
        assert device.statistics().waited == 7

    asyncio.run(main())


def test_random_reads_are_passed_on_as_they_are() -> None:
    async def main() -> None:
        driver = filled()
        device = Device(Readahead(driver))
        for offset in (5000, 100, 90_000):
            assert bytes(await finish(device.read(offset, 10))) == wanted(offset, 10)
        assert driver.begun == [("read", 5000, 10), ("read", 100, 10), ("read", 90_000, 10)]

    asyncio.run(main())


def test_reads_of_what_is_on_its_way_wait_for_it() -> None:
    async def main() -> None:
        driver = filled()
        device = Device(Readahead(driver))
        await finish(device.read(0, 10))
        driver.held.add("read")
        tasks = [asyncio.ensure_future(finish(device.read(10 * n, 10))) for n in range(1, 5)]
        await turns()
        assert driver.begun[1:] == [("read", 10, 64 * KIB)]
        await driver.hold_no_more()
        assert [bytes(await task) for task in tasks] == [wanted(10 * n, 10) for n in range(1, 5)]
        assert len(driver.begun) == 2

    asyncio.run(main())


@pytest.mark.parametrize("change", ["write", "trim", "write_zeroes"])
def test_a_change_forgets_what_is_held(change: str) -> None:
    async def main() -> None:
        device = Device(Readahead(filled()))
        await finish(device.read(0, 10))
        await finish(device.read(10, 10))
        assert is_inline(device.read(20, 10))
        if change == "write":
            await finish(device.write(25, b"!"))
        else:
            await finish(getattr(device, change)(25, 1))
        found = bytes(await finish(device.read(20, 10)))
        assert found == wanted(20, 5) + (b"!" if change == "write" else b"\0") + wanted(26, 4)

    asyncio.run(main())


def test_what_was_read_before_a_change_is_not_held_after_it() -> None:
    """The race of a window with a write.

    reader                              writer
    1 asks for a window, has old bytes
                                        2 writes into it, is answered
    3 gets the window
    4 reads on: must see the write
    """

    async def main() -> None:
        driver = filled()
        device = Device(Readahead(driver))
        await finish(device.read(0, 10))
        driver.held.add("read")
        reader = asyncio.ensure_future(finish(device.read(10, 10)))
        await turns()
        await finish(device.write(25, b"!"))
        await driver.hold_no_more()
        await reader
        assert bytes(await finish(device.read(20, 10)))[5:6] == b"!"

    asyncio.run(main())


def test_an_error_behind_what_was_asked_for_is_not_the_readers() -> None:
    async def main() -> None:
        driver = filled()
        device = Device(Readahead(driver))
        await finish(device.read(0, 10))
        driver.errors["read"] = [OSError(errno.EIO, "a bad block further on")]
        assert bytes(await finish(device.read(10, 10))) == wanted(10, 10)
        assert driver.begun[-1] == ("read", 10, 10)

    asyncio.run(main())


@pytest.mark.parametrize(("least", "most"), [(0, 1), (2, 1), (1, 1 << 40)])
def test_windows_that_make_no_sense(least: int, most: int) -> None:
    with pytest.raises(UsageError, match="a window from"):
        Readahead(Memory(MIB), window_min=least, window_max=most)
