"""Ctrl-C as the cancellation of one coroutine, instead of an exception between any two bytecodes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from homeloop.core.current import thread

if TYPE_CHECKING:
    from homeloop.core.coroutine import Coroutine

__all__ = ["ctrl_c_cancels", "ctrl_c_is_ours", "ctrl_c_may_come"]


def ctrl_c_may_come() -> bool:
    """May a signal handler run in the calling thread? Python runs them in the main thread only."""
    return threading.get_ident() == threading.main_thread().ident


def ctrl_c_is_ours() -> bool:
    """Is it the main thread, with nobody's handler for Ctrl-C but Python's own?"""
    return ctrl_c_may_come() and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextlib.contextmanager
def ctrl_c_cancels(co: Coroutine[Any], *, raise_in_waits: bool = True) -> Iterator[list[int]]:
    """In the block the first Ctrl-C cancels co, the next raise KeyboardInterrupt; yields the list of them.

    In the main thread, unless somebody has a handler of his own; elsewhere it does nothing. raise_in_waits: the first
    one inside a synchronous wait raises there: a call() inside co, which the exception cancels and ends.
    """
    interrupts: list[int] = []

    def on_sigint(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)
        if len(interrupts) > 1 or (raise_in_waits and thread.waits) or not co.context.try_post(co.cancel):
            raise KeyboardInterrupt

    if not ctrl_c_is_ours():
        yield interrupts
        return
    signal.signal(signal.SIGINT, on_sigint)
    try:
        yield interrupts
    finally:
        if signal.getsignal(signal.SIGINT) is on_sigint:
            signal.signal(signal.SIGINT, signal.default_int_handler)
