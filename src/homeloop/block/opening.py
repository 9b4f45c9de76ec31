"""From what a person types to a device: "memory:1G", "file:PATH" or PATH; sizes such as "64k"."""

from __future__ import annotations

import os
import re
from typing import Final

from homeloop.block.device import Device
from homeloop.block.driver import SIZE_BYTES_MAX
from homeloop.block.file import File
from homeloop.block.memory import Memory
from homeloop.errors import UsageError

__all__ = ["open_device", "parse_size"]

_SIZE: Final = re.compile(r"([0-9]{1,20})([kKmMgGtT]?)")
_SHIFT: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}

# What looks like KIND:rest. Not a path with a colon further down: "./a:b" and "/a:b" are paths.
_KIND: Final = re.compile(r"([A-Za-z][A-Za-z0-9+-]*):(.*)", re.DOTALL)


def parse_size(text: str) -> int:
    """Return the number of bytes that text stands for: digits, then nothing or one of k, M, G, T (binary powers).

    Raises UsageError, quoting the text, for anything else.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size: write bytes, or a number with k, M, G or T, such as 512M")
    size = int(match[1]) << _SHIFT[match[2].lower()]
    if size > SIZE_BYTES_MAX:
        raise UsageError(f"{text!r} is {size} bytes, more than a device can have ({SIZE_BYTES_MAX})")
    return size


def open_device(
    spec: str, *, read_only: bool = False, size: int | None = None, create: bool = False
) -> Device:
    """Open the device that spec names: "memory:SIZE", "file:PATH", or PATH.

    size and create are for files: see File. A path that looks like KIND:rest must be written file:PATH, so
    that a misspelt kind is an error and not a missing file. May block: in a coroutine call it through a
    worker.

    Raises UsageError, one sentence, for a spec that makes no sense; BlockError if the image cannot be opened
    or is in use.
    """
    match = _KIND.fullmatch(spec)
    kind, rest = ("file", spec) if match is None else (match[1], match[2])
    if kind == "memory":
        if size is not None or create:
            raise UsageError(f"{spec!r}: memory takes its size behind the colon, and needs no creating")
        return Device(Memory(parse_size(rest)), name="memory", read_only=read_only)
    if kind != "file":
        raise UsageError(
            f"{spec!r}: there is no kind of device {kind!r}, only memory:SIZE and file:PATH (or a path)"
        )
    if not rest or "\0" in rest:
        raise UsageError(f"{spec!r} names no file")
    driver = File(rest, read_only=read_only, size=size, create=create)
    return Device(driver, name=os.path.basename(rest), read_only=read_only)
