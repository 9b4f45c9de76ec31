"""What a block driver is: the contract for the class that a user writes, and how its traits are read.

A driver knows where the bytes are. It checks nothing: the Device around it (homeloop.block.device) has
checked range, rights and alignment before a driver's method is called, and turns whatever the method raises
into the error of that one request. So this is a whole driver:

    class Noise:
        size = 1 << 30

        def read(self, offset, length):
            return random.randbytes(length)

The contract
------------

Required: `size` (bytes; read when the Device is made, and after a resize that failed) and `read(offset, length)`,
which returns exactly `length` bytes (bytes, bytearray, or anything with a buffer) that the driver does not change
afterwards. A read that finds nothing but a hole may return homeloop.block.zeroes.zeroes(length): clients are then
told of the hole.

Optional methods; what is missing is not offered, or emulated where the bracket says so:

    read_into(offset, buffer)                   fill all of buffer, which is not to be kept; None (or len(buffer)).
                                                Used instead of read on a worker, and where there is no read
    write(offset, data)                         data is valid only until write returns: copy what is kept.
                                                Returns None (or len(data): another count is an error)
    write_fua(offset, data)                     as write, and stable on return       [write, then flush]
    flush()                                     all changes that had returned are stable when this returns
    trim(offset, length)                        a hint: the contents are of no more use
    write_zeroes(offset, length, *, may_trim)   reads as zeroes then; may_trim: as a hole [zeroes are written]
    write_zeroes(..., *, may_trim, fast)        the same, for one that can tell: fast: at once, or OSError(ENOTSUP)
                                                and nothing changed, if writing zeroes would be no slower
    cache(offset, length)                       a hint: the bytes will be read soon
    extents(offset, length)                     iterable of (length, hole, zero) from offset on, bool twice: hole:
                                                nothing is allocated; zero: reads as zeroes. At least one; may end
                                                early, may be a generator [all is data]
    resize(size)                                be `size` bytes long, and have it in `size`, also after a failure
    close()                                     nothing is in flight; once, again only if it was cancelled

Each of them, and read, may be `async def`: then it runs as a coroutine at the device's home, several at a
time. A plain method is called as `thread_model` says:

    "serialised"   (default) on a worker thread, one at a time for the device, in the order of the requests
    "parallel"     on worker threads, several at a time; the driver does its own locking
    "inline"       on the home thread: only if it never waits for anything (memory, arithmetic)
    "direct"       on the home thread, and what it returns is the answer, or a coroutine object whose result is the
                   answer: for a driver that knows only when it is asked whether it must wait, such as a filter over
                   another. The coroutine may never be run: what must not be lost belongs into it

Optional quick paths, plain functions that must not block, called on the home thread *before* the method
itself and possibly while another method runs on a worker:

    read_nowait(offset, length)     the bytes, or None: it would block
    write_nowait(offset, data)      True, or False: it would block (what it wrote already is written again)
    read_pieces(offset, length)     an "inline" driver's bytes in pieces that will not change, or None: see lending.py

Optional traits: `read_only` (False), `block_size_min` (1), `block_size_preferred` (4096),
`request_bytes_max` (no method is called for more bytes at once; a multiple of block_size_min), `multi_conn` (False:
the driver does not promise that a flush covers the writes of every connection).

Errors: an OSError fails the request with its errno, a BlockError passes as it is, anything else is EIO; the
device goes on. When a request is cancelled, an async method sees CancelledError; a plain one that already
runs on a worker is waited for.

Nothing here calls a driver's methods: that is homeloop.block.calling.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, cast, get_args

from homeloop.errors import UsageError

__all__ = [
    "BLOCK_SIZE_MIN_MAX",
    "PAYLOAD_BYTES_MAX",
    "SIZE_BYTES_MAX",
    "BlockSize",
    "BytesLike",
    "Driver",
    "ThreadModel",
    "Traits",
    "size_after",
    "traits_of",
]

BytesLike: TypeAlias = bytes | bytearray | memoryview
"""What a read may return, and a write is given."""
ThreadModel: TypeAlias = Literal["inline", "direct", "serialised", "parallel"]
"""Where plain methods of a driver are called: see its contract."""

# NBD Z1: a minimum above 64 KiB is not allowed; NBD Z3, Z9: a payload of 32 MiB must always be taken.
BLOCK_SIZE_MIN_MAX: Final = 1 << 16
PAYLOAD_BYTES_MAX: Final = 1 << 25
# off_t is signed: no driver that ends in a system call could reach further.
SIZE_BYTES_MAX: Final = (1 << 63) - 1

# NBD Z1: preferred is at least this, whatever the minimum is.
_PREFERRED_MIN: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """The sizes that a device asks of its clients, in bytes (NBD Z1).

    minimum: offset and length of every request are multiples of it; the Device refuses others. preferred:
    requests of multiples of it are fast; advice. maximum: the largest payload of a read or a write that an
    export should take from outside; who takes bytes from a peer enforces it before it buffers them, the
    Device does not. A value, for any thread.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = PAYLOAD_BYTES_MAX


