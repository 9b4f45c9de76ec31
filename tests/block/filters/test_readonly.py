"""A device that nobody can change."""

from __future__ import annotations

import errno

from homeloop.block.device import Device
from homeloop.block.filters.readonly import Readonly
from homeloop.block.memory import Memory
from tests.block.drivers import refused


def test_changes_are_refused() -> None:
    memory = Memory(4096)
    memory.write(0, b"data")
    device = Device(Readonly(memory))
    assert device.read_only
    assert device.read(0, 4) == b"data"
    for call, args in ((device.write, (0, b"new")), (device.trim, (0, 4)), (device.write_zeroes, (0, 4))):
        assert refused(call, *args).errno == errno.EPERM
    assert device.flush() is None
    assert memory.read(0, 4) == b"data"
