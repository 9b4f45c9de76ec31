"""Changes made of steps: fua by flush, zeroes by writing, what a flush covers."""

from __future__ import annotations

import asyncio
import errno
import threading

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.errors import BlockError
from tests.block.answers import finish, is_inline, turns
from tests.block.drivers import AsyncDriver, Least, Recorder, refused

MIB = 1 << 20


# Flush and fua


def test_fua_is_answered_after_the_flush() -> None:
    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        task = asyncio.create_task(device.write(0, b"x", fua=True))     # type: ignore[arg-type]
        await turns()
        driver.let_go.set()
        await task
        assert driver.order == ["write begins", "write ends", "flush begins", "flush ends"]

    asyncio.run(main())


def test_fua_of_each_change() -> None:
    driver = Recorder()
    device = Device(driver)
    assert device.write(0, b"x", fua=True) is None
    assert device.trim(0, 1, fua=True) is None
    assert device.write_zeroes(0, 1, fua=True) is None
    assert [call[0] for call in driver.calls] == ["write", "flush", "trim", "flush", "write", "flush"]
    assert device.statistics().flushes == 0         # nobody asked for one


def test_own_write_fua_needs_no_flush() -> None:
    class Through(Recorder):
        def write_fua(self, offset: int, data: bytes) -> None:
            self._note("write_fua", offset, len(data))

    driver = Through()
    assert Device(driver).write(3, b"xy", fua=True) is None
    assert driver.calls == [("write_fua", 3, 2)]


def test_failed_write_is_not_flushed() -> None:
    driver = Recorder(OSError(errno.EIO, "bad"))
    assert refused(Device(driver).write, 0, b"x", fua=True).errno == errno.EIO
    assert driver.calls == [("write", 0, 1)]


@pytest.mark.parametrize("model", ["serialised", "parallel"])
def test_flush_covers_what_was_answered_before_it(model: str) -> None:
    """NBD D1: whatever the driver had returned from when flush was asked for, it has when flush() is called."""

    class Volatile(Least):
        thread_model = model

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.written: set[int] = set()
            self.stable: set[int] = set()

        def write(self, offset: int, data: bytes) -> None:
            with self.lock:
                self.written.add(offset)

        def flush(self) -> None:
            with self.lock:
                covered = set(self.written)
            with self.lock:
                self.stable |= covered

    async def main() -> None:
        driver = Volatile()
        device = Device(driver)

        async def connection(first: int) -> None:
            answered = set()
            for offset in range(first, first + 30):
                await finish(device.write(offset, b"x"))
                answered.add(offset)
                await finish(device.flush())
                assert answered <= driver.stable

        await asyncio.gather(*(connection(n * 100) for n in range(4)))

    asyncio.run(main())


# Zeroes


def test_zeroes_are_written_in_bounded_pieces() -> None:
    async def main() -> None:
        driver = Recorder()
        device = Device(driver)
        assert is_inline(device.write_zeroes(5, MIB))           # one piece, inline
        driver.calls.clear()
        answer = device.write_zeroes(7, 2 * MIB + 3, fua=True)
        assert not is_inline(answer)
        task = asyncio.create_task(device.write_zeroes(7, 2 * MIB + 3, fua=True))   # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert driver.calls == [("write", 7, MIB)]              # others get their turn in between
        await task
        assert driver.calls[1:] == [("write", 7 + MIB, MIB), ("write", 7 + 2 * MIB, 3), ("flush",)]
        statistics = device.statistics()
        assert (statistics.write_zeroes, statistics.zeroed_bytes, statistics.writes) == (2, 3 * MIB + 3, 0)

    asyncio.run(main())


def test_zeroes_are_zeroes() -> None:
    class NoZeroes(Memory):
        write_zeroes = None     # type: ignore[assignment]

    async def main() -> None:
        device = Device(NoZeroes(4 * MIB))
        device.write(0, b"x" * 4 * MIB)
        await finish(device.write_zeroes(100, 3 * MIB))
        data = bytes(device.read(0, 4 * MIB))       # type: ignore[arg-type]
        assert data == b"x" * 100 + bytes(3 * MIB) + b"x" * (MIB - 100)

    asyncio.run(main())


def test_own_write_zeroes_is_told_about_holes() -> None:
    class Own(Recorder):
        def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
            self._note(offset, length, may_trim)

    driver = Own()
    device = Device(driver)
    device.write_zeroes(0, 8 * MIB)
    device.write_zeroes(1, 2, may_trim=False)
    assert driver.calls == [(0, 8 * MIB, True), (1, 2, False)]


def test_emulated_zeroes_stop_at_the_first_error() -> None:
    class Fills(Recorder):
        def write(self, offset: int, data: bytes) -> None:
            self._note("write", offset, len(data))
            if offset >= MIB:
                raise OSError(errno.EDQUOT, "quota")

    async def main() -> None:
        driver = Fills()
        device = Device(driver)
        with pytest.raises(BlockError, match="quota") as caught:
            await finish(device.write_zeroes(0, 8 * MIB))
        assert caught.value.errno == errno.ENOSPC
        assert len(driver.calls) == 2
        assert device.in_flight == 0
        assert device.statistics().errors == 1

    asyncio.run(main())
