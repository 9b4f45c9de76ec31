"""What an export says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.nbd.export import Export, transmission_flags

HAS_FLAGS, READ_ONLY, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN = 1, 2, 4, 8, 0x20, 0x40, 0x100
CACHE, FAST_ZERO = 0x400, 0x800


class ReadOnly:
    """The least that a driver can be."""

    size = 1 << 20

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


class NoFlush(ReadOnly):
    """No FLUSH, so no FUA; no trim."""

    def write(self, offset: int, data: Any) -> None:
        pass


@pytest.mark.parametrize(("driver", "read_only", "flags"), [
    (Memory(4096), False, HAS_FLAGS | FLUSH | FUA | TRIM | WRITE_ZEROES | MULTI_CONN | CACHE | FAST_ZERO),
    (NoFlush(), False, HAS_FLAGS | WRITE_ZEROES),
    (ReadOnly(), True, HAS_FLAGS | READ_ONLY | MULTI_CONN),
])
def test_x4_flags(driver: Any, read_only: bool, flags: int) -> None:
    assert transmission_flags(Device(driver), read_only) == flags


def test_x4_a_writable_device_exported_read_only() -> None:
    flags = transmission_flags(Device(Memory(4096)), True)
    assert flags & READ_ONLY
    assert not flags & (TRIM | WRITE_ZEROES | FAST_ZERO)
    assert flags & CACHE


@pytest.mark.parametrize(("limit", "maximum"), [(1 << 24, 1 << 24), (1 << 30, 1 << 25)])
def test_z1_block_sizes(limit: int, maximum: int) -> None:
    context: Any = None
    info = Export("x", Device(ReadOnly()), context, payload_bytes_max=limit).info
    assert (info.block_size_minimum, info.block_size_preferred, info.payload_bytes_max) == (1, 4096, maximum)


def test_h9_names_are_checked() -> None:
    context: Any = None
    with pytest.raises(ValueError, match="export name"):
        Export("a\0b", Device(ReadOnly()), context, payload_bytes_max=1 << 25)
    with pytest.raises(ValueError, match="description"):
        Export("x", Device(ReadOnly()), context, description="x" * 5000, payload_bytes_max=1 << 25)
