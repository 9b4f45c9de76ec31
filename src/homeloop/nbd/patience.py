"""Which clients are cut off because nothing comes of them: looked at now and then, from the server's context.

Counters are compared, of all connections every few seconds: no timer is set for a request, and no sleeping home is
woken for a look. Only who is to go costs its home a call, and the home looks again before it closes.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from homeloop.core.context import AioContext
from homeloop.nbd.connection import Connection
from homeloop.nbd.counting import ConnectionStatistics

__all__ = ["Patience"]

_LOOKS: Final = 4  # in the shorter of the two times


@dataclass(slots=True)
class _Seen:
    """What a connection had done at the look at which it last had done something."""

    home: AioContext
    statistics: ConnectionStatistics
    since: float


class Patience:
    """How long a server bears with its clients. The server's context only.

    stalled_s: with one that takes none of its replies, or stops in the middle of a request. idle_s: with one that asks
    for nothing. None: for ever.
    """

    def __init__(self, context: AioContext, *, stalled_s: float | None, idle_s: float | None) -> None:
        self._context = context
        self._stalled_s, self._idle_s = stalled_s, idle_s
        self._look_every_s = min((limit for limit in (stalled_s, idle_s) if limit is not None), default=0.0) / _LOOKS
        self._connections: dict[Connection, _Seen] = {}
        self._timer: asyncio.TimerHandle | None = None  # while there are connections and a limit

    def begin(self, connection: Connection, home: AioContext) -> None:
        """A client has come, to be served there."""
        if not self._look_every_s:
            return
        self._connections[connection] = _Seen(home, connection.statistics(), time.monotonic())
        self._look_later()

    def end(self, connection: Connection) -> None:
        """It has left."""
        self._connections.pop(connection, None)
        if not self._connections and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        if self._timer is None and self._connections:
            self._timer = self._context.loop.call_later(self._look_every_s, self._look_now)

    def _look_now(self) -> None:
        self._timer = None
        self.look(time.monotonic())
        self._look_later()

    def look(self, now: float) -> None:
        """Compare all counters with those of the last look; `now` is of time.monotonic()."""
        for connection, seen in self._connections.items():
            statistics = connection.statistics()
            if statistics != seen.statistics:
                seen.statistics, seen.since = statistics, now
                continue
            reason = self._reason(statistics, now - seen.since)
            if reason:
                seen.home.try_post(connection.expel, reason, statistics)

    def _reason(self, statistics: ConnectionStatistics, unchanged_s: float) -> str:
        """Why is a client to go, that has done nothing for so long? Empty: it may stay."""
        if self._stalled_s is not None and unchanged_s >= self._stalled_s:
            if statistics.unsent_bytes:
                return f"it has taken none of its replies for {self._stalled_s:g} s"
            if statistics.buffered_bytes and not statistics.in_flight:  # else it may be us who read no more
                return f"it stopped {self._stalled_s:g} s ago in the middle of a request"
        waits = statistics.in_flight or statistics.unsent_bytes
        if self._idle_s is not None and unchanged_s >= self._idle_s and not waits:
            return f"no request for {self._idle_s:g} s"
        return ""
