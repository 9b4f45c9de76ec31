"""Block devices: drivers that hold the bytes, and the strict guard that every request passes.

A driver may be a class of ten lines: homeloop.block.driver has its contract. Device takes one over and is
what exports and programs talk to. Memory and File are the drivers that come along.
"""

from homeloop.block.device import Answer, Device, DeviceStatistics
from homeloop.block.driver import BlockSize, BytesLike, Driver, ThreadModel
from homeloop.block.file import File
from homeloop.block.memory import Memory
from homeloop.block.opening import open_device, parse_size

__all__ = [
    "Answer",
    "BlockSize",
    "BytesLike",
    "Device",
    "DeviceStatistics",
    "Driver",
    "File",
    "Memory",
    "ThreadModel",
    "open_device",
    "parse_size",
]
