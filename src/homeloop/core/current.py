"""Which context a thread is in (rule 1): a truthful answer, and None is one.

QEMU's rule (qemu_get_current_aio_context since June 2021): the thread's own context first, the big
lock second, None last. What a thread is, is registered by the thread itself, never inferred.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homeloop.core.biglock import BigLock
    from homeloop.core.context import AioContext
    from homeloop.core.runtime import Runtime

__all__ = ["ThreadState", "at_thread_end", "current_context", "thread"]

get_ident = threading.get_ident

# Called with its name in each thread that has asked where it is, as its last act. Appended to while modules load.
at_thread_end: list[Callable[[str], None]] = []


class _LastAct:
    """Goes when the state of its thread goes: that is how the end of any thread is noticed, whoever started it."""

    __slots__ = ("ident", "name")

    def __init__(self) -> None:
        self.ident = get_ident()
        # Noted now: a thread that ends is forgotten by `threading` before its state goes.
        self.name = next((known.name for known in threading.enumerate() if known.ident == self.ident), str(self.ident))

    # At the interpreter's end the names of modules are gone before this thread's state is: hence the default.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing() or get_ident() != self.ident:        # else, a forked child clears up after others
            return
        for act in at_thread_end:
            act(self.name)


class ThreadState(threading.local):
    """What a thread is. Written by the thread itself only."""

    context: AioContext | None = None       # whose home this thread is; set once while it serves it
    held: BigLock | None = None             # the big lock that this thread holds (the newest, if several)
    adopted: AioContext | None = None       # the context of a foreign loop that runs in this thread
    runtime: Runtime | None = None          # to which runtime the thread belongs, if to any

    def __init__(self) -> None:             # called once per thread
        self.guards: list[list[Any]] = []   # `with big_lock:` that locked: the lock, who it was for, how deep
        self.suspended: dict[BigLock, object] = {}      # what we ran when we let a big lock go in the middle
        self.last_act = _LastAct()
        self.pool_of: AioContext | None = None      # whose worker this thread is
        self.waits = 0                      # synchronous waits around us
        self.sleeps: list[Any] = []         # waits of ours that others may look at: weak, see waitgraph
        self.below: list[object] = []       # coroutines below a nested wait on this stack: they cannot go on

    def forget(self) -> None:
        """Be a thread that is in nothing: a forked child."""
        self.context = self.held = self.adopted = self.runtime = None
        self.suspended.clear()
        self.guards.clear()
        self.waits = 0
        self.sleeps.clear()
        self.below.clear()


thread = ThreadState()


def current_context() -> AioContext | None:
    """Return the context that the calling thread is in, or None.

    Any thread, never waits. In this order: the context whose home the thread is; the main context of the
    runtime whose big lock it holds; the context of a foreign loop that runs in it and was adopted; None.
    Source: design rule 1; QEMU's qemu_get_current_aio_context.
    """
    context = thread.context
    if context is not None:
        return context
    held = thread.held
    if held is not None:
        return held.context
    adopted = thread.adopted
    if adopted is not None and adopted.runs_in_this_thread():
        return adopted
    return None
