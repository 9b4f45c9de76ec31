"""An order of steps, forced upon threads: for the test of one interleaving."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator

__all__ = ["Sequencer"]

FRAMES_MAX = 4


class Sequencer:
    """Lets the named steps happen in the order given, whichever threads they are in.

    `with sequencer.step("b"):` waits until the steps before "b" have been done; the block is the step. Each step
    happens once. A wait is bounded: after `limit_s` seconds AssertionError says which step was due and which thread
    waited where. A step that raises breaks the sequence: who waits for a later one fails at once.

    Any thread. It blocks the thread, so a step in a coroutine holds up its whole loop: that is what it is for.
    """

    def __init__(self, *steps: str, limit_s: float = 10.0) -> None:
        if len(set(steps)) != len(steps):
            raise ValueError(f"a step is named twice: {', '.join(steps)}")
        self._steps = steps
        self._limit_s = limit_s
        self._changed = threading.Condition(threading.Lock())      # a leaf
        self._done = 0                                              # under _changed: steps behind us
        self._inside: int | None = None                             # under _changed: thread in the step that is due
        self._waiting: dict[int, str] = {}                          # under _changed: thread ident -> its step
        self._broken = ""                                           # under _changed: what broke the sequence

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Wait for the turn of `name`, then let the block be that step."""
        self._begin(name)
        try:
            yield
        except BaseException as exc:
            with self._changed:
                self._broken = f"step {name!r} raised {type(exc).__name__}: {exc}"
                self._changed.notify_all()
            raise
        with self._changed:
            self._done += 1
            self._inside = None
            self._changed.notify_all()

    def reach(self, name: str) -> None:
        """Wait for the turn of `name` and pass it at once: a step without a block."""
        with self.step(name):
            pass

    def wait_all(self) -> None:
        """Wait until every step has been done; bounded like a step."""
        with self._changed:
            self._wait_for(len(self._steps), "the end")

    def _begin(self, name: str) -> None:
        if name not in self._steps:
            raise ValueError(f"no step {name!r}; there are {', '.join(self._steps)}")
        place = self._steps.index(name)
        with self._changed:
            if self._done > place or (self._done == place and self._inside is not None):
                raise AssertionError(f"step {name!r} comes a second time\n{self._picture()}")
            self._wait_for(place, name)
            self._inside = threading.get_ident()

    def _wait_for(self, place: int, name: str) -> None:
        me = threading.get_ident()
        end = time.monotonic() + self._limit_s
        self._waiting[me] = name
        try:
            while self._done < place:
                if self._broken:
                    raise AssertionError(f"{name!r} will never come: {self._broken}")
                left = end - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"{name!r} did not come within {self._limit_s:g} s\n{self._picture()}")
                self._changed.wait(left)
        finally:
            del self._waiting[me]

    def _picture(self) -> str:
        """Who is where. Under _changed."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        due = self._steps[self._done] if self._done < len(self._steps) else "nothing"
        lines = [f"done: {', '.join(self._steps[:self._done]) or 'nothing'}; due: {due}"]
        for ident, frame in sys._current_frames().items():
            what = "inside the step that is due" if ident == self._inside else ""
            what = f"waits for {self._waiting[ident]!r}" if ident in self._waiting else what
            lines.append(f"thread {names.get(ident)!r} {what or 'is elsewhere'}:")
            lines += [line.rstrip() for line in traceback.format_stack(frame)[-FRAMES_MAX:]]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Sequencer {self._done} of {len(self._steps)} steps done{' broken' if self._broken else ''}>"
