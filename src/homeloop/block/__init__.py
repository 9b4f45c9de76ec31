"""Block devices: drivers that hold the bytes, and the strict guard that every request passes.

A driver may be a class of ten lines: homeloop.block.driver has its contract. Device takes one over and is
what exports and programs talk to. Memory, File and Null are drivers that come along; open_device() finds others by
their names.
"""

from homeloop.block.device import Answer, Device, DeviceStatistics
from homeloop.block.driver import BlockSize, BytesLike, Driver, ThreadModel
from homeloop.block.file import File
from homeloop.block.memory import Memory
from homeloop.block.null import Null
from homeloop.block.opening import Spec, default_name, open_device, open_driver, register_kind
from homeloop.block.sizes import parse_size

__all__ = [
    "Answer",
    "BlockSize",
    "BytesLike",
    "Device",
    "DeviceStatistics",
    "Driver",
    "File",
    "Memory",
    "Null",
    "Spec",
    "ThreadModel",
    "default_name",
    "open_device",
    "open_driver",
    "parse_size",
    "register_kind",
]
