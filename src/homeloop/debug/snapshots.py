"""A picture of the runtime as text: contexts, what is parked in them and why, where each thread stands.

Nothing here waits for a lock: a picture is wanted most when a lock is what hangs. It may be a little torn for that.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from typing import Any, TypeVar

from homeloop.core import forking
from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.waitgraph import cycles

__all__ = ["context_lines", "open_contexts", "snapshot", "tasks_of"]

T = TypeVar("T")
FRAMES_MAX = 6          # of each thread: the innermost
TRIES = 100             # at a set that its home changes while we look


def snapshot(*, threads: bool = True) -> str:
    """Describe every open context with its coroutines and tasks, and where each thread of the process stands.

    For people: in the message of a test that ran out of time, or at a prompt. A parked coroutine shows the reason
    that it gave to park(). Waits that form a cycle are shown together, a line for each. Any thread, never waits, takes
    no lock; what moves meanwhile may be shown half moved.
    """
    lines = []
    for context in open_contexts():
        lines += context_lines(context)
    lines += cycles()
    if threads:
        lines += _thread_lines()
    return "\n".join(lines) or "no context is open"


def open_contexts() -> list[AioContext]:
    """All contexts of this process that have not ended, by name. Any thread."""
    # Only forking.py knows them all. Without its lock: snapshot() must not wait.
    contexts = _settled(forking._contexts)
    return sorted((context for context in contexts if not _has_ended(context)), key=lambda context: context.name)


def context_lines(context: AioContext) -> list[str]:
    """One context: itself, its big lock, then what has suspended in it."""
    home = "runs now" if context.home is None and context.is_served() else "nobody serves it"
    if context.home is not None and context.home.home_ident is not None:
        home = f"served by thread {_thread_name(context.home.home_ident)!r}"
    lines = [f"{context!r}: {home}, {len(context.inbox.entries)} entries in the inbox"]
    if context.gate is not None:
        lines.append(f"  {context.gate!r}")
    lines += [f"  {task!r}{_where(task)}" for task in sorted(tasks_of(context), key=repr)]
    return lines


def tasks_of(context: AioContext) -> set[Any]:
    """Coroutines and asyncio tasks of a context that have begun and not ended. Any thread."""
    tasks: set[Any] = set(_settled(context.coroutines)) | asyncio.all_tasks(context.loop)
    return {task for task in tasks if not task.done()}


def _has_ended(context: AioContext) -> bool:
    return context.closed or context.loop.is_closed()


def _settled(changing: Any) -> list[Any]:
    """The members of a set that other threads change."""
    for _ in range(TRIES):
        try:
            return list(changing)
        except RuntimeError:        # changed size during iteration
            continue
    return []


def _where(task: Any) -> str:
    """The line at which a suspended coroutine or task goes on."""
    if isinstance(task, Coroutine):
        frames = task.get_stack()
    else:
        frames = task.get_stack(limit=1)
    if not frames:
        return ""
    frame = frames[-1]
    return f"\n    at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _thread_name(ident: int) -> str:
    for thread in threading.enumerate():
        if thread.ident == ident:
            return thread.name
    return str(ident)


def _thread_lines() -> list[str]:
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {_thread_name(ident)!r}:")
        lines += [line.rstrip() for line in traceback.format_stack(frame)[-FRAMES_MAX:]]
    return lines
