"""Block devices: drivers that hold the bytes, and the strict guard that every request passes.

A driver may be a class of ten lines: homeloop.block.driver has its contract. Device takes one over and is
what exports and programs talk to. Memory, File and Null are drivers that come along; open_device() finds others by
their names. Faults let a device fail by a script; homeloop.block.filters has drivers over a driver.
"""

from homeloop.block.device import Answer, Device, DeviceStatistics
from homeloop.block.driver import BlockSize, BytesLike, Driver, ThreadModel
from homeloop.block.fates import Stall
from homeloop.block.fault_filter import FaultFilter
from homeloop.block.faults import Faults, Happened, Rule
from homeloop.block.file import File
from homeloop.block.http import Http
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
    "FaultFilter",
    "Faults",
    "File",
    "Happened",
    "Http",
    "Memory",
    "Null",
    "Rule",
    "Spec",
    "Stall",
    "ThreadModel",
    "default_name",
    "open_device",
    "open_driver",
    "parse_size",
    "register_kind",
]
