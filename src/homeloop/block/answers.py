"""What a driver's write or extents returned, checked: a short write or a wrong type is EIO.

Reads: calling.plain_bytes. Plain functions of values; any thread.
"""

from __future__ import annotations

import errno

from homeloop.block.calling import block_error_of, reject_awaitable
from homeloop.block.extents import Extent, settle
from homeloop.errors import BlockError

__all__ = ["check_written", "read_extents"]


def check_written(done: object, label: str, offset: int, length: int) -> None:
    """Raise EIO for an answer to a write that is neither None nor `length`: a short write loses data."""
    reject_awaitable(done, label)
    if done is not None and (type(done) is not int or done != length):
        raise BlockError(errno.EIO, f"{label} returned {done!r} for {length} bytes at {offset}")


def read_extents(
    found: object, label: str, offset: int, length: int, *, granule: int, extents_max: int
) -> list[Extent]:
    """Return what settle() makes of the driver's answer; what a generator of the driver raises is its error."""
    try:
        return settle(found, label, offset, length, granule=granule, extents_max=extents_max)
    except BlockError:
        raise
    except Exception as error:
        raise block_error_of(error, label) from error
