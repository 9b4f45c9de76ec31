"""Large reads as pieces of the driver's own memory, that nobody copies: a driver's read_pieces().

For who sends them on at once, such as a connection. Home thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from homeloop.block.calling import Method, Way, quick_path_of
from homeloop.block.counting import Counts
from homeloop.block.driver import BytesLike, Driver

if TYPE_CHECKING:
    from homeloop.block.device import Device

__all__ = ["LENT_BYTES_MIN", "Lending", "lending_of"]

# Shorter ones are copied: the pages that are lent are copied when they are next written.
LENT_BYTES_MIN: Final = 128 << 10

_Pieces: TypeAlias = Sequence[BytesLike]


class Lending:
    """The large reads of one device."""

    def __init__(self, device: Device, fn: Callable[[int, int], _Pieces | None], counts: Counts) -> None:
        self._device = device
        self._fn = fn
        self._counts = counts

    def read(self, offset: int, length: int) -> _Pieces | None:
        """Return bytes that do not change any more, in pieces; None: ask Device.read, which knows why."""
        device = self._device
        if length < LENT_BYTES_MIN or not device.takes(offset, length):
            return None
        try:
            pieces = self._fn(offset, length)
        except Exception:
            return None             # read() meets it again, and reports it
        if pieces is None or sum(map(len, pieces)) != length:
            return None
        self._counts.reads[0] += 1
        self._counts.reads[1] += length
        return pieces


def lending_of(device: Device, driver: Driver, read: Method, counts: Counts) -> Lending | None:
    """Return how this device lends, or None if its driver does not, or not without waiting."""
    fn = quick_path_of(driver, "read_pieces")
    if fn is None or read.way is not Way.INLINE or not _goes_with_read(driver):
        return None
    return Lending(device, cast("Callable[[int, int], _Pieces | None]", fn), counts)


def _goes_with_read(driver: Driver) -> bool:
    """Whether read_pieces was written for this read, and not inherited by a class with a read of its own."""
    if "read" in getattr(driver, "__dict__", {}):
        return False
    for kind in type(driver).__mro__:
        if "read" in vars(kind):
            return "read_pieces" in vars(kind)
        if "read_pieces" in vars(kind):
            return True
    return False
