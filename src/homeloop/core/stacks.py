"""Where a coroutine stands, for people: its frames, and the text that asyncio's tasks print of theirs."""

from __future__ import annotations

import traceback
import types
from typing import Any

__all__ = ["await_frames", "stack_text", "traceback_frames"]


def await_frames(coro: Any, limit: int | None) -> list[types.FrameType]:
    """The frames of a coroutine and of those that it awaits, outermost first; the newest `limit` of them.

    One that runs has only the first: what it awaits is not known from outside.
    """
    frames: list[types.FrameType] = []
    while (frame := getattr(coro, "cr_frame", None)) is not None:
        frames.append(frame)
        coro = coro.cr_await
    return frames if limit is None else frames[len(frames) - max(0, min(limit, len(frames))):]


def traceback_frames(entry: types.TracebackType | None, limit: int | None) -> list[types.FrameType]:
    """The frames of a traceback; the oldest `limit` of them, as the module traceback has it."""
    frames: list[types.FrameType] = []
    while entry is not None and (limit is None or len(frames) < limit):
        frames.append(entry.tb_frame)
        entry = entry.tb_next
    return frames


def stack_text(whose: str, frames: list[types.FrameType], error: BaseException | None) -> str:
    """What asyncio.Task.print_stack() prints."""
    kind = "Stack" if error is None else "Traceback"
    lines = [f"{kind} for {whose} (most recent call last):\n" if frames else f"No stack for {whose}\n"]
    lines += traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames).format()
    if error is not None:
        lines += traceback.format_exception_only(error)
    return "".join(lines)
