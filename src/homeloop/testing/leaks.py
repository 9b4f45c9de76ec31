"""What a piece of code left behind: threads, file descriptors, coroutines, contexts."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from homeloop.testing.snapshots import open_contexts, tasks_of

__all__ = ["leak_check"]

LOOK_EVERY_S = 0.005
_NEVER = threading.Event()


@contextlib.contextmanager
def leak_check(*, within_s: float = 3.0) -> Iterator[None]:
    """Fail with AssertionError if the block leaves threads, file descriptors, coroutines or contexts behind.

    Ends take time, so what is left is looked at again for up to `within_s` seconds. Coroutines and tasks are those of
    homeloop's contexts, adopted ones included; file descriptors are seen where the system lists them (/proc/self/fd,
    /dev/fd). An exception of the block goes through unchecked. Call it in a thread without a context: in a home
    nothing can end while it waits. One at a time: what another thread opens meanwhile is taken for ours.
    """
    before = _seen()
    yield
    end = time.monotonic() + within_s
    gc.collect()                        # an object in a cycle still holds what it opened
    while left := _left(before):
        if time.monotonic() >= end:
            raise AssertionError(f"left behind after {within_s:g} s:\n" + "\n".join(left))
        _NEVER.wait(LOOK_EVERY_S)


def _seen() -> dict[Any, str]:
    """All that there is now, each with its text."""
    dummy = threading._DummyThread      # a thread that Python did not start
    seen: dict[Any, str] = {
        thread: f"thread {thread.name!r}" for thread in threading.enumerate() if not isinstance(thread, dummy)
    }
    for fd, target in _descriptors().items():
        seen[fd, target] = f"file descriptor {fd}: {target}"
    for context in open_contexts():
        seen[context] = f"context {context!r}"
        for task in tasks_of(context):
            seen[task] = f"in {context.name}: {task!r}"
    return seen


def _left(before: dict[Any, str]) -> list[str]:
    return [text for thing, text in _seen().items() if thing not in before]


def _descriptors() -> dict[int, str]:
    """Open file descriptors, each with what it is open on; nothing where the system does not list them."""
    found = {}
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            numbers = [int(name) for name in os.listdir(folder)]
        except OSError:
            continue
        for fd in numbers:
            try:
                found[fd] = os.readlink(f"{folder}/{fd}") if folder.startswith("/proc") else str(os.fstat(fd).st_ino)
            except OSError:             # the one that listdir() had open itself
                continue
        break
    return found
