"""What stands between a node and the node above it: a part of its device, or all of it, and never its end.

A filter takes its driver over and closes it in the end; a node has a life of its own, and may have several users.
"""

from __future__ import annotations

from homeloop.block.device import Answer, Device
from homeloop.block.driver import BytesLike, ThreadModel
from homeloop.block.extents import Extent
from homeloop.errors import UsageError

__all__ = ["Window"]


class Window:
    """A driver: `size` bytes of a device from `offset` on (None: all that there are). At the device's home.

    UsageError, in QEMU's words, for a window that is not inside the device.
    """

    thread_model: ThreadModel = "direct"

    def __init__(self, device: Device, offset: int = 0, size: int | None = None) -> None:
        if offset > device.size:
            raise UsageError(
                f"Offset ({offset}) cannot be greater than size of the containing file ({device.size})"
            )
        if size is not None and offset + size > device.size:
            raise UsageError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of "
                f"the containing file ({device.size})"
            )
        if size is not None and size % 512:
            raise UsageError("Specified size is not multiple of 512")
        self.offset = offset
        self.size = device.size - offset if size is None else size
        self.device = device
        self.read_only = device.read_only
        self.block_size_min = device.block_size.minimum
        self.block_size_preferred = device.block_size.preferred
        self.multi_conn = device.can_multi_conn
        if (self.offset | self.size) % self.block_size_min:
            raise UsageError(f"{self!r} is not in blocks of {self.block_size_min} bytes")
        # A method that is None is not there: nothing is offered that the device below cannot do.
        offered = {
            "write": device.can_write, "write_fua": device.can_fua, "flush": device.can_flush,
            "trim": device.can_trim, "write_zeroes": device.can_fast_zero, "cache": device.can_cache,
        }
        for name, is_offered in offered.items():
            if not is_offered:
                setattr(self, name, None)
        if device.can_write_zeroes and not device.can_fast_zero:
            setattr(self, "write_zeroes", self._zeroes_never_fast)      # noqa: B010 - mypy: it is a method

    def __repr__(self) -> str:
        return f"<Window of {self.size} bytes at {self.offset} of {self.device!r}>"

    def read(self, offset: int, length: int) -> Answer[BytesLike]:
        return self.device.read(self.offset + offset, length)

    def write(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.device.write(self.offset + offset, data)

    def write_fua(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.device.write(self.offset + offset, data, fua=True)

    def flush(self) -> Answer[None]:
        return self.device.flush()

    def trim(self, offset: int, length: int) -> Answer[None]:
        return self.device.trim(self.offset + offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Answer[None]:
        return self.device.write_zeroes(self.offset + offset, length, may_trim=may_trim, fast=fast)

    def _zeroes_never_fast(self, offset: int, length: int, *, may_trim: bool) -> Answer[None]:
        return self.device.write_zeroes(self.offset + offset, length, may_trim=may_trim)

    def cache(self, offset: int, length: int) -> Answer[None]:
        return self.device.cache(self.offset + offset, length)

    def extents(self, offset: int, length: int) -> Answer[list[Extent]]:
        return self.device.extents(self.offset + offset, length)
