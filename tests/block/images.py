"""What the tests of files share: does this file system do what a test is about?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from homeloop.block.holes import punch_hole, zero_range


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def need_nowait_reads(folder: Path) -> None:
    """Skip where the kernel cannot say whether the page cache has something (tmpfs, macOS)."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        pytest.skip("this platform has no RWF_NOWAIT")
    probe = folder / "probe"
    probe.write_bytes(bytes(4096))
    fd = os.open(probe, os.O_RDONLY)
    try:
        os.pread(fd, 4096, 0)
        os.preadv(fd, [bytearray(4096)], 0, flag)
    except OSError as error:
        pytest.skip(f"no RWF_NOWAIT on the file system of {folder}: {error}")
    finally:
        os.close(fd)


def need_holes(folder: Path, *, zero: bool = False) -> None:
    """Skip where holes cannot be punched, or (zero) ranges not be zeroed in place."""
    probe = folder / "probe"
    probe.write_bytes(bytes(1 << 16))
    with probe.open("r+b") as file:
        if not (zero_range if zero else punch_hole)(file.fileno(), 0, 1 << 16):
            pytest.skip(f"the file system of {folder} cannot {'zero ranges' if zero else 'punch holes'}")
