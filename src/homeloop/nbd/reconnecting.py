"""An NBD client that outlives its connections: it connects again, and asks again what had no answer.

    async with ReconnectingClient("nbd://host/disk", reconnect_delay=30) as disk:
        data = await disk.read(0, 4096)             # the server may be restarted meanwhile

What is promised
----------------

Every request is answered once: by the server, or with an error of ours. When a connection ends, requests in flight
and those that come wait for the next one and are sent on it; those that are not answered `reconnect_delay` seconds
after the loss fail with ConnectionLost, and so does every request from then on, at once, until the server is back.

- read, extents, cache: asking again changes nothing.
- write, trim, write_zeroes: one whose reply was lost may have been done, and is done again: the same bytes to the same
  place. Nobody was told that it is done, so nobody relies on an order with what came later. (A server that goes on with
  the requests of a connection that has ended might do the old one after the new one and whatever followed. That cannot
  be seen from here; servers finish or drop what they have when a connection ends.)
- flush: covers what was answered before it was asked for, on whichever connection. But a server that has crashed may
  have lost changes that it had answered and not flushed, and no flush on the next connection brings them back. So where
  a connection ended with such changes, the flushes that were to cover them fail with EIO, or, if none was under way,
  the next one does: once, as fsync() reports it. `server_keeps_writes=True` is for a server whose cache outlives it,
  such as one that serves files and was killed on a host that runs on: then flushes are asked again like the rest.
- A request that TRIES_MAX connections did not survive is taken for the cause, and fails.

The export must be the same one after a reconnect: size, flags, block sizes. If it is not, every request fails with a
PeerError that says what has changed, for good. A server that breaks the protocol fails the requests in flight, for
asking again would do it again; the others go to a new connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Final, TypeVar

from homeloop.block.extents import Extent
from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.errors import BlockError, ConnectionLost, PeerError, UsageError, WrongState
from homeloop.nbd.attempt import ATTEMPT_S, Attempt
from homeloop.nbd.client import IN_FLIGHT_MAX, Client
from homeloop.nbd.client_handshake import ServerInfo
from homeloop.nbd.connector import Connector, Pacing, Timer
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.protocol import TransmissionFlag
from homeloop.nbd.sending import BytesLike
from homeloop.nbd.session import Session
from homeloop.nbd.uri import NbdUri, parse_uri

__all__ = ["TRIES_MAX", "ReconnectingClient"]

T = TypeVar("T")
TRIES_MAX: Final = 5


class _State(enum.Enum):
    """new: not opened. connected. waiting: for a connection, and requests with it. failing: likewise, but the delay
    is over and requests fail at once. broken: for good, by another export. closed."""

    NEW = "new"
    CONNECTED = "connected"
    WAITING = "waiting"
    FAILING = "failing"
    BROKEN = "broken"
    CLOSED = "closed"


class ReconnectingClient:
    """A client of one export over one connection at a time: see the module's text for what it promises.

    `async with` it, or open() and close(). Its home is the context of who opened it; requests are for coroutines of any
    context or asyncio loop, and for call() from any thread: away from home they are run there. Errors as with Client.
    """

    def __init__(
        self,
        uri: str | NbdUri,
        *,
        reconnect_delay: float,
        open_timeout: float = 0.0,
        attempt_timeout: float = ATTEMPT_S,
        reply_timeout: float | None = None,
        in_flight_max: int = IN_FLIGHT_MAX,
        server_keeps_writes: bool = False,
        tls: TlsCredentials | None = None,
        pacing: Pacing | None = None,
        session: Session | None = None,
    ) -> None:
        """reconnect_delay, open_timeout: seconds that requests, or open(), wait for a connection. open_timeout 0: one
        attempt. attempt_timeout: for one attempt, resolving and handshake included. reply_timeout: a server that says
        nothing for so long while requests are in flight is taken for lost (None: a slow device is no dead one).
        session: the first one, made elsewhere; the export is known then, and open() need not be called. tls: as with
        connect(). Any thread.

        ValueError for what is no NBD URI.
        """
        if not (reconnect_delay >= 0 and open_timeout >= 0):
            raise UsageError(f"reconnect_delay={reconnect_delay}, open_timeout={open_timeout}: seconds, from 0 on")
        if not (attempt_timeout > 0 and (reply_timeout is None or reply_timeout > 0) and in_flight_max > 0):
            raise UsageError(f"attempt_timeout={attempt_timeout}, reply_timeout={reply_timeout}, "
                             f"in_flight_max={in_flight_max}: must be above 0")
        self.finishes_changes = False                               # as Client's; set before the first request
        self._uri = parse_uri(uri) if isinstance(uri, str) else uri
        self._reconnect_delay = reconnect_delay
        self._open_timeout = open_timeout
        self._reply_timeout = reply_timeout
        self._in_flight_max = in_flight_max
        self._keeps_writes = server_keeps_writes
        self._pacing = pacing or Pacing()
        self._connector = Connector(lambda: Attempt(self._uri, attempt_timeout, tls=tls), self._pacing)
        self._info = None if session is None else session.info     # set once
        self._settling = threading.Lock()                           # a leaf: who is first?
        self._first = session                                       # under _settling, till the home is known
        # Home only, from here on; the home itself is set once, by the first who asks, under _settling.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: AioContext | None = None
        self._state = _State.NEW
        self._client: Client | None = None                          # CONNECTED
        self._failure: PeerError | None = None                      # BROKEN
        self._loss: PeerError | None = None                         # why the last connection ended
        self._waiting: deque[asyncio.Future[None]] = deque()        # requests that wait for a connection
        self._timer: Timer | None = None                            # WAITING: the end of the delay
        self._silence: Timer | None = None                          # CONNECTED, with reply_timeout: the next look
        self._manager: Coroutine[None] | None = None                # gets the next session
        self._works = False                                         # this connection has answered a request
        self._connections = 0
        # What a flush is about: changes answered so far, those that a flush covers, losses between, losses reported.
        self._changed = 0
        self._stable = 0
        self._doubts = 0
        self._doubts_told = 0

    @property
    def info(self) -> ServerInfo:
        """What the server told of the export. Any thread; WrongState before it is known."""
        if self._info is None:
            raise WrongState("the client has not been opened")
        return self._info

    @property
    def size(self) -> int:
        """Of the export, in bytes."""
        return self.info.size

    @property
    def read_only(self) -> bool:
        """Does the server refuse changes?"""
        return self.can(TransmissionFlag.READ_ONLY)

    @property
    def connected(self) -> bool:
        """Is there a connection just now? Any thread."""
        return self._state is _State.CONNECTED

    @property
    def connections(self) -> int:
        """How many there were, with the one that is. Any thread."""
        return self._connections

    def can(self, flag: TransmissionFlag) -> bool:
        """Has the export this transmission flag?"""
        return bool(self.info.flags & flag)

    def __repr__(self) -> str:
        return f"<ReconnectingClient {self._uri} {self._state.value} connections={self._connections}>"

    # -- life ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> ReconnectingClient:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __await__(self) -> Generator[object, None, ReconnectingClient]:
        return self.open().__await__()

    async def open(self) -> ReconnectingClient:
        """Connect for the first time, and make this context the home; return self. Twice is fine.

        Without a connection in open_timeout seconds, or after the one attempt: the last attempt's error (OSError if
        nobody listens, BlockError if the server refuses, PeerError if it is none). The client is closed then.
        """
        if self._settle_home():
            await self._home.run(self._open())
        else:
            await self._open()
        return self

    async def _open(self) -> None:
        try:
            await self._connected("open")
        except BaseException:
            if not self._connections:           # else it was open, and whoever uses it goes on
                self._end(_State.CLOSED)
            raise

    async def close(self) -> None:
        """Take no more requests; finish those in flight if there is a connection, else fail them; say goodbye.

        Twice is fine. What was written is not flushed by this.
        """
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            await self._home.run(self.close())
            return
        client = self._client
        self._end(_State.CLOSED)
        try:
            if client is not None:
                await client.close()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await manager

    def abandon(self) -> None:
        """Drop a client that has never been used. Any thread."""
        self._connector.close()
        self._drop_first()

    def _drop_first(self) -> None:
        with self._settling:
            first, self._first = self._first, None
        if first is not None:
            first.close()

    # -- requests ------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> BytesLike:
        """As Client.read."""
        return await self._ask("read", lambda client: client.read(offset, length))

    async def write(self, offset: int, data: BytesLike, *, fua: bool = False) -> None:
        """As Client.write. `data` must not change until it returns: it may be sent again."""
        await self._ask("write", lambda client: client.write(offset, data, fua=fua), changes=not fua)

    async def flush(self) -> None:
        """As Client.flush; EIO if a connection was lost with changes that it should cover: see the module's text."""
        await self._ask("flush", self._flush_on(self._doubts))

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """As Client.trim."""
        await self._ask("trim", lambda client: client.trim(offset, length, fua=fua), changes=not fua)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, may_trim: bool = True, fast: bool = False
    ) -> None:
        """As Client.write_zeroes."""
        await self._ask(
            "write_zeroes",
            lambda client: client.write_zeroes(offset, length, fua=fua, may_trim=may_trim, fast=fast),
            changes=not fua,
        )

    async def cache(self, offset: int, length: int) -> None:
        """As Client.cache."""
        await self._ask("cache", lambda client: client.cache(offset, length))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As Client.extents."""
        return await self._ask("extents", lambda client: client.extents(offset, length))

    async def _ask(self, kind: str, ask: Callable[[Client], Awaitable[T]], *, changes: bool = False) -> T:
        if asyncio.get_running_loop() is not self._loop and self._settle_home():
            return await self._home.run(self._ask(kind, ask, changes=changes))
        tries = 0
        while True:
            client = self._client
            if client is None:
                client = await self._connected(kind)
            tries += 1
            try:
                answer = await ask(client)
            except ConnectionLost as error:
                if tries == TRIES_MAX:
                    text = f"{kind}: {tries} connections did not survive it: {error}"
                    raise ConnectionLost(text) from error
                if self._state is _State.CLOSED:
                    raise
                continue                    # when_failed() has been called: the next _connected() waits
            except BlockError as error:
                if error.errno != errno.ESHUTDOWN or tries == TRIES_MAX or self._state is _State.CLOSED:
                    raise
                # F4: the server is about to go, its successor may answer. The first to learn of it leaves.
                client.leave(ConnectionLost(f"the server shuts down: {error.text}"))
                continue
            if not self._works and client is self._client:
                self._works = True
                self._connector.works()
            if changes:
                self._note_change(client)
            return answer

    def _note_change(self, client: Client) -> None:
        if client is self._client:
            self._changed += 1
        elif self._may_lose_writes():
            self._doubts += 1                       # answered, and the connection lost before we came to run

    def _may_lose_writes(self) -> bool:
        return not self._keeps_writes and self.can(TransmissionFlag.SEND_FLUSH)

    def _flush_on(self, doubts_then: int) -> Callable[[Client], Awaitable[None]]:
        """One flush, to be tried on one connection or several. doubts_then: when it was asked for."""
        async def flush(client: Client) -> None:
            if self._doubts > doubts_then or self._doubts > self._doubts_told:
                self._doubts_told = self._doubts
                raise BlockError(
                    errno.EIO, f"flush: a connection to {self._uri} was lost with changes that the server had answered "
                    "and not flushed: it may have lost them"
                )
            covered = self._changed
            await client.flush()
            self._stable = max(self._stable, covered)

        return flush

    # -- connections: home ---------------------------------------------------------------------------------

    @property
    def _home(self) -> AioContext:
        assert self._context is not None, "no home yet"
        return self._context

    def _settle_home(self) -> bool:
        """Make this loop the home if there is none; True if the home is another."""
        loop = asyncio.get_running_loop()
        with self._settling:
            if self._loop is not None:
                return loop is not self._loop
            self._context = AioContext.of()
            self._loop = loop
            session, self._first = self._first, None
        if session is not None:
            self._take(session)
        return False

    async def _connected(self, what: str) -> Client:
        """Wait for a connection."""
        while self._client is None:
            match self._state:
                case _State.CLOSED:
                    raise WrongState(f"{what} on a client that is closed")
                case _State.BROKEN:
                    raise PeerError(f"{what}: {self._failure}") from self._failure
                case _State.FAILING:
                    raise self._not_connected(what)
                case _State.NEW:
                    self._start_opening()
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            finally:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(place)
        return self._client

    def _not_connected(self, what: str) -> Exception:
        failure = self._connector.failure
        if self._info is None and failure is not None:
            return failure                          # open(): as it would be without retries
        reason = failure or self._loss
        error = ConnectionLost(f"{what}: no connection to {self._uri} for {self._reconnect_delay:g} s: {reason}")
        error.__cause__ = reason
        return error

    def _start_opening(self) -> None:
        self._state = _State.WAITING
        if self._open_timeout:
            self._start_timer(self._open_timeout)
        self._manager = self._home.spawn(self._get_session(retry=self._open_timeout > 0), name="nbd reconnect")

    def _start_timer(self, seconds: float) -> None:
        assert self._loop is not None, "a timer before there is a home"
        self._timer = self._pacing.call_later(self._loop, seconds, self._delay_is_over)

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._silence):
            if timer is not None:
                timer.cancel()
        self._timer = self._silence = None

    def _listen(self, client: Client, heard: int) -> None:
        """Look whether the server has said anything since it was heard so often; it is lost if not, and should have."""
        if client.failure is not None or self._reply_timeout is None:
            return
        if client.in_flight and client.heard == heard:
            client.leave(ConnectionLost(f"the server has not said anything for {self._reply_timeout:g} s"))
            return
        assert self._loop is not None, "connected without a home"
        # Nothing in flight: whatever is asked next has all of the time.
        again = client.heard if client.in_flight else -1
        self._silence = self._pacing.call_later(self._loop, self._reply_timeout, lambda: self._listen(client, again))

    def _delay_is_over(self) -> None:
        self._timer = None
        if self._state is _State.WAITING:
            self._state = _State.FAILING
            self._wake_all()

    def _wake_all(self) -> None:
        """Let everybody who waits look at the state again."""
        for place in self._waiting:
            if not place.done():
                place.set_result(None)

    async def _get_session(self, *, retry: bool) -> None:
        """The manager's work: one session."""
        while True:
            try:
                session = await self._connector.session(retry=retry)
                break
            except WrongState:                      # closed meanwhile
                return
            except Exception:                       # whatever ended the one attempt of open(): that raises it
                self._delay_is_over()
                if not retry:
                    return
            await asyncio.sleep(self._pacing.backoff_s[-1])     # the system has no more threads, just now
        self._take(session)

    def _take(self, session: Session) -> None:
        """Go on with this session."""
        changed = [] if self._info is None else _differences(self._info, session.info)
        if changed:
            session.close()
            self._failure = PeerError(f"the export {self._uri} is another than before: {', '.join(changed)}")
            self._end(_State.BROKEN)
            return
        self._info = session.info
        self._stop_timers()
        client = Client(session.sock, session.info, session.leftover, in_flight_max=self._in_flight_max)
        client.finishes_changes = self.finishes_changes
        self._client, self._state, self._works = client, _State.CONNECTED, False
        self._connections += 1
        if client.failure is not None:              # it began by breaking the protocol
            self._lost(client)
            return
        client.when_failed = lambda _failure: self._lost(client)
        self._listen(client, -1)
        self._wake_all()

    def _lost(self, client: Client) -> None:
        """A connection has ended: begin to get the next one. Nobody who waits for it has been told yet."""
        if client is not self._client:
            return
        self._client, self._loss = None, client.failure
        self._stop_timers()
        if self._changed > self._stable and self._may_lose_writes():
            self._doubts += 1
        self._stable = self._changed
        if self._reconnect_delay:
            self._state = _State.WAITING
            self._start_timer(self._reconnect_delay)
        else:
            self._state = _State.FAILING
        self._manager = self._home.spawn(self._get_session(retry=True), name="nbd reconnect")

    def _end(self, state: _State) -> None:
        """No more connections: BROKEN or CLOSED."""
        if self._state is not _State.CLOSED:
            self._state = state
        self._client = None
        self._stop_timers()
        self._connector.close()
        self._drop_first()
        self._wake_all()


def _differences(before: ServerInfo, now: ServerInfo) -> list[str]:
    """What makes it another export, in words."""
    def values(info: ServerInfo) -> dict[str, object]:
        return {
            "size": info.size,
            "flags": f"{int(info.flags):#x}",
            "minimum block size": info.block_size_minimum,
            "preferred block size": info.block_size_preferred,
            "maximum payload": info.payload_bytes_max,
            "structured replies": info.structured,
            "extended headers": info.extended,
            "extents": info.allocation_id is not None,
        }

    then = values(before)
    return [f"{name} {then[name]} -> {value}" for name, value in values(now).items() if value != then[name]]
