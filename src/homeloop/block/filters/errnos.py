"""Which errno is meant: a number, or its name."""

from __future__ import annotations

import errno

from homeloop.errors import UsageError

__all__ = ["errno_of", "name_of"]


def errno_of(number: int | str) -> int:
    """Return the number of an errno given as a number or as a name such as "ENOSPC". UsageError if there is none."""
    found = getattr(errno, number, None) if isinstance(number, str) and number.startswith("E") else number
    if isinstance(found, bool) or not isinstance(found, int) or found not in errno.errorcode:
        raise UsageError(f"{number!r} is no errno: write a number or a name such as ENOSPC")
    return found


def name_of(number: int) -> str:
    return errno.errorcode.get(number, str(number))