class Driver(Protocol):
    """What the Device needs of a driver at least; the module's text has the rest of the contract.

    Called on the home thread of the device or on its workers, as `thread_model` says.
    """

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, length: int, /) -> BytesLike | Awaitable[BytesLike]:
        """Return exactly `length` bytes at `offset`; a range that the Device has checked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a driver says of itself, checked: see traits_of()."""

    size: int
    read_only: bool
    block_size: BlockSize
    thread_model: ThreadModel
    multi_conn: bool
    request_bytes_max: int


def traits_of(driver: Driver) -> Traits:
    """Read a driver's attributes once and check them.

    Raises UsageError, naming the driver and the value, for a driver that breaks the contract.
    """
    label = type(driver).__name__
    minimum = _integer(driver, "block_size_min", 1)
    preferred = _integer(driver, "block_size_preferred", max(4096, minimum))
    if not _is_power_of_two(minimum) or minimum > BLOCK_SIZE_MIN_MAX:
        raise UsageError(
            f"{label}.block_size_min is {minimum}, not a power of two up to {BLOCK_SIZE_MIN_MAX}"
        )
    lowest = max(minimum, _PREFERRED_MIN)
    if not _is_power_of_two(preferred) or not lowest <= preferred <= PAYLOAD_BYTES_MAX:
        raise UsageError(
            f"{label}.block_size_preferred is {preferred}, "
            f"not a power of two from {lowest} to {PAYLOAD_BYTES_MAX}"
        )
    size = _integer(driver, "size", None)
    if not 0 <= size <= SIZE_BYTES_MAX:
        raise UsageError(f"{label}.size is {size}, not from 0 to {SIZE_BYTES_MAX}")
    if size % minimum:
        # NBD Z2: no client could reach the tail.
        raise UsageError(f"{label}.size is {size}, not a multiple of its block_size_min {minimum}")
    thread_model = getattr(driver, "thread_model", "serialised")
    if thread_model not in get_args(ThreadModel):
        raise UsageError(f"{label}.thread_model is {thread_model!r}, not one of {get_args(ThreadModel)}")
    longest = _integer(driver, "request_bytes_max", SIZE_BYTES_MAX - SIZE_BYTES_MAX % minimum)
    if longest < minimum or longest % minimum:
        raise UsageError(f"{label}.request_bytes_max is {longest}, not a multiple of its block_size_min {minimum}")
    return Traits(
        size=size,
        read_only=bool(getattr(driver, "read_only", False)),
        block_size=BlockSize(minimum=minimum, preferred=preferred),
        thread_model=cast(ThreadModel, thread_model),
        multi_conn=bool(getattr(driver, "multi_conn", False)),
        request_bytes_max=longest,
    )


def size_after(driver: Driver, before: int) -> int:
    """Return a driver's size after a resize that failed: what it says, or what it was if that makes no sense."""
    try:
        size = driver.size
    except Exception:
        return before
    return size if type(size) is int and 0 <= size <= SIZE_BYTES_MAX else before


def _integer(driver: Driver, name: str, default: int | None) -> int:
    value = getattr(driver, name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{type(driver).__name__}.{name} is {value!r}, not a number of bytes")
    return value


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
