"""A device that nobody can change."""

from __future__ import annotations

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.block.filters.passing import Filter

__all__ = ["Readonly"]


class Readonly(Filter):
    """The driver below, without its changes: write, trim and their like are refused with EPERM. Home thread."""

    def __init__(self, driver: Driver | Device) -> None:
        super().__init__(driver)
        self.read_only = True
        self.multi_conn = True          # nothing changes: every connection sees the same
