"""A picture of the runtime as values that JSON can carry: what snapshot() says, for programs.

Any thread; waits for no lock, so that it is there when a lock is what hangs. What moves meanwhile may be half moved.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.debug.snapshots import open_contexts, tasks_of

__all__ = ["picture"]


def picture() -> dict[str, Any]:
    """Return the process, its open contexts with their coroutines and locks, and its threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        "pid": os.getpid(),
        "command": [sys.executable, *sys.argv[1:]] if not sys.argv or not sys.argv[0] else list(sys.argv),
        "contexts": [_context(context, names) for context in open_contexts()],
        "threads": [
            {"name": thread.name, "native_id": thread.native_id, "daemon": thread.daemon}
            for thread in threading.enumerate()
        ],
    }


def _context(context: AioContext, names: dict[int | None, str]) -> dict[str, Any]:
    home = None if context.home is None else context.home.home_ident
    statistics = context.statistics()
    shown: dict[str, Any] = {
        "name": context.name,
        "main": context.is_main(),
        "served_by": None if home is None else names.get(home, str(home)),
        "inbox": len(context.inbox.entries),
        "workers": statistics.workers,
        "coroutines": [_task(task) for task in sorted(tasks_of(context), key=repr)],
    }
    if context.gate is not None:
        holder = context.gate._holder               # as it is: its lock may be what hangs
        shown["big_lock"] = {
            "holder": names.get(holder, str(holder)) if holder else None,
            "waiting": [names.get(waiter.ident, str(waiter.ident)) for waiter in list(context.gate._waiters)],
        }
    return shown


def _task(task: Any) -> dict[str, Any]:
    ours = isinstance(task, Coroutine)
    frames = task.get_stack() if ours else task.get_stack(limit=1)
    frame = frames[-1] if frames else None
    return {
        "name": task.name if ours else task.get_name(),
        "state": task.state.value if ours else "task",
        "reason": task._reason if ours and task.state.value == "parked" else "",
        "at": None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}",
    }
