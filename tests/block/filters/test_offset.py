"""A window, and a device that nobody can change."""

from __future__ import annotations

import errno

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.offset import Offset
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from tests.block.drivers import Recorder, refused

MIB = 1 << 20


def test_bytes_are_those_of_the_window() -> None:
    memory = Memory(MIB)
    memory.write(0, b"x" * MIB)
    device = Device(Offset(memory, 1000, 2000))
    assert device.size == 2000
    device.write(0, b"begin", fua=True)
    device.write(1997, b"end")
    device.write_zeroes(10, 5)
    assert device.extents(0, 2000) == [(2000, False, False)]
    assert memory.read(999, 6) == b"xbegin"
    assert memory.read(2996, 5) == b"xendx"
    assert memory.read(1009, 7) == b"x" + bytes(5) + b"x"
    assert refused(device.read, 1999, 2).errno == errno.EINVAL
    assert refused(device.write, 1999, b"ab").errno == errno.ENOSPC


def test_the_rest_by_default_and_hints_move_along() -> None:
    driver = Recorder()
    device = Device(Offset(driver, 4096))
    assert device.size == driver.size - 4096
    device.trim(1, 2)
    assert driver.calls == [("trim", 4097, 2)]


@pytest.mark.parametrize(("offset", "size"), [(-1, 10), (0, MIB + 1), (MIB, 1), (MIB + 1, None), (5, -1)])
def test_a_window_that_is_not_inside(offset: int, size: int | None) -> None:
    with pytest.raises(UsageError, match="not inside a device of 1048576 bytes"):
        Offset(Memory(MIB), offset, size)


def test_a_window_across_blocks() -> None:
    class Sectors(Recorder):
        block_size_min = 512

    with pytest.raises(UsageError, match="not in blocks of 512 bytes"):
        Offset(Sectors(), 100, 512)
    assert Device(Offset(Sectors(), 512, 512)).block_size.minimum == 512
