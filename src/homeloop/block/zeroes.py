"""Zero bytes that nobody had to write: the answer to reads of holes, and what holes are made of where all else fails.
"""

from __future__ import annotations

from typing import Final

from homeloop.block.driver import BytesLike

__all__ = ["ZEROES", "are_zeroes", "zeroes"]

# Read-only and never touched: the system backs it with its zero page. 2 MiB: the largest read of common
# clients.
_MEMORY: Final = bytes(1 << 21)
ZEROES: Final = memoryview(_MEMORY)


def zeroes(length: int) -> BytesLike:
    """Return `length` zero bytes, up to 2 MiB without making them."""
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)


def are_zeroes(data: object) -> bool:
    """Return True for what zeroes() or a slice of ZEROES gave; no look at the bytes. False says nothing."""
    return type(data) is memoryview and data.obj is _MEMORY
