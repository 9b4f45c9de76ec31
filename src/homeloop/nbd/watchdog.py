"""Finds what keeps an export's home from coming round, and says who and where in the log.

A thread of its own looks at the homes, a few times in the span that one may take; requests cost nothing. It sees the
loop's counter of iterations, and whether the home sleeps. Where it did not move and does not sleep, a callback is
posted: a home that has run it has come round, whatever the counter says. One that sleeps idle is left asleep.

    looks     iteration 7   iteration 7: post a probe     it has not run: tell             it has run: over
    home      7 ..................................................................... 8

Time in which the process did not run (stopped, or somebody held the GIL) is nobody's fault here, and not counted.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from homeloop.block import device as device_module
from homeloop.core.context import AioContext
from homeloop.nbd.export import Export

__all__ = ["Watchdog"]

logger = logging.getLogger(__name__)

_LOOKS: Final = 4  # in the span that a home may take
_FRAMES_MAX: Final = 40  # of the stack, the innermost
_ADVICE: Final = (
    'A driver whose plain methods block says so (thread_model = "serialised" or "parallel", and they run on workers), '
    "an async one hands what blocks to to_worker(); or give its export an IOThread of its own."
)


@dataclass(slots=True, eq=False)
class _Probe:
    """A callback that notes when it ran, and where."""

    ran_at: float | None = None
    thread: int = 0

    def __call__(self) -> None:
        self.thread = threading.get_ident()
        self.ran_at = time.monotonic()


@dataclass(slots=True, eq=False)
class _Home:
    """One context that is looked at. The watchdog's thread only, but for `exports`."""

    context: AioContext
    exports: list[Export] = field(default_factory=list)  # under the watchdog's lock
    iteration: int = -1  # last seen
    since: float = 0.0  # when it was first seen so
    probe: _Probe | None = None  # on its way, or it has run
    thread: int = 0  # of a loop of another make: which thread ran our last probe
    told: bool = False

    def is_idle(self) -> bool:
        """Does nobody run it, or does it sleep?"""
        context = self.context
        if context.home is None:
            return not any(export.connections for export in self.exports)  # else only a probe can tell
        if context.gate is not None and context.gate._holder:
            return False
        return context.home.home_ident is None or context.inbox.sleeping()

    def culprit(self) -> int:
        """Return the ident of the thread that should come round."""
        context = self.context
        if context.home is None:
            return self.thread
        holder = context.gate._holder if context.gate is not None else 0  # as it is: its lock may be what hangs
        return holder or context.home.home_ident or 0


class Watchdog:
    """Looks after the homes of one server's exports. Methods: any thread; none waits.

    Its thread is there while an export is, and a daemon: it holds up no end of a program.
    """

    def __init__(self, name: str, blocked_s: float) -> None:
        """blocked_s: how long a home may take to come round."""
        self._name = name
        self._blocked_s = blocked_s
        self._changed = threading.Condition()  # a leaf
        self._homes: dict[AioContext, _Home] = {}  # under _changed
        self._running = False  # under _changed: a thread looks, or is about to

    def watch(self, export: Export) -> None:
        """Look after the home of an export."""
        with self._changed:
            home = self._homes.get(export.context)
            if home is None:
                home = self._homes[export.context] = _Home(export.context, since=time.monotonic())
            home.exports.append(export)
            if self._running:
                return
            self._running = True
        try:
            threading.Thread(target=self._run, name=f"{self._name} watchdog", daemon=True).start()
        except RuntimeError as error:  # the system has no more threads: the export is served all the same
            with self._changed:
                self._running = False
            logger.warning("%s: nobody looks whether a device blocks: %s", self._name, error)

    def forget(self, export: Export) -> None:
        """The export has gone. Once."""
        with self._changed:
            home = self._homes.get(export.context)
            if home is None:
                return  # its context has ended
            home.exports.remove(export)
            if not home.exports:
                del self._homes[export.context]
            self._changed.notify_all()

    def look(self, now: float, late_s: float = 0.0) -> None:
        """Look at every home, and tell of those that did not come round. For one thread at a time.

        now: of time.monotonic(). late_s: of the time since the last look, we did not run for so long.
        """
        with self._changed:
            homes = [(home, list(home.exports)) for home in self._homes.values()]
        for home, exports in homes:
            home.since = min(now, home.since + late_s)
            self._look_at(home, exports, now)

    def _run(self) -> None:
        look_every_s = self._blocked_s / _LOOKS
        before = time.monotonic()
        while True:
            with self._changed:
                self._homes = {context: home for context, home in self._homes.items() if not context.closed}
                if not self._homes:
                    self._running = False
                    return
                self._changed.wait(look_every_s)
            now = time.monotonic()
            late_s, before = now - before - look_every_s, now
            self.look(now, late_s if late_s > look_every_s else 0.0)

    def _look_at(self, home: _Home, exports: list[Export], now: float) -> None:
        probe = home.probe
        if probe is not None:
            if probe.ran_at is None:
                if not home.told and now - home.since >= self._blocked_s:
                    home.told = True
                    self._tell(home, exports, now - home.since)
                return
            if home.told:
                text = "%s: %s comes round again, after %.1f s"
                logger.warning(text, self._name, home.context.name, probe.ran_at - home.since)
            home.thread, home.probe, home.told, home.since = probe.thread, None, False, now
            home.iteration = -1
            return
        iteration = home.context.home._iteration if home.context.home is not None else 0
        if iteration != home.iteration or home.is_idle():
            home.iteration, home.since = iteration, now
            return
        probe = _Probe()
        if home.context.try_post(probe):
            home.probe = probe

    def _tell(self, home: _Home, exports: list[Export], took_s: float) -> None:
        ident = home.culprit()
        frame = sys._current_frames().get(ident)
        stack = "  (no thread runs it)\n" if frame is None else "".join(traceback.format_stack(frame)[-_FRAMES_MAX:])
        found = _export_in(frame, exports)
        names = ", ".join(_shown(export) for export in exports if found is None or export is found)
        thread = next((thread.name for thread in threading.enumerate() if thread.ident == ident), str(ident))
        why = "the home of" if found is None else "blocked by"
        text = "%s: %s has not come round for %.1f s, %s %s; thread %r is at\n%s%s"
        logger.warning(text, self._name, home.context.name, took_s, why, names, thread, stack, _ADVICE)


def _shown(export: Export) -> str:
    return f"export {export.name!r} ({export.device.name})"


def _export_in(frame: FrameType | None, exports: list[Export]) -> Export | None:
    """Whose device does a stack go through? None: no device's, or it has moved on meanwhile."""
    while frame is not None:
        if frame.f_code.co_filename == device_module.__file__:
            mine = frame.f_locals.get("self")
            for export in exports:
                if mine is export.device:
                    return export
        frame = frame.f_back
    return None
