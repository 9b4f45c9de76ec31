"""What a device asks, refuses and answers inline: the guard itself."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from tests.block.answers import BOUND_S, finish, is_inline, turns
from tests.block.drivers import AsyncDriver, Least, Recorder, refused

MIB = 1 << 20


# What a driver need not have


def test_least_driver() -> None:
    async def main() -> None:
        device = Device(Least())
        answer = device.read(5, 4)
        assert not is_inline(answer)
        assert await finish(device.read(5, 4)) == bytes([5, 6, 7, 8])
        assert device.read_only
        assert not any((device.can_write, device.can_flush, device.can_fua, device.can_trim))
        assert not device.can_write_zeroes
        assert device.can_multi_conn            # nothing to keep coherent
        assert device.flush() is None           # nothing to flush
        await device.close()

    asyncio.run(main())


def test_names() -> None:
    assert Device(Least()).name == "Least"
    assert Device(Least(), name="disk").name == "disk"
    assert repr(Device(Memory(512), name="m")) == "<Device m open size=512 in_flight=0>"


def test_no_read_method() -> None:
    class Nothing:
        size = 1

    with pytest.raises(UsageError, match="driver Nothing has no read method"):
        Device(Nothing())       # type: ignore[arg-type]


def test_read_only() -> None:
    assert Device(Memory(512), read_only=True).can_write is False
    assert Device(Memory(512), read_only=False).can_write is True
    with pytest.raises(UsageError, match="driver Least cannot write"):
        Device(Least(), read_only=False)


def test_abilities_follow_methods() -> None:
    class WritesOnly(Least):
        def write(self, offset: int, data: bytes) -> None: ...

    device = Device(WritesOnly())
    assert device.can_write
    assert device.can_write_zeroes
    assert not device.can_flush
    assert not device.can_fua
    assert not device.can_trim
    assert not device.can_multi_conn
    memory = Device(Memory(512))
    assert all((memory.can_flush, memory.can_fua, memory.can_trim, memory.can_multi_conn))


# Checks


@pytest.mark.parametrize(
    ("kind", "past_the_end"),
    [("read", errno.EINVAL), ("trim", errno.EINVAL), ("write_zeroes", errno.ENOSPC)],
)
def test_range(kind: str, past_the_end: int) -> None:
    device = Device(Memory(4096))
    call = getattr(device, kind)
    assert refused(call, -1, 1).errno == errno.EINVAL
    assert refused(call, 1, -1).errno == errno.EINVAL
    for offset, length in ((0, 4097), (4096, 1), (1 << 64, 1), (4097, 0)):
        error = refused(call, offset, length)
        assert error.errno == past_the_end
        assert f"{kind} of {length} bytes at {offset}" in error.text
    assert is_inline(call(0, 4096))
    assert is_inline(call(4096, 0))


def test_range_of_write() -> None:
    device = Device(Memory(4096))
    assert refused(device.write, -1, b"x").errno == errno.EINVAL
    assert refused(device.write, 4096, b"x").errno == errno.ENOSPC
    assert refused(device.write, 4095, b"xy").errno == errno.ENOSPC
    assert "4096 bytes" in refused(device.write, 4095, b"xy").text
    assert device.write(4095, b"x") is None


def test_alignment() -> None:
    class Sectors(Memory):
        block_size_min = 512

    device = Device(Sectors(4096))
    for offset, length in ((1, 512), (0, 511), (256, 256)):
        for call in (device.read, device.trim, device.write_zeroes):
            error = refused(call, offset, length)
            assert error.errno == errno.EINVAL
            assert "not in blocks of 512 bytes" in error.text
        assert refused(device.write, offset, bytes(length)).errno == errno.EINVAL
    assert len(device.read(512, 1024)) == 1024      # type: ignore[arg-type]


def test_read_only_refuses_changes() -> None:
    device = Device(Memory(4096), read_only=True)
    assert refused(device.write, 0, b"x").errno == errno.EPERM
    assert refused(device.write, 0, b"x", fua=True).errno == errno.EPERM
    assert refused(device.trim, 0, 1).errno == errno.EPERM
    assert refused(device.write_zeroes, 0, 1).errno == errno.EPERM
    assert refused(device.write, 9999, b"x").errno == errno.EPERM       # before the range
    assert bytes(device.read(0, 2)) == b"\0\0"      # type: ignore[arg-type]


def test_what_the_driver_cannot_do() -> None:
    class WritesOnly(Memory):
        flush = None        # type: ignore[assignment]
        trim = None         # type: ignore[assignment]

    device = Device(WritesOnly(4096))
    assert "WritesOnly has no trim" in refused(device.trim, 0, 1).text
    assert "WritesOnly has no flush" in refused(device.flush).text
    assert "WritesOnly has no flush" in refused(device.write, 0, b"x", fua=True).text
    assert refused(device.write_zeroes, 0, 1, fua=True).errno == errno.EINVAL


@pytest.mark.parametrize("fua", [False, True])
def test_zero_bytes_are_answered_without_the_driver(fua: bool) -> None:
    driver = Recorder()
    device = Device(driver)
    assert device.read(100, 0) == b""
    assert device.write(100, b"", fua=fua) is None
    assert device.trim(100, 0, fua=fua) is None
    assert device.write_zeroes(100, 0, fua=fua) is None
    assert driver.calls == []


# Inline, and not


def test_inline_driver_needs_no_loop() -> None:
    device = Device(Memory(MIB))
    assert device.write(10, b"data", fua=True) is None
    assert bytes(device.read(9, 6)) == b"\0data\0"      # type: ignore[arg-type]
    assert device.write_zeroes(11, 1) is None
    assert device.trim(12, 1) is None
    assert device.flush() is None
    assert bytes(device.read(9, 6)) == b"\0d\0\0a\0"    # type: ignore[arg-type]
    assert device.statistics().waited == 0


def test_quick_paths() -> None:
    class Cached(Memory):
        """Answers at once below 4096, and through its blocking methods above."""

        thread_model = "parallel"

        def read_nowait(self, offset: int, length: int) -> Any:
            return self.read(offset, length) if offset < 4096 else None

        def write_nowait(self, offset: int, data: Any) -> bool:
            if offset >= 4096:
                return False
            self.write(offset, data)
            return True

    async def main() -> None:
        device = Device(Cached(8192))
        assert device.write(0, b"low") is None
        assert bytes(device.read(0, 3)) == b"low"       # type: ignore[arg-type]
        assert not is_inline(device.read(4096, 4))
        await finish(device.write(4096, b"high"))
        assert bytes(await finish(device.read(4096, 4))) == b"high"
        assert device.statistics().waited == 2
        assert device.statistics().writes == 2

    asyncio.run(main())


def test_async_driver() -> None:
    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        tasks = [asyncio.create_task(device.read(0, 10)) for _ in range(3)]     # type: ignore[arg-type]
        await turns()
        assert device.in_flight == 3
        driver.let_go.set()
        assert await asyncio.gather(*tasks) == [bytes(10)] * 3
        assert device.in_flight == 0
        assert device.statistics().in_flight_max == 3

    asyncio.run(main())


@pytest.mark.parametrize("model", ["serialised", "parallel"])
def test_blocking_driver_does_not_block_the_home(model: str) -> None:
    class Blocking(Least):
        thread_model = model
        let_go = threading.Event()

        def read(self, offset: int, length: int) -> bytes:
            assert self.let_go.wait(BOUND_S)
            return bytes(length)

    async def main() -> None:
        driver = Blocking()
        device = Device(driver)
        tasks = [asyncio.create_task(device.read(0, 10)) for _ in range(3)]     # type: ignore[arg-type]
        await turns()                   # the loop goes round while a worker stands
        assert device.in_flight == 3
        driver.let_go.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
