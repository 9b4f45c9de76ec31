"""NBD clients of others that the demo copies with, where they are installed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Final

__all__ = ["FOREIGN", "ForeignClient"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForeignClient:
    """A program that copies an export into a raw file."""

    name: str                           # of the program
    package: str                        # Debian's
    options: tuple[str, ...] = ()       # what stands between the program and URI, target
    pads_to: int = 1                    # bytes: its copy is filled up with zeroes to a multiple of so many

    async def copy(self, uri: str, target: str) -> str | None:
        """Run it; None, or why it failed. Cancelled, it is killed. A coroutine of any context."""
        process = await asyncio.create_subprocess_exec(
            self.name, *self.options, uri, target, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            _output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode == 0:
            return None
        said = errors.decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"exit status {process.returncode}"


_NBDCOPY: Final = ForeignClient(name="nbdcopy", package="libnbd-bin")
# QEMU's NBD client rounds the size up to sectors, and so does its copy. (Against a server without structured replies
# it waits for all of the rounded length of its last read, for ever: 7.2, also with nbdkit --no-sr.)
_QEMU_IMG: Final = ForeignClient(
    name="qemu-img", package="qemu-utils", options=("convert", "-f", "raw", "-O", "raw"), pads_to=512
)
FOREIGN: Final = (_NBDCOPY, _QEMU_IMG)
