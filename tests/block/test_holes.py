"""Holes in files: made, found, and False where it cannot be done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from homeloop.block.holes import is_hole, punch_hole, zero_range
from tests.block.images import allocated_bytes, need_holes

MIB = 1 << 20


def test_punch_keeps_size_and_frees_space(tmp_path: Path) -> None:
    need_holes(tmp_path)
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4 * MIB)
    with image.open("r+b") as file:
        assert punch_hole(file.fileno(), MIB, 3 * MIB)
        assert is_hole(file.fileno(), MIB, 3 * MIB)
        assert is_hole(file.fileno(), 2 * MIB, MIB)
        assert not is_hole(file.fileno(), MIB - 4096, 8192)
    assert allocated_bytes(image) < 2 * MIB
    assert image.read_bytes() == b"x" * MIB + bytes(3 * MIB)


def test_zero_range_keeps_the_space(tmp_path: Path) -> None:
    need_holes(tmp_path, zero=True)
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4 * MIB)
    with image.open("r+b") as file:
        assert zero_range(file.fileno(), MIB, 2 * MIB)
    assert allocated_bytes(image) >= 4 * MIB
    assert image.read_bytes() == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB


def test_unsupported_is_false() -> None:
    reader, writer = os.pipe()
    try:
        assert not is_hole(reader, 0, 1)
        assert not is_hole(-1, 0, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_other_errors_are_raised(tmp_path: Path) -> None:
    need_holes(tmp_path)
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    with image.open("rb") as file, pytest.raises(OSError, match="of 4096 bytes at 0") as caught:
        punch_hole(file.fileno(), 0, 4096)      # not open for writing
    assert caught.value.errno == errno.EBADF
