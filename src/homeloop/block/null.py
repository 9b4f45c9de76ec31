"""A device that keeps nothing: reads are zeroes, writes vanish. To measure what is around it, and for tests."""

from __future__ import annotations

from typing import Final

from homeloop.block.driver import SIZE_BYTES_MAX, BytesLike, ThreadModel
from homeloop.block.extents import Extent
from homeloop.block.zeroes import ZEROES, zeroes
from homeloop.errors import UsageError

__all__ = ["Null"]

_SIZE: Final = 1 << 30


class Null:
    """A driver of `size` zero bytes. Everything is answered inline; any thread."""

    thread_model: ThreadModel = "inline"
    multi_conn = True

    def __init__(self, size: int = _SIZE) -> None:
        self.size = 0
        self.resize(size)

    def __repr__(self) -> str:
        return f"<Null size={self.size}>"

    def read(self, offset: int, length: int) -> BytesLike:
        return ZEROES[:length] if length <= len(ZEROES) else zeroes(length)

    def write(self, offset: int, data: BytesLike) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def trim(self, offset: int, length: int) -> None:
        """Do nothing."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        """Do nothing."""

    def cache(self, offset: int, length: int) -> None:
        """Do nothing."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [(length, True, True)]

    def resize(self, size: int) -> None:
        if not 0 <= size <= SIZE_BYTES_MAX:
            raise UsageError(f"null of {size} bytes: not from 0 to {SIZE_BYTES_MAX}")
        self.size = size
