"""What kind of file system a file is on. Any thread; may block."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["is_in_memory"]

_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


def is_in_memory(fd: int, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether the file is memory itself: reading and writing it waits for no disk, but for what was swapped out.

    False where that is not known: not Linux, no /proc, a file system that this process does not see (memfd).
    """
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(mounts, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                # proc(5): "36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw"
                before, _, behind = line.partition(" - ")
                fields = before.split()
                if len(fields) > 2 and fields[2] == number:
                    return behind.partition(" ")[0] in _IN_MEMORY
    except OSError:
        pass
    return False
