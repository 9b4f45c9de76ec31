"""The one door into a context from other threads.

Any thread puts entries; the thread that runs the context takes them. An entry that put() accepted is
taken exactly once, in the order of the puts. Nothing here knows about event loops: how a sleeping home
is woken is handed in as `kick`.

The notify protocol (rule 7). Two things must never both happen: a producer that finds nobody asleep and
does not kick, and a sleeper that finds no entry and sleeps. Both sides decide under `lock`, so there is
one order of the two decisions, with or without the GIL:

    sleeper                          producer
    sleepers += 1                    entries.append(entry)
    entries? then do not sleep       sleepers and not kicked? then kick

While nobody sleeps, or a kick is already on its way, a put makes no system call. put() kicks behind the lock, so that
the home which wakes does not run into it; a home that wakes by itself in between finds the kick owed and leaves it so,
and it ends the next sleep.

`lock` is re-entrant for one reason: a Python signal handler runs on the main thread between two
bytecodes, perhaps inside these very methods, and may put. Each method is ordered so that a put from
inside it is harmless; the order matters where a comment says so.

The handler may also raise there (Ctrl-C), between a decision and its kick. Whoever decided on a kick then still makes
it, on the way out: else the flag would say for ever that one is under way, and no later wake would arrive.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from homeloop.errors import ContextClosed

__all__ = ["Inbox"]

get_ident = threading.get_ident


class Inbox:
    """Carries entries from any thread to the thread that runs a context."""

    __slots__ = (
        "_kick", "_kicked", "_loop_is_closed", "_settle", "_sleepers", "closed", "entries", "kicks", "lock", "name",
        "why_closed",
    )

    def __init__(self, name: str, kick: Callable[[], None], settle: Callable[[], None]) -> None:
        self.name = name                            # for error texts
        self._kick = kick                           # ends a sleep; must not block: runs under lock, or behind it
        # Takes back one kick; must not block: runs under lock. BlockingIOError: it has not come yet.
        self._settle = settle
        self.lock = threading.RLock()               # a leaf: nothing else is acquired under it
        self.entries: deque[Any] = deque()          # under lock; may be looked at without, to save a lock
        self._sleepers = 0                          # under lock: threads that sleep, or are about to
        self._kicked = 0                            # under lock: who decided on a kick that is not yet taken back
        self.closed = False                         # under lock
        self.why_closed = "has ended and takes no more work"
        self._loop_is_closed: Callable[[], bool] | None = None
        self.kicks = 0                              # under lock: system calls that wakes have cost

    def put(self, entry: Any) -> None:              # any thread, signal handlers too
        """Queue an entry for the home. Raises ContextClosed after close()."""
        if self._loop_is_closed is not None:
            with self.lock:
                self.check_open_locked()
                self.put_locked(entry)
            return
        try:
            with self.lock:
                self.check_open_locked()
                self.entries.append(entry)
                if not self._sleepers or self._kicked:
                    return
                self._kicked = get_ident()
                self.kicks += 1
            # Behind the lock: the system call lets the GIL go, and the home that it wakes would run into the lock. Two
            # contexts that wake each other took twice as long. The kick is owed from here on: see end_sleep_locked()
            # and kick_is_owed().
            self._kick()
        except BaseException:
            with self.lock:
                self._kick_after_all_locked()
            raise

    def refusal(self) -> ContextClosed:
        """The error for who comes after the end."""
        return ContextClosed(f"{self.name} {self.why_closed}")

    def check_open_locked(self) -> None:
        """Raise ContextClosed after close()."""
        if self.closed:
            raise self.refusal()

    def orphan(self) -> None:
        """In a forked child: nobody takes what is here. Coroutines that never ran are closed, so that no "never
        awaited" follows."""
        self.lock = threading.RLock()
        self.closed = True
        self.why_closed = "belongs to the parent process: make a runtime in the forked child"
        for entry in self.entries:
            close_unborn = getattr(entry, "close_unborn", None)
            if close_unborn is not None:
                close_unborn()
        self.entries.clear()

    def put_locked(self, entry: Any) -> None:       # with lock held, not closed
        if self._loop_is_closed is not None and self._loop_is_closed():
            self.closed = True              # its owner closed it without telling us
            raise self.refusal()
        try:
            self.entries.append(entry)
            if self._sleepers and not self._kicked:     # kick_locked(), less a call on the hot path
                # Under the lock on purpose: outside it, the home could end and close the file
                # descriptor between our append and our kick.
                self._kicked = get_ident()
                self.kicks += 1
                self._kick()
        except BaseException:
            self._kick_after_all_locked()
            raise

    def put_back_locked(self, entries: deque[Any]) -> None:
        """Put what was taken and not run before what has come since (a loop of another make)."""
        self.entries.extendleft(reversed(entries))
        self.kick_locked()

    def _kick_after_all_locked(self) -> None:
        """A put is left by an exception. Make the kick that it decided on, or that its entry needs.

        By a thread's own mark only: to repeat another's would leave one behind that nobody takes back. One's own may be
        repeated while the mark stands, for what takes it back takes both.
        """
        mine = self._kicked == get_ident()
        if mine or (self.entries and self._sleepers and not self._kicked and not self.closed):
            self._kicked = get_ident()
            self._kick()

    def notify(self) -> None:                       # any thread
        """End a sleep of the home, if it sleeps; nothing is queued."""
        with self.lock:
            if not self.closed:
                self.kick_locked()

    def begin_sleep(self) -> bool:                  # home thread, or who stands in for it
        """Announce a sleep. False: there is work, do not sleep (and do not call end_sleep)."""
        with self.lock:
            return self.begin_sleep_locked()

    def begin_sleep_locked(self) -> bool:
        self._sleepers += 1             # before the look, for a signal handler between the two
        if self.entries:
            self._sleepers -= 1
            return False
        return True

    def end_sleep(self) -> None:                    # the thread that began it
        with self.lock:
            self.end_sleep_locked()

    def end_sleep_locked(self) -> None:
        self._sleepers -= 1
        if self._kicked and not self._sleepers:
            # The last one takes the kick back: until then it ends the sleep of everybody, for each may wait for
            # something else. (A poll by who holds the big lock sleeps beside the home.)
            try:
                self._settle()          # before the flag: a put in between still counts on our take()
            except BlockingIOError:     # on its way from a put(): it will end the next sleep, and is settled then
                return
            except BaseException:       # Ctrl-C: was it taken back? With one more the flag is true in any case
                self._kick()
                raise
            self._kicked = 0

    def kick_is_owed(self) -> bool:                 # any thread
        """Was a kick decided on that was not taken back? The home waits for it before it closes its way."""
        with self.lock:
            return bool(self._kicked)

    def leave_out_locked(self) -> None:             # lock held, a thread sleeps
        """One of those that sleep is out of reach of a kick, also of one that is on its way."""
        self._sleepers -= 1

    def count_again_locked(self) -> None:           # lock held
        """It can be kicked again: now, if something has come meanwhile."""
        self._sleepers += 1
        if self.entries:
            self.kick_locked()

    def kick_locked(self) -> None:                  # lock held; the loop is not closed
        """End a sleep, whatever its reason."""
        if self._sleepers and not self._kicked:
            try:
                self._kicked = get_ident()
                self.kicks += 1
                self._kick()
            except BaseException:
                self._kick_after_all_locked()
                raise

    def serve_foreign(self, loop_is_closed: Callable[[], bool]) -> None:
        """For a loop of another make: it does not say when it sleeps, so the first put of a batch kicks; nor
        when it ends, so every put asks. put_locked() then raises ContextClosed."""
        self._sleepers = 1
        self._loop_is_closed = loop_is_closed

    def rearm(self) -> None:                        # with lock held
        """The batch has been taken: the next put kicks again."""
        self._kicked = 0

    def sleeping(self) -> bool:
        """Is a thread asleep, or about to be?"""
        with self.lock:
            return self._sleepers > 0

    def take(self, into: deque[Any]) -> None:       # home thread, or who stands in for it
        """Move all entries to the end of `into`."""
        with self.lock:
            # Exchanged, not copied and cleared: a signal handler between two such steps would put
            # an entry that the clear then loses.
            batch, self.entries = self.entries, deque()
            into.extend(batch)

    def close_if_empty(self) -> bool:               # home thread
        """Refuse further puts, unless there are entries to take first."""
        with self.lock:
            if self.entries:
                return False
            self.closed = True
            return True

    def close(self) -> list[Any]:                   # home thread, its last act
        """Refuse further puts; return what nobody took."""
        with self.lock:
            self.closed = True
            left = list(self.entries)
            self.entries.clear()
            return left
