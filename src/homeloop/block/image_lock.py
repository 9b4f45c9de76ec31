"""The lock on an image: one writer alone, or any number of readers.

A reader and a writer exclude each other too: a client of a read-only export caches what it reads, and what it
sees of a file system that somebody else changes beneath it is garbage.

On Linux these are open file description locks, on the bytes that QEMU uses for its images (its
block/file-posix.c: a permission in use is byte 100 + n, one that others may not have is byte 200 + n; all
locked shared, and tested for by asking who is in the way). So qemu-img and a running machine are refused our
image, and we theirs. The lock belongs to the open file, not to the process: a second open in the same process
is refused as well, and closing the file ends it. Elsewhere, or where a file system has no such locks, it is
flock(2).
"""

from __future__ import annotations

import errno
import struct
import sys
from typing import Final

from homeloop.errors import BlockError

try:
    import fcntl
except ImportError:     # not a POSIX system: there are no raw images to lock there either
    fcntl = None        # type: ignore[assignment]

__all__ = ["lock_image"]

_IN_USE_AT: Final = 100
_UNSHARED_AT: Final = 200
_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_RESIZE: Final = 3

# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid; the compiler's own padding.
_FLOCK: Final = struct.Struct("hhqqi0q")

_NO_SUCH_LOCKS: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})


def lock_image(fd: int, path: str, *, writable: bool) -> None:
    """Lock an open image until its file is closed. Does not wait.

    Raises BlockError(EBUSY) if another has it, BlockError with the system's errno if it cannot be locked at
    all.
    """
    if fcntl is None:
        raise BlockError(errno.ENOLCK, f"{path}: this system has no locks for images")
    try:
        if sys.platform == "linux":      # others that have such locks lay struct flock out differently
            try:
                _lock_bytes(fd, path, writable)
                return
            except OSError as error:
                if error.errno not in _NO_SUCH_LOCKS:
                    raise
        fcntl.flock(fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(path, writable) from error
    except OSError as error:
        raise BlockError(error.errno or errno.ENOLCK, f"{path}: cannot lock the image: {error.strerror}") from error


def _lock_bytes(fd: int, path: str, writable: bool) -> None:
    """Lock what we use and what we do not share, then look whether others do. Both may lose; neither both win."""
    in_use = (_CONSISTENT_READ, _WRITE) if writable else (_CONSISTENT_READ,)
    unshared = (_WRITE, _RESIZE)
    ours = [_IN_USE_AT + n for n in in_use] + [_UNSHARED_AT + n for n in unshared]
    theirs = [_UNSHARED_AT + n for n in in_use] + [_IN_USE_AT + n for n in unshared]
    for byte in ours:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
    for byte in theirs:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        assert isinstance(found, bytes), f"fcntl returned {found!r}"
        if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
            raise _busy(path, writable)


def _busy(path: str, writable: bool) -> BlockError:
    if writable:
        return BlockError(errno.EBUSY, f"{path}: the image is in use: a second writer would destroy it")
    return BlockError(errno.EBUSY, f"{path}: the image is in use: another program may write to it")
