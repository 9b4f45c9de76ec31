"""Holes in files: finding, punching and zeroing them through lseek(2) and fallocate(2).

Python has no fallocate with a mode, so it is called in the C library. Every function answers False where
kernel, file system or platform cannot do it; the caller then writes zeroes, or does without. Any thread; all
may block.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterator
from typing import Final

if sys.platform == "linux":
    import fcntl

__all__ = ["discard", "extents_of", "is_hole", "punch_hole", "sector_of", "zero_out", "zero_range"]

# linux/falloc.h
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10

# linux/fs.h
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_BLKSSZGET: Final = 0x1268

# EINVAL: a block device whose sectors the range does not keep to. ENODEV: neither file nor block device.
_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL})


def _find_fallocate() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    # fallocate64 first: glibc's plain one takes 32-bit offsets on 32-bit machines. musl has the plain one
    # only.
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        function.restype = ctypes.c_int
    return function


_fallocate: Final = _find_fallocate()


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make the range a hole that reads as zeroes; the file keeps its size. False: cannot. Raises OSError."""
    return _allocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Make the range read as zeroes and keep its space reserved. False: cannot. Raises OSError."""
    return _allocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def discard(fd: int, offset: int, length: int) -> bool:
    """Tell a block device that whole sectors are of no more use; what they read as then is open. Raises OSError."""
    return _block_request(_BLKDISCARD, fd, offset, length)


def zero_out(fd: int, offset: int, length: int) -> bool:
    """Let a block device make whole sectors read as zeroes, or its driver write them. Raises OSError."""
    return _block_request(_BLKZEROOUT, fd, offset, length)


def sector_of(fd: int) -> int:
    """Return the bytes of a block device's logical sectors; 512 where that cannot be found out."""
    if sys.platform != "linux":
        return 512
    try:
        found = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
    except OSError:
        return 512
    assert isinstance(found, bytes), f"ioctl returned {found!r}"
    return int.from_bytes(found, sys.byteorder)


def is_hole(fd: int, offset: int, length: int) -> bool:
    """Return True if the whole range is known to be a hole; False is always a safe answer.

    On ext4 and others it waits for a writer of the same file (the inode's lock), so it is not for a home
    thread unless the file has no writers.
    """
    if not hasattr(os, "SEEK_DATA"):
        return False
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        return error.errno == errno.ENXIO       # no data from here to the end; EINVAL: not supported


def extents_of(fd: int, offset: int, length: int) -> Iterator[tuple[int, bool, bool]]:
    """Tell data from holes: (length, hole, zero) from offset on; all is data where that cannot be found out."""
    end = offset + length
    if not hasattr(os, "SEEK_DATA"):
        yield length, False, False
        return
    while offset < end:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            # ENXIO: no data from here to the end of the file. Anything else: not supported here.
            beyond = error.errno == errno.ENXIO
            yield end - offset, beyond, beyond
            return
        if data > offset:
            yield data - offset, True, True
        offset = data
        if data < end:
            try:
                # There is a hole behind any data: the end of the file counts as one.
                offset = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            except OSError:             # ENXIO: the file ends before it now. Data is always a safe answer
                offset = end
            if offset > data:           # not so if a hole was punched there meanwhile: look again
                yield offset - data, False, False


def _allocate(fd: int, mode: int, offset: int, length: int) -> bool:
    if _fallocate is None:
        return False
    while _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number in _CANNOT:
            return False
        if number != errno.EINTR:
            raise OSError(number, f"fallocate({mode:#x}) of {length} bytes at {offset}: {os.strerror(number)}")
    return True


def _block_request(number: int, fd: int, offset: int, length: int) -> bool:
    """False: neither here, nor on anything but a block device."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(fd, number, struct.pack("=QQ", offset, length))
    except OSError as error:
        if error.errno in _CANNOT or error.errno == errno.ENOTTY:
            return False
        raise
    return True
