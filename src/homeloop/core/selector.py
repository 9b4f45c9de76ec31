"""The selector of a home loop: it sleeps without the big lock, and looks at what it found with it.

Of the standard library's selectors it uses two private names: EpollSelector._selector, to wait without touching
anything that needs a lock, and _fd_to_key, to look what was found up without a list in between.
"""

from __future__ import annotations

import select
import selectors
import threading
import time
from typing import TYPE_CHECKING, Any

from homeloop.core.driving import Driving
from homeloop.core.polling import AdaptivePolling

if TYPE_CHECKING:
    from homeloop.core.loop import HomeLoop

__all__ = ["IN", "OUT", "HomeSelector"]

get_ident = threading.get_ident
perf_counter_ns = time.perf_counter_ns

EVENT_READ, EVENT_WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
IN, OUT = getattr(select, "EPOLLIN", 1), getattr(select, "EPOLLOUT", 4)
_BOTH = EVENT_READ | EVENT_WRITE
_FLAGS = {EVENT_READ: IN, EVENT_WRITE: OUT, _BOTH: IN | OUT}


class HomeSelector(selectors.DefaultSelector):
    """A selector that sleeps without the big lock, and looks at what it found with it.

    While the lock was away another thread may have closed a file descriptor, given its number to a new
    one, or served what became ready. What was seen in the sleep is therefore only a hint: if anything
    changed meanwhile (`_epoch`), it is thrown away and asked for again, with the lock.
    """

    loop: HomeLoop
    _fd_to_key: dict[int, selectors.SelectorKey]

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0                                         # home or big lock: changes of the set, selects
        self.polling: AdaptivePolling | None = None             # home: None: off
        self.keys: dict[int, selectors.SelectorKey] = self._fd_to_key
        raw = getattr(self, "_selector", None)
        self._epoll = raw if hasattr(select, "epoll") and isinstance(raw, select.epoll) else None
        self._driving: Driving | None = None                    # big lock: once somebody asked

    # A coroutine that waits for a socket looks its descriptor up, finds none, registers it, finds it and unregisters
    # it. asyncio passes plain descriptors; for these, with epoll, the same in a step each: 3 us less for all five.

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        if type(fileobj) is not int or self.get_map() is None:      # None: closed
            return super().get_key(fileobj)
        key = self.keys.get(fileobj)
        if key is None:
            raise KeyError(fileobj)
        return key

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self._epoch += 1
        if type(fileobj) is not int or self._epoll is None or fileobj in self.keys or not 0 < events <= _BOTH:
            return super().register(fileobj, events, data)
        try:
            self._epoll.register(fileobj, _FLAGS[events])
        except FileExistsError:         # left behind: a Ctrl-C came between this step and the next
            self._epoll.modify(fileobj, _FLAGS[events])
        self.keys[fileobj] = key = selectors.SelectorKey(fileobj, fileobj, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        self._epoch += 1
        if type(fileobj) is not int or self._epoll is None or fileobj not in self.keys:
            return super().unregister(fileobj)
        key = self.keys.pop(fileobj)
        self.forget(fileobj)
        return key

    def forget(self, fd: int) -> None:
        """Let the kernel watch fd no longer, if it does: for one that is not registered here."""
        if self._epoll is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:             # closed already, as in the standard library
                pass

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self._epoch += 1
        return super().modify(fileobj, events, data)

    def watch_kick(self, fd: int) -> None:
        """Let fd end a sleep; it is nobody's reader and is never reported."""
        if self._epoll is not None:
            self._epoll.register(fd, IN)
        else:
            super().register(fd, EVENT_READ, None)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As selectors has it. The loop itself uses glance() and sleep(), which leave out the list."""
        if timeout is not None and timeout <= 0:
            found = self.glance()
        else:
            self.loop.note_next_timer()
            found = self.sleep(timeout)
        ready = []
        for fd, event in found:
            key = self._fd_to_key.get(fd)
            if key is not None:
                mask = (EVENT_READ if event & ~OUT else 0) | (EVENT_WRITE if event & ~IN else 0)
                ready.append((key, mask & key.events))
        return ready

    def glance(self) -> Any:
        """Return (fd, event) pairs of what is ready now.

        A sleep of 0 gives the big lock up too. Where nobody waits for it nobody could tell, so it is left out.
        """
        gate = self.loop.gate
        if gate is not None and gate._waiters:      # one that arrives just behind the look is seen by the next
            gate.give_way(get_ident())
        self._epoch += 1
        return self._wait(0)

    def sleep(self, timeout: float | None) -> Any:
        """Sleep at most `timeout` seconds without the big lock; return (fd, event) pairs, or nothing.

        Every event costs one of these: the inbox and the big lock share their mutex, so that one step announces
        the sleep and lets go, and one takes back (0.6 us an event less than four), and nothing is called that
        can stand here.
        """
        loop = self.loop
        inbox = loop.inbox
        gate = loop.gate
        if gate is None:
            if not inbox.begin_sleep():
                return self.glance()
            try:
                return self._wait(timeout)
            finally:
                inbox.end_sleep()
        epoch = self._epoch
        outer = gate._outer         # of who sleeps here with the lock's holder's rights; others take it meanwhile
        driving = self._driving
        if driving is not None and (not driving.sleeps_left or not loop.is_home_alone()):
            driving = None
        with inbox.lock:
            asleep = inbox.begin_sleep_locked()
            if asleep:
                if driving is not None:
                    driving.fall_asleep_locked()
                if gate._waiters:
                    gate.hand_over()
                else:
                    gate._holder = 0
        if not asleep:
            return self.glance()
        found: Any = None
        try:
            if driving is not None:
                driving.sleep(timeout)
            elif self._epoll is None:
                found = self._wait(timeout)
            else:
                found = self._epoll.poll(timeout, len(self.keys) + 1)
        finally:
            me = get_ident()
            with inbox.lock:
                if driving is not None:
                    driving.wake_up_locked()
                else:
                    inbox.end_sleep_locked()
                free = not gate._holder
                if free:
                    gate._holder = me
            if not free:
                gate.take_back(me)
            gate._outer = outer
        if driving is not None or epoch != self._epoch:
            found = self._wait(0)
        self._epoch += 1
        return found

    def wish_to_drive(self) -> Driving | None:      # big lock
        """Who else may serve the loop, from the first wish on; None where it cannot be driven."""
        if self._driving is None and self._epoll is not None:
            self._driving = Driving(self.loop.inbox, self._epoll)
        return self._driving

    def orphan(self) -> None:
        """In a forked child: who drove is a thread of the parent."""
        if self._driving is not None:
            self._driving.driver = 0

    def close(self) -> None:
        """As selectors has it. Home thread, with the big lock: a driver ends first."""
        driving, gate = self._driving, self.loop.gate
        if driving is not None and gate is not None:
            last = driving.last_driver()
            if last is not None:
                held = gate.held()
                if held:
                    gate.hand_over()        # the driver needs it to end
                last.acquire()
                if held:
                    gate.take_back(get_ident())
            driving.close()
        super().close()

    def look_then_sleep(self, polling: AdaptivePolling, timeout: float | None) -> Any:
        """sleep(), after a look as long as it is thought to pay."""
        start = perf_counter_ns()
        found = self._look(polling, start, timeout)
        if found is None:
            found = self.sleep(timeout)
        polling.learn(perf_counter_ns() - start)
        return found

    def _look(self, polling: AdaptivePolling, start: int, timeout: float | None) -> Any:
        """Look for work without sleeping, as long as it is thought to pay; None: there is none yet.

        Nobody kicks meanwhile: a put is found in the inbox. The big lock is given up as in any glance().
        """
        duration = polling.duration if timeout is None else min(polling.duration, int(timeout * 1e9))
        if not duration:
            return None
        loop = self.loop
        end = start + duration
        while True:
            found = self.glance()
            if found or loop.inbox.entries or (loop.gate is not None and loop.has_work()):
                polling.hits += 1
                return found
            if perf_counter_ns() >= end:
                polling.misses += 1
                return None

    def _wait(self, timeout: float | None) -> Any:
        # Touches nothing that needs a lock. epoll_wait() has a resolution of 1 ms; poll() rounds up, so
        # that it never busy-loops before a timer.
        if self._epoll is not None:
            return self._epoll.poll(timeout, len(self._fd_to_key) + 1)
        return [(key.fd, _FLAGS[mask]) for key, mask in super().select(timeout) if key.data is not None]
