"""Which context a loop of another make has: AioContext.of() makes one for it, an IOThread brings one."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homeloop.core.context import AioContext

__all__ = ["AdoptedLoops"]


class AdoptedLoops:
    """Contexts by their loops; closed loops are forgotten whenever one comes. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()                                           # a leaf
        self._contexts: dict[asyncio.AbstractEventLoop, AioContext] = {}        # under _lock
        self.numbers = itertools.count(1)                                       # for names

    def get(self, loop: asyncio.AbstractEventLoop) -> AioContext | None:
        """The context that the loop has, if it has one."""
        with self._lock:
            return self._contexts.get(loop)

    def remember(self, context: AioContext) -> None:
        """This is the context of its loop."""
        with self._lock:
            for closed in [loop for loop in self._contexts if loop.is_closed()]:
                del self._contexts[closed]      # a context holds its loop: they would stay for ever
            self._contexts[context.loop] = context
