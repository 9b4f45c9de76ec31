"""Driving: a thread that waits in call() serves the main loop itself, while the home sleeps on.

What a call() waits for is mostly an event of the loop. Left to the home, it costs two thread switches: the event
wakes the home, the home wakes the caller. So the caller sleeps in the loop's epoll itself, and runs what comes.

Two threads must not sleep in one epoll for that: each event would wake both, and they then fight for the GIL (5 to
25 ms an event, measured). The home therefore sleeps *outside*, on an epoll of its own that holds the loop's epoll;
while a thread drives, the loop's epoll is masked there. Begin and end of a drive are one system call each, and wake
nobody.

A sleep outside costs the home one more system call for each event (the look inside). It sleeps there only for a
while after somebody wished to drive (`SLEEPS_OUTSIDE`); a loop that nobody calls pays nothing.

A kick is an event of the loop's epoll, so it does not reach a home that is masked: the driver runs what was posted.
Such a home is not among the inbox's sleepers. When the drive ends it is again, in the step that unmasks it, and is
kicked if something has come meanwhile.
"""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from homeloop.core.entries import Raise
from homeloop.core.inbox import Inbox

if TYPE_CHECKING:
    from homeloop.core.coroutine import Coroutine
    from homeloop.core.loop import HomeLoop

__all__ = ["DRIVE_S", "SLEEPS_OUTSIDE", "Driving", "drive", "end_drive", "prepare_drive"]

# Who waits longer leaves the loop to its home: two thread switches are nothing then, and the wait, which the graph of
# waits does not know while its thread drives, is looked at for cycles.
DRIVE_S = 0.02

# Sleeps of the home that are outside after the last wish to drive.
SLEEPS_OUTSIDE: Final = 256

get_ident = threading.get_ident


class Driving:
    """Who serves one main loop beside its home, and where the home sleeps meanwhile."""

    def __init__(self, inbox: Inbox, inner: Any) -> None:
        self._inbox = inbox
        self._inner = inner                         # the loop's epoll
        self._outer: Any = None                     # big lock: what the home sleeps on; made by the first wish
        self.sleeps_left = 0                        # big lock: sleeps of the home that are to be outside
        self.expected = False                       # big lock: the last call() came to drive
        self.driver = 0                             # inbox lock: the thread that drives
        self._outside = False                       # inbox lock: the home sleeps outside
        self._masked = False                        # inbox lock: ... and no event or kick reaches it
        self._last: threading.Lock | None = None    # inbox lock: close() waits for the driver's end

    def begin(self) -> bool:                        # big lock, not the home
        """Be the driver, if the home sleeps outside and nobody else drives. Wish for it in any case."""
        self.sleeps_left = SLEEPS_OUTSIDE
        inbox = self._inbox
        with inbox.lock:
            if self.driver == get_ident():
                return True
            if not self._outside or self.driver or self._last is not None or inbox.kick_is_owed():
                return False
            self.driver = get_ident()
            self._masked = True
            inbox.leave_out_locked()
            self._outer.modify(self._inner, 0)
            return True

    def end(self) -> None:                          # the driver, or who may have become it; big lock
        """Drive no more: events and kicks reach the home again."""
        inbox = self._inbox
        with inbox.lock:
            if self.driver != get_ident():
                return
            self._outer.modify(self._inner, select.EPOLLIN)
            if self._masked:
                self._masked = False
                inbox.count_again_locked()
            self.driver = 0
            if self._last is not None:
                self._last.release()

    def fall_asleep_locked(self) -> None:           # home, in the step in which the inbox counts it as asleep
        """The home is about to sleep outside."""
        self.sleeps_left -= 1
        if self._outer is None:
            self._outer = select.epoll()
            self._outer.register(self._inner, select.EPOLLIN)
        self._outside = True
        if self.driver:
            # Whether or not a kick is on its way: that one is the driver's, who would spin until we have taken it back.
            self._masked = True
            self._inbox.leave_out_locked()

    def sleep(self, timeout: float | None) -> None:     # home
        """Until something is to be looked at inside."""
        self._outer.poll(timeout, 1)

    def wake_up_locked(self) -> None:               # home, instead of Inbox.end_sleep_locked
        """The home is up."""
        self._outside = False
        if self._masked:
            self._masked = False
        else:
            self._inbox.end_sleep_locked()

    def last_driver(self) -> threading.Lock | None:     # home, its last act; big lock
        """Let nobody drive any more. A lock that opens when the driver has ended, None if there is none."""
        with self._inbox.lock:
            self._last = threading.Lock()
            if not self.driver:
                return None
            self._last.acquire()
            self._inbox.kick_locked()
            return self._last

    def close(self) -> None:                        # home
        """Free the file descriptor."""
        if self._outer is not None:
            self._outer.close()


def prepare_drive(home: HomeLoop) -> None:
    """A thread without a context, which has the big lock, is about to run the coroutine of a call() that is expected to
    wait: what it waits for may come before drive(), and would wake the home. end_drive() is owed."""
    if home.driving is not None:
        home.driving.begin()


def drive(home: HomeLoop, co: Coroutine[Any], end: float | None) -> None:
    """Serve the loop until co has ended, if that saves the home's waking. Big lock; end_drive() is owed.

    Returns early after DRIVE_S, when `end` (of time.monotonic()) has come, or when the loop is to stop. A SystemExit of
    what else runs goes on to the home. Not where a Ctrl-C may come as an exception.
    """
    driving = home.driving
    if driving is None or not driving.begin():
        return
    me = get_ident()

    def ended(_co: object) -> None:     # home or big lock
        if get_ident() == me:
            home.end_iteration()
        else:
            home.inbox.notify()         # we sleep

    co.when_done(ended)
    now = time.monotonic()
    end = now + DRIVE_S if end is None else min(end, now + DRIVE_S)
    try:
        while not co.done() and now < end:
            if not home.drive_once(co, end - now):
                break
            now = time.monotonic()
    except SystemExit as exc:
        if co.done():
            raise
        home.queue_first(Raise(exc))        # it was meant to end the loop, so it goes home
    finally:
        if not co.done():
            co.forget_when_done(ended)


def end_drive(home: HomeLoop, waited: bool) -> None:
    """Undo prepare_drive() and drive(), if they made this thread the driver. waited: it was of use. Big lock."""
    driving = home.driving
    if driving is not None:
        driving.expected = waited
        if driving.driver:
            driving.end()
