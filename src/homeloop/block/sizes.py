"""Sizes as people type them: 512, 64k, 1G."""

from __future__ import annotations

import re
from typing import Final

from homeloop.block.driver import SIZE_BYTES_MAX
from homeloop.errors import UsageError

__all__ = ["parse_size"]

_SIZE: Final = re.compile(r"([0-9]{1,20})([kKmMgGtT]?)")
_SHIFT: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


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
