"""Which runtime is meant: the one that the thread belongs to, else the only one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from homeloop.core.current import at_thread_end, thread
from homeloop.errors import NoRuntime

if TYPE_CHECKING:
    from homeloop.core.biglock import BigLock
    from homeloop.core.context import AioContext
    from homeloop.core.runtime import Runtime

__all__ = ["big_lock", "forget", "forget_all", "main_context", "register", "runtime_of_this_thread", "the_runtime"]

_lock = threading.Lock()            # a leaf
_runtimes: list[Runtime] = []       # under _lock: those that have a main context and have not ended


def register(runtime: Runtime) -> None:
    """Remember a runtime from the making of its main context on. Any thread."""
    with _lock:
        _runtimes.append(runtime)


def forget(runtime: Runtime) -> None:
    """Forget a runtime that has ended; twice is fine. Any thread."""
    with _lock:
        if runtime in _runtimes:
            _runtimes.remove(runtime)


def forget_all() -> None:
    """In a forked child: the parent's runtimes are not ours."""
    global _lock
    _lock = threading.Lock()
    _runtimes.clear()


def _take_locks_back(name: str) -> None:
    """The calling thread ends: no big lock may stay with it (see BigLock.left_behind)."""
    for runtime in _runtimes[:]:         # others may change it meanwhile
        lock = runtime._big_lock
        if lock is not None and lock.held():
            lock.left_behind(name)


at_thread_end.append(_take_locks_back)


def runtime_of_this_thread() -> Runtime | None:
    """The runtime that the calling thread belongs to, else the only one; None if there is none or several."""
    if thread.runtime is not None:
        return thread.runtime
    if thread.held is not None:
        return thread.held.context.runtime
    with _lock:
        return _runtimes[0] if len(_runtimes) == 1 else None


def the_runtime() -> Runtime:
    """runtime_of_this_thread(), or NoRuntime."""
    runtime = runtime_of_this_thread()
    if runtime is None:
        with _lock:
            count = len(_runtimes)
        raise NoRuntime(
            f"{count} runtimes are open and this thread belongs to none: use the Runtime object"
            if count
            else "no runtime is open: use homeloop.run(), `with homeloop.Runtime()` or homeloop.new_event_loop()"
        )
    return runtime


def main_context() -> AioContext:
    """Return the main context of the runtime that this thread belongs to, else of the only one.

    Any thread, never waits. NoRuntime if there is none, or several and the thread belongs to none of them.
    """
    return the_runtime().main


def big_lock() -> BigLock:
    """Return the big lock of the runtime that main_context() means. Any thread; NoRuntime likewise."""
    return the_runtime().big_lock
