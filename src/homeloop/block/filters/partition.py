"""One partition of a disk, as a device of its own."""

from __future__ import annotations

import logging
from asyncio import iscoroutine

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.block.filters.offset import Offset
from homeloop.block.filters.tables import Found, find_partitions
from homeloop.errors import UsageError

__all__ = ["Partition", "partitions_of"]

_log = logging.getLogger(__name__)


class Partition(Offset):
    """The window that a partition is. Made by `await Partition.find(driver, number)`. Home thread."""

    def __init__(self, driver: Driver | Device, found: Found) -> None:
        super().__init__(driver, found.offset, found.size)
        self.number = found.number
        self.table = found.table

    @classmethod
    async def find(cls, driver: Driver | Device, number: int) -> Partition:
        """Read the partition table and take the partition of that number, as Linux counts: /dev/sda5 is 5.

        Raises UsageError for a table that is wrong, or has no such partition; BlockError if it cannot be read. The
        driver is the caller's still, then.
        """
        device = driver if isinstance(driver, Device) else Device(driver)
        found = {partition.number: partition for partition in await partitions_of(device)}
        if number not in found:
            there = ", ".join(map(str, found)) or "none at all"
            raise UsageError(f"the device has no partition {number}, but {there}")
        return cls(device, found[number])


async def partitions_of(device: Device) -> list[Found]:
    """Read a device's MBR or GPT. UsageError for a table that is wrong; BlockError if it cannot be read.

    Where a GPT is damaged its backup is read; a warning in the log says so, and why.
    """
    reading = find_partitions(device.size)
    granule = device.block_size.minimum
    try:
        offset, length = next(reading)
        while True:
            # Whole blocks, whatever they are.
            start = offset - offset % granule
            stop = -(-(offset + length) // granule) * granule
            answer = device.read(start, min(stop, device.size) - start)
            data = await answer if iscoroutine(answer) else answer
            offset, length = reading.send(bytes(data[offset - start : offset - start + length]))
    except StopIteration as end:
        found: list[Found] = end.value
        if found and found[0].damage:
            _log.warning("%s: the backup of its partition table is used: %s", device, found[0].damage)
        return found
