"""BLOCK_IO_ERROR: requests that a device failed, told at most once a second for each export.

The home only notes it; the main context tells. The first is told at once, of those that follow within the second the
last one, at its end: a device that fails every request costs one event a second.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from homeloop.core.context import AioContext
from homeloop.errors import BlockError
from homeloop.nbd.protocol import Command

__all__ = ["IoErrors"]

EVERY_S: Final = 1.0
# What a client gets for a request that makes no sense, or for one that the export does not offer: no failure of the
# device.
_CLIENTS_FAULT: Final = frozenset({errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.ESHUTDOWN})
_READS: Final = frozenset({Command.READ.value, Command.CACHE.value, Command.BLOCK_STATUS.value})


class IoErrors:
    """The failures of one export."""

    def __init__(
        self, context: AioContext, node_name: str, emit: Callable[[str, dict[str, object]], None]
    ) -> None:
        self._context = context                             # the main context
        self._node_name = node_name
        self._emit = emit
        self._last: tuple[int, BlockError] | None = None    # home writes, main context takes: each an atomic step
        self._posted = False                                # likewise; wrong for a moment, it costs one post
        self._quiet = False                                 # main context: an event was told in this second

    def on_error(self, command: int, error: BlockError) -> None:
        """A request was answered with an error. The export's home."""
        if error.errno in _CLIENTS_FAULT:
            return
        self._last = command, error
        if not self._posted:
            self._posted = True
            self._context.try_post(self._tell)

    def _tell(self) -> None:                                # main context
        if self._quiet:
            return                                          # _wake_up() will
        self._posted = False
        last, self._last = self._last, None
        if last is None:
            return
        command, error = last
        self._quiet = True
        asyncio.get_running_loop().call_later(EVERY_S, self._wake_up)
        self._emit("BLOCK_IO_ERROR", {
            "device": "", "node-name": self._node_name, "operation": "read" if command in _READS else "write",
            "action": "report", "nospace": error.errno == errno.ENOSPC, "reason": error.text,
        })

    def _wake_up(self) -> None:                             # main context
        self._quiet = False
        self._tell()
