"""What a forked child inherits: memory of contexts whose threads it has not (rule 19).

In the child every context of the parent is ended, and the thread that forked is in none. The child may
make runtimes of its own. Locks are made anew: another thread may have held them when the fork was made.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from homeloop.core import misuse, registry, waiting
from homeloop.core.current import thread

if TYPE_CHECKING:
    from homeloop.core.context import AioContext

__all__ = ["remember"]

_lock = threading.Lock()                                            # a leaf
_contexts: weakref.WeakSet[AioContext] = weakref.WeakSet()          # under _lock


def remember(context: AioContext) -> None:
    """Let a forked child know that this context is its parent's. Any thread."""
    with _lock:
        _contexts.add(context)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    thread.forget()
    registry.forget_all()
    waiting.forget_all()
    misuse.forget_all()
    for context in list(_contexts):
        context.orphan()
    _contexts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
