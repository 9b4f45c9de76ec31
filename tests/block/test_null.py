"""The device that keeps nothing."""

from __future__ import annotations

import pytest

from homeloop.block.device import Device
from homeloop.block.null import Null
from homeloop.block.zeroes import ZEROES
from homeloop.errors import UsageError


def test_null() -> None:
    device = Device(Null(8 << 20))
    assert device.write(0, b"gone") is None
    assert device.read(0, 4) == bytes(4)
    big = device.read(0, 4 << 20)
    assert isinstance(big, bytes | memoryview)
    assert bytes(big) == bytes(4 << 20)
    assert device.write(0, b"gone", fua=True) is None
    assert device.flush() is None
    assert device.trim(0, 4096) is None
    assert device.write_zeroes(0, 4096, fast=True) is None
    assert device.cache(0, 4096) is None
    assert device.extents(0, 8192) == [(8192, True, True)]
    assert device.can_multi_conn
    assert repr(Null(1)) == "<Null size=1>"


def test_reads_are_known_to_be_zeroes() -> None:
    """An export answers them with a hole."""
    data = Device(Null()).read(0, 4096)
    assert isinstance(data, memoryview)
    assert data.obj is ZEROES.obj


def test_size() -> None:
    assert Null().size == 1 << 30
    assert Null(0).size == 0
    for size in (-1, 1 << 63):
        with pytest.raises(UsageError, match="not from 0 to"):
            Null(size)
