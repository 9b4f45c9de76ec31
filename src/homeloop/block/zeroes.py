"""Zero bytes that nobody had to write: the answer to reads of holes, and what holes are made of where all else fails.
"""

from __future__ import annotations

from typing import Final

from homeloop.block.driver import BytesLike

__all__ = ["ZEROES", "zeroes"]

# Read-only and never touched: the system backs it with its zero page. 2 MiB: the largest read of common
# clients.
ZEROES: Final = memoryview(bytes(1 << 21))


def zeroes(length: int) -> BytesLike:
    """Return `length` zero bytes, up to 2 MiB without making them."""
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)
