"""A raw image file or block device, through the page cache.

What the page cache has is answered inline: preadv2(RWF_NOWAIT) never waits for the disk. The rest goes to
workers, several at a time: the kernel does the locking. Measured on Linux 6.18 (Python 3.11, best of many):

    4 KiB from the cache, inline               0.55 us with its buffer; a worker's hop alone takes 50 to 100
    256 KiB from the cache, inline             11 us, of which 4.6 zero the bytearray (pread makes bytes: 6.4)
    4 KiB that the cache lacks                 80 to 200 us until it says so: the read-ahead is started in our call
    ext4: RWF_NOWAIT of reads works, of writes EOPNOTSUPP; tmpfs: EOPNOTSUPP for both, but it never waits for a disk

So where misses come one after the other while workers read already, most reads stop asking (_MISSES_MAX):
random 4 KiB from a cold disk at depth 16 go from 10,000 to 15,500 a second, and the home thread is held up
for 18 instead of 62 us by each. With one read at a time it is better to ask (7,300 against 4,300): the disk
starts while the worker is woken. Cached writes go inline where the file system can refuse to wait (XFS,
btrfs), else to a worker: a plain pwrite may stand for seconds when the kernel slows writers down. A file that is
memory itself (tmpfs) is read and written inline without the flag: only what was swapped out is waited for.

Holes stay holes: zeroes are punched or reserved, not written, and large reads ask for holes before they fill
the page cache with zero pages (256 KiB of hole: 680 us the first time, 2 us so).

The image is locked while it is open: see homeloop.block.image_lock.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Iterator
from typing import Final

from homeloop.block.driver import SIZE_BYTES_MAX, BytesLike, ThreadModel
from homeloop.block.extents import Extent
from homeloop.block.file_systems import is_in_memory
from homeloop.block.holes import discard, extents_of, is_hole, punch_hole, sector_of, zero_out, zero_range
from homeloop.block.image_lock import lock_image
from homeloop.block.zeroes import ZEROES, zeroes
from homeloop.errors import BlockError, UsageError

try:
    import fcntl
except ImportError:     # not a POSIX system
    fcntl = None        # type: ignore[assignment]

__all__ = ["File"]

# 0 where the platform has no such flag: then the quick paths and the write-through are not used.
_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)
_DSYNC: Final[int] = getattr(os, "RWF_DSYNC", 0)
_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

# Reads from here on ask for holes first: lseek takes 0.3 us, too much for each 4 KiB.
_HOLE_BYTES_MIN: Final = 1 << 16
# After so many misses in a row ...
_MISSES_MAX: Final = 8
# ... so many reads go to the worker unasked (while others run there) before one asks. A hit ends that.
_UNASKED: Final = 16


class File:
    """The driver of one raw image. Any thread may call read, write and the like; the quick paths are for one.

    path: a regular file or a block device. size: of a file that is made; one that is there must have that
    size. create: make the file if it is missing. Opening may block (a network file system): do it in a
    worker.

    Raises UsageError for arguments that make no sense, BlockError with the system's errno if the file cannot
    be opened, BlockError(EBUSY) if somebody else has the image.
    """

    thread_model: ThreadModel = "parallel"
    multi_conn = True               # fdatasync covers every write to the file, whoever asked for it

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        size: int | None = None,
        create: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.read_only = read_only
        if size is not None and not 0 <= size <= SIZE_BYTES_MAX:
            raise UsageError(f"{self.path}: a size of {size} bytes is not from 0 to {SIZE_BYTES_MAX}")
        if create and read_only:
            raise UsageError(f"{self.path}: cannot create an image that is read-only")
        fd, created = _open(self.path, read_only, size if create else None)
        # An io object owns the descriptor: one that is forgotten is closed, with a ResourceWarning.
        self._file = io.FileIO(fd, "rb" if read_only else "rb+")
        self._fd = fd
        try:
            lock_image(fd, self.path, writable=not read_only)
            if created:
                assert size is not None, "created without a size"
                _set_new_size(fd, self.path, size)
            self.size = _size_of(fd)
            # Bytes of a block device's sectors; 0: a regular file.
            self._sector = sector_of(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else 0
            if size is not None and size != self.size:
                raise UsageError(f"{self.path}: the image has {self.size} bytes, not {size}")
        except BaseException:
            self._file.close()
            raise
        in_memory = is_in_memory(self._fd)
        self._nowait = 0 if in_memory else _NOWAIT  # the flag of the quick paths
        self._can_nowait_read = in_memory or _NOWAIT != 0       # home; False once the file system refused the flag
        self._can_nowait_write = in_memory or _NOWAIT != 0      # home; likewise
        self._misses = 0                            # home: quick reads in a row that the cache could not answer
        self._unasked = 0                           # home: reads that still go to the worker without asking
        self._lock = threading.Lock()               # a leaf
        self._reading = 0                           # under _lock, read without: reads that run on workers
        self._lost: str | None = None               # any thread, set once: why no flush can be promised any more

    def __repr__(self) -> str:
        state = "closed" if self._file.closed else "read-only" if self.read_only else "writable"
        return f"<File {self.path} {state} size={self.size}>"

    def read_nowait(self, offset: int, length: int) -> BytesLike | None:
        """Answer from the page cache, or None. One thread."""
        if not self._can_nowait_read:
            return None
        if self._unasked and self._reading:
            self._unasked -= 1
            return None
        if length >= _HOLE_BYTES_MIN and self.read_only and is_hole(self._fd, offset, length):
            return zeroes(length)                   # only read-only: a writer could make is_hole() wait
        if self._nowait == 0:
            return self._read_memory(offset, length)
        data = bytearray(length)
        try:
            done = os.preadv(self._fd, (data,), offset, _NOWAIT)
        except BlockingIOError:
            done = -1
        except OSError as error:
            # Any other error: the worker meets it again and reports it.
            self._can_nowait_read = error.errno not in _CANNOT
            return None
        if done == length:
            self._misses = 0
            return data
        # Not there, or not all of it. The worker reads all again: what is cached costs it little.
        self._misses += 1
        if self._misses >= _MISSES_MAX:
            self._unasked = _UNASKED
        return None

    def read(self, offset: int, length: int) -> BytesLike:
        with self._lock:
            self._reading += 1
        try:
            return self._read_blocking(offset, length)
        finally:
            with self._lock:
                self._reading -= 1

    def write_nowait(self, offset: int, data: BytesLike) -> bool:
        """Write to the page cache if that needs no waiting. One thread."""
        if not self._can_nowait_write:
            return False
        try:
            return os.pwritev(self._fd, (data,), offset, self._nowait) == len(data)
        except BlockingIOError:
            return False
        except OSError as error:
            self._can_nowait_write = error.errno not in _CANNOT
            return False                            # the worker reports what is really wrong

    def write(self, offset: int, data: BytesLike) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            offset += done
            view = view[done:]

    def write_fua(self, offset: int, data: BytesLike) -> None:
        """Write through to stable storage; nothing else is flushed along where the kernel can do that."""
        if not _DSYNC:
            self.write(offset, data)
            self.flush()
            return
        self._check_not_lost()
        view = memoryview(data)
        try:
            while view:
                done = os.pwritev(self._fd, (view,), offset, _DSYNC)
                offset += done
                view = view[done:]
        except OSError as error:
            self._note_lost(error)
            raise

    def flush(self) -> None:
        """Bring all that was written to stable storage.

        Once that has failed it fails for ever: Linux reports a page it could not write once, then takes it
        for clean, so a later fdatasync would succeed without the data (the "fsyncgate" of 2018).
        """
        self._check_not_lost()
        try:
            _sync(self._fd)
        except OSError as error:
            self._note_lost(error)
            raise

    def trim(self, offset: int, length: int) -> None:
        """Punch a hole, or let a block device discard. Where neither can be done nothing is: it is a hint."""
        if not punch_hole(self._fd, offset, length) and self._sector:
            start, end = self._sectors_in(offset, length)
            if start < end:
                discard(self._fd, start, end - start)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        """Punch a hole if it may be one, else zero the range and keep its space; write zeroes where neither works.

        fast: ENOTSUP instead of writing zeroes.
        """
        if may_trim and punch_hole(self._fd, offset, length):
            return
        if zero_range(self._fd, offset, length):
            return
        if fast:
            raise OSError(errno.ENOTSUP, f"{self.path}: the file system can zero a range by writing it only")
        if self._sector:
            start, end = self._sectors_in(offset, length)
            if start < end and zero_out(self._fd, start, end - start):
                self._write_zeroes_out(offset, start - offset)
                self._write_zeroes_out(end, offset + length - end)
                return
        self._write_zeroes_out(offset, length)

    def cache(self, offset: int, length: int) -> None:
        """Let the kernel read ahead, where it can be told to."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Holes of the file are holes of the image. Blocks: lseek waits for writers of the same file."""
        return extents_of(self._fd, offset, length)

    def resize(self, size: int) -> None:
        """Make the file longer, by a hole, or cut it off. A block device has the size that it has."""
        if not self._sector:
            os.ftruncate(self._fd, size)
        elif size != _size_of(self._fd):
            raise OSError(errno.ENOTSUP, f"{self.path} is a block device of {_size_of(self._fd)} bytes")
        self.size = size

    def close(self) -> None:
        """Close the file, and so unlock the image. Twice is fine."""
        self._file.close()
        self._fd = -1

    def _read_memory(self, offset: int, length: int) -> BytesLike | None:
        """Read a file in memory: no flag is asked for, so the bytes need not be zeroed first."""
        try:
            data = os.pread(self._fd, length, offset)
        except OSError:
            return None                             # the worker meets it again
        return data if len(data) == length else None

    def _read_blocking(self, offset: int, length: int) -> BytesLike:
        if length >= _HOLE_BYTES_MIN and is_hole(self._fd, offset, length):
            return zeroes(length)
        data = os.pread(self._fd, length, offset)
        if len(data) == length:
            return data
        pieces = [data]
        done = len(data)
        while done < length and pieces[-1]:         # one read(2) is 2 GiB at most, and signals cut it
            pieces.append(os.pread(self._fd, length - done, offset + done))
            done += len(pieces[-1])
        if done < length:
            text = f"{self.path} ends at {offset + done}: it had {self.size} bytes when it was opened"
            raise OSError(errno.EIO, text)
        return b"".join(pieces)

    def _sectors_in(self, offset: int, length: int) -> tuple[int, int]:
        """Return start and end of the whole sectors inside a range."""
        return -(-offset // self._sector) * self._sector, (offset + length) // self._sector * self._sector

    def _write_zeroes_out(self, offset: int, length: int) -> None:
        while length:
            piece = ZEROES[:length]
            self.write(offset, piece)
            offset += len(piece)
            length -= len(piece)

    def _check_not_lost(self) -> None:
        if self._lost is not None:
            raise OSError(errno.EIO, f"{self.path}: an earlier flush failed, writes may be lost: {self._lost}")

    def _note_lost(self, error: OSError) -> None:
        if error.errno == errno.EIO:
            self._lost = str(error)


def _open(path: str, read_only: bool, size_to_create: int | None) -> tuple[int, bool]:
    """Open an image; return its descriptor, and whether it was made."""
    # O_NONBLOCK: opening a FIFO would wait for its other end.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | getattr(os, "O_NONBLOCK", 0)
    created = False
    try:
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            if size_to_create is None:
                raise
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            created = True
    except OSError as error:
        text = f"cannot open {path}: {error.strerror}"
        raise BlockError(error.errno or errno.EIO, text) from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        raise UsageError(f"{path} is neither a regular file nor a block device")
    os.set_blocking(fd, True)
    return fd, created


def _set_new_size(fd: int, path: str, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.unlink(path)
        text = f"cannot make {path} of {size} bytes: {error.strerror}"
        raise BlockError(error.errno or errno.EIO, text) from error


def _size_of(fd: int) -> int:
    status = os.fstat(fd)
    # A block device has an st_size of 0.
    return status.st_size if stat.S_ISREG(status.st_mode) else os.lseek(fd, 0, os.SEEK_END)


def _sync(fd: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)      # macOS: fsync stops at the drive's cache
    if full is not None:
        fcntl.fcntl(fd, full)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)
