"""A window on a device: a part of it, as a device of its own."""

from __future__ import annotations

from homeloop.block.device import Answer, Device
from homeloop.block.driver import BytesLike, Driver
from homeloop.block.extents import Extent
from homeloop.block.filters.passing import Filter
from homeloop.errors import UsageError

__all__ = ["Offset"]


class Offset(Filter):
    """`size` bytes of the driver below, from its byte `offset` on; None: all that there are.

    Raises UsageError for a window that is not inside the device, or not in blocks of its block_size_min. Home thread.
    """

    def __init__(self, driver: Driver | Device, offset: int = 0, size: int | None = None) -> None:
        super().__init__(driver)
        whole, minimum = self.inner.size, self.block_size_min
        size = whole - offset if size is None else size
        if offset < 0 or size < 0 or offset + size > whole:
            raise UsageError(f"a window of {size} bytes at {offset} is not inside a device of {whole} bytes")
        if offset % minimum or size % minimum:
            raise UsageError(f"a window of {size} bytes at {offset} is not in blocks of {minimum} bytes")
        self.offset = offset
        self.size = size
        setattr(self, "resize", None)                       # noqa: B010 - it is where it is

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.size} bytes at {self.offset} of {self.inner!r}>"

    def read(self, offset: int, length: int) -> Answer[BytesLike]:
        return self.inner.read(self.offset + offset, length)

    def write(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.inner.write(self.offset + offset, data)

    def write_fua(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.inner.write(self.offset + offset, data, fua=True)

    def trim(self, offset: int, length: int) -> Answer[None]:
        return self.inner.trim(self.offset + offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Answer[None]:
        return self.inner.write_zeroes(self.offset + offset, length, may_trim=may_trim, fast=fast)

    def cache(self, offset: int, length: int) -> Answer[None]:
        return self.inner.cache(self.offset + offset, length)

    def extents(self, offset: int, length: int) -> Answer[list[Extent]]:
        return self.inner.extents(self.offset + offset, length)
