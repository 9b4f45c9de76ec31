"""The blocking connect of a client that reconnects, in a plain thread that outlives who waits for it.

    home (a coroutine)                          thread "nbd-connect"
    session(): mutex, I am the waiter           attempt.run(): resolve, connect, shake hands; no mutex
    park                                        mutex, the outcome is there, wake the waiter   <- under the mutex
    goes on at home, only there: mutex ...

The thread wakes while it holds the mutex, and the woken coroutine takes that mutex in its next step. This is right
because a thread without a context has none, so a wake in it only schedules (rules 1 and 5). QEMU's nbd client is built
the same way, and hung in 2021 while its threads passed for the main one: the wake ran the coroutine there, on the stack
of who held the mutex.

Source: behaviour of QEMU's nbd/client-connection.c.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from homeloop.core.coroutine import Coroutine, current_coroutine, park
from homeloop.errors import WrongState
from homeloop.nbd.attempt import Attempt
from homeloop.nbd.session import Session

__all__ = ["BACKOFF_S", "Connector", "Pacing", "Timer"]

BACKOFF_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0)  # QEMU's


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> object: ...


def _call_later(loop: asyncio.AbstractEventLoop, seconds: float, fn: Callable[[], object]) -> Timer:
    return loop.call_later(seconds, fn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """How a client that reconnects waits. Tests hand in their own.

    backoff_s: before the second, third, ... attempt; the last holds for all further ones. pause: sleeps so many
    seconds, or until the event is set; in the connect thread. call_later: the timers of the home.
    """

    backoff_s: Sequence[float] = BACKOFF_S
    pause: Callable[[threading.Event, float], object] = threading.Event.wait
    call_later: Callable[[asyncio.AbstractEventLoop, float, Callable[[], object]], Timer] = _call_later


class Connector:
    """Makes sessions, one at a time, for one waiter at a time.

    Cancelling the waiter changes nothing for the thread: the session is there for the next one. Attempts go on until
    one succeeds or close().
    """

    def __init__(self, attempt: Callable[[], Attempt], pacing: Pacing) -> None:
        self._new_attempt = attempt
        self._pacing = pacing
        self._stop = threading.Event()
        # Plain, and held for a few lines only: never while the thread connects or pauses.
        self._mutex = threading.Lock()
        self._running = False                       # under _mutex: is there a thread?
        self._attempt: Attempt | None = None        # under _mutex: the one that it makes now
        self._attempts = 0                          # under _mutex: since the last proof that the server works
        self._session: Session | None = None        # under _mutex: made, and not taken yet
        self._failure: Exception | None = None      # under _mutex: of the last attempt
        self._failures = 0                          # under _mutex: ever
        self._waiter: Coroutine[object] | None = None       # under _mutex
        self._closed = False                        # under _mutex

    @property
    def failure(self) -> Exception | None:
        """Why the last attempt failed; None if it has not. Any thread."""
        with self._mutex:
            return self._failure

    async def session(self, *, retry: bool = True) -> Session:
        """Wait for a session and take it over. In a homeloop Coroutine that nobody else wakes.

        retry: else the first failed attempt from now on raises its error; the thread goes on trying. WrongState if
        somebody waits already, or after close(). Cancelled: the thread goes on for the next one.
        """
        me = current_coroutine()
        assert me is not None, "session() outside a homeloop coroutine"
        with self._mutex:
            self._check_open_locked()
            if self._waiter is not None:
                raise WrongState(f"{self._waiter!r} waits for the session already")
            failures = self._failures
            self._start_locked()
            self._waiter = me
        try:
            while True:
                with self._mutex:
                    self._check_open_locked()
                    session, self._session = self._session, None
                    if session is not None:
                        return session
                    if self._failures > failures and not retry:
                        assert self._failure is not None, "failed without a failure"
                        raise self._failure
                # A wake that comes before the park is remembered (rule 4); one too many only makes us look again.
                await park("nbd connect")
        finally:
            with self._mutex:
                self._waiter = None

    def works(self) -> None:
        """The last session has done what it is for: the next failure is the first again. Any thread."""
        with self._mutex:
            self._attempts = 0

    def close(self) -> None:
        """Give up: the attempt under way, the session that nobody took, the waiter. Any thread; twice is fine.

        Does not wait for the thread, which may be inside a blocking call; it ends when that does.
        """
        with self._mutex:
            self._closed = True
            self._stop.set()
            if self._attempt is not None:
                self._attempt.give_up()
            if self._session is not None:
                self._session.close()
                self._session = None
            if self._waiter is not None:
                # Not wake(): at its home that could run it here, on this stack, and it takes the mutex.
                self._waiter.schedule()

    def _check_open_locked(self) -> None:
        if self._closed:
            raise WrongState("the connector is closed")

    def _start_locked(self) -> None:
        if self._running or self._session is not None:
            return
        # A daemon: a peer that does not answer, or a resolver, must not keep the process from ending.
        threading.Thread(target=self._run, name="nbd-connect", daemon=True).start()
        self._running = True

    def _run(self) -> None:                         # the thread
        while (attempt := self._begin()) is not None:
            try:
                session = attempt.run()
            except Exception as error:
                ended = self._end(None, error)
            else:
                ended = self._end(session, None)
            if ended:
                return

    def _begin(self) -> Attempt | None:
        """Pause as long as the failures before ask for; None: it is over."""
        with self._mutex:
            before = self._attempts
        if before:
            delays = self._pacing.backoff_s
            self._pacing.pause(self._stop, delays[min(before, len(delays)) - 1])
        with self._mutex:
            if self._closed:
                self._running = False
                return None
            self._attempts += 1
            self._attempt = self._new_attempt()
            return self._attempt

    def _end(self, session: Session | None, failure: Exception | None) -> bool:
        """Publish how an attempt ended; True if it was the last."""
        with self._mutex:
            self._attempt = None
            if self._closed:
                if session is not None:
                    session.close()
                self._running = False
                return True
            self._failure = failure
            if failure is not None:
                self._failures += 1
            self._session = session
            self._running = session is None
            if self._waiter is not None:
                # Under the mutex, which it takes next: see the module's text.
                self._waiter.wake()
            return not self._running
