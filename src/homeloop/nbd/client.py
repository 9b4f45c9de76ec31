"""An NBD client for asyncio: many requests in flight on one connection, replies in any order.

    async with connect("nbd+unix:///disk?socket=/run/disk.sock") as disk:
        data = await disk.read(0, 4096)

Its home is the loop it was opened in; requests from coroutines of other loops are run there. It speaks what the
server side of this package speaks: fixed newstyle, TLS, extended headers, structured replies or simple ones,
base:allocation. Requests of one turn of the loop go out in one sendmsg(); large answers are received into the memory
in which they are returned. Requests beyond `in_flight_max` wait in line, the first come first served.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Final

from homeloop.block.extents import Extent
from homeloop.core.context import AioContext
from homeloop.errors import BlockError, ConnectionLost, PeerError, UsageError, WrongState
from homeloop.nbd.chunks import ChunkReader
from homeloop.nbd.client_handshake import ServerInfo
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.protocol import AllocationFlag, Command, CommandFlag, TransmissionFlag, errno_of_wire
from homeloop.nbd.sending import BytesLike, SendQueue
from homeloop.nbd.session import open_session
from homeloop.nbd.tls import Wire, watcher_of
from homeloop.nbd.transmission import Reply, ReplyReader, pack_extended_request, pack_request
from homeloop.nbd.uri import NbdUri, parse_uri

__all__ = ["IN_FLIGHT_MAX", "Client", "Connecting", "connect"]

IN_FLIGHT_MAX: Final = 1024  # requests on their way; a server may take fewer at once, and reads the rest later
_CHANGES: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})


class Client:
    """One connection, in transmission. Made by connect(), in the loop that is its home.

    Requests and close() are for coroutines of any context or asyncio loop, and for call() from any thread: away from
    home they are run there. A request raises BlockError if the server (or the range, or what the export can do)
    refuses it; the connection goes on. PeerError means that the server broke the protocol, ConnectionLost that it
    went away: all requests fail with it, those in flight and those to come. A cancelled request is forgotten here;
    the server may still do it. Its late reply is read and dropped; until it has come, its place is taken.

    With finishes_changes set, a write, trim or write_zeroes that is cancelled on its way raises that only when the
    server has answered, so that it cannot overtake what the caller does next; cancelled once more, at once.
    """

    def __init__(
        self, sock: Wire, info: ServerInfo, leftover: bytes, *, in_flight_max: int = IN_FLIGHT_MAX
    ) -> None:
        """Take over a non-blocking socket that has just entered transmission. In the loop that is to be the home."""
        self.info = info
        self._loop = asyncio.get_running_loop()
        self._home = AioContext.of()  # of that loop
        # Home only, all of them.
        self._sock = sock
        self._watcher = watcher_of(self._loop, sock)
        self._reader: ChunkReader | ReplyReader = (
            ChunkReader(info.allocation_id, extended=info.extended) if info.structured else ReplyReader()
        )
        self._pack_request = pack_extended_request if info.extended else pack_request
        self._length_max = (1 << 64) - 1 if info.extended else (1 << 32) - 1
        self._out = SendQueue()
        self._waiting: dict[int, tuple[asyncio.Future[Any], str]] = {}  # cookie -> ..., what it is
        self._in_flight_max = in_flight_max
        self._line: deque[asyncio.Future[None]] = deque()  # requests that wait for a place in _waiting
        self._places_given = 0  # to some that were in the line and have not run since
        self._cookie = 0
        self._idle: asyncio.Future[None] | None = None  # close() waits until nothing is in flight
        self.finishes_changes = False  # set before the first request
        self.heard = 0  # how often the server has said something
        self._flush_queued = False
        self._writing = False
        self._failure: PeerError | None = None
        self.when_failed: Callable[[PeerError], object] | None = None  # called once, at home, before who waits is told
        self._closing = False
        self._watcher.add_reader(sock, self._on_readable)
        if leftover:  # only a broken server speaks now
            self._fail(PeerError(f"the server sent {len(leftover)} bytes before any request"))

    @property
    def size(self) -> int:
        """Of the export, in bytes."""
        return self.info.size

    @property
    def read_only(self) -> bool:
        """Does the server refuse changes?"""
        return self.can(TransmissionFlag.READ_ONLY)

    @property
    def failure(self) -> PeerError | None:
        """Why the connection is of no more use; None while it is. Any thread."""
        return self._failure

    @property
    def in_flight(self) -> int:
        """Requests that the server has not answered yet. Any thread."""
        return len(self._waiting)

    def can(self, flag: TransmissionFlag) -> bool:
        """Has the export this transmission flag?"""
        return bool(self.info.flags & flag)

    def __repr__(self) -> str:
        state = "failed" if self._failure is not None else "closed" if self._closing else "open"
        return f"<Client {self.info.name!r} {state} size={self.size} in_flight={self.in_flight}>"

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- requests ------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> BytesLike:
        """Return `length` bytes at `offset`, as bytes or bytearray: the caller's own."""
        self._check(offset, length, errno.EINVAL, payload=True)
        data: BytesLike | None = await self._ask(Command.READ, 0, offset, length, expected=length)
        return b"" if data is None else data

    async def write(self, offset: int, data: BytesLike, *, fua: bool = False) -> None:
        """Write; fua: on stable storage when it returns. `data` must not change until then."""
        view = memoryview(data).cast("B")
        self._check_change("write", offset, len(view), payload=True)
        await self._ask(Command.WRITE, self._fua(fua), offset, len(view), data=view)

    async def flush(self) -> None:
        """Bring every change that has been answered to stable storage."""
        self._need(TransmissionFlag.SEND_FLUSH, "flush")
        await self._ask(Command.FLUSH, 0, 0, 0)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell the server that these bytes are of no more use; what they read as then is open."""
        self._check_change("trim", offset, length)
        self._need(TransmissionFlag.SEND_TRIM, "trim")
        await self._ask(Command.TRIM, self._fua(fua), offset, length)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, may_trim: bool = True, fast: bool = False
    ) -> None:
        """Make these bytes read as zeroes; may_trim: they may become a hole.

        fast: ENOTSUP at once, and nothing changed, if it would be no faster than writing zeroes.
        """
        self._check_change("write_zeroes", offset, length)
        self._need(TransmissionFlag.SEND_WRITE_ZEROES, "write_zeroes")
        flags = self._fua(fua) | (0 if may_trim else CommandFlag.NO_HOLE)
        if fast:
            self._need(TransmissionFlag.SEND_FAST_ZERO, "fast write_zeroes")
            flags |= CommandFlag.FAST_ZERO
        await self._ask(Command.WRITE_ZEROES, flags, offset, length)

    async def cache(self, offset: int, length: int) -> None:
        """Tell the server that these bytes will be read soon."""
        self._check(offset, length, errno.EINVAL)
        self._need(TransmissionFlag.SEND_CACHE, "cache")
        await self._ask(Command.CACHE, 0, offset, length)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Tell what the range is made of: (length, hole, zero) from its offset on, as far as the server says.

        At least one, none reaches beyond the range; they may end before it does: ask again from there. A server
        that cannot tell has data everywhere.
        """
        self._check(offset, length, errno.EINVAL)
        if not length:
            raise BlockError(errno.EINVAL, f"extents of no bytes at {offset}")
        if self.info.allocation_id is None:
            return [(length, False, False)]
        found: list[tuple[int, int]] = await self._ask(Command.BLOCK_STATUS, 0, offset, length)
        extents: list[Extent] = []
        for told, flags in found:
            piece = min(told, length)
            if not piece:
                break
            extents.append((piece, bool(flags & AllocationFlag.HOLE), bool(flags & AllocationFlag.ZERO)))
            length -= piece
        return extents

    def _check(self, offset: int, length: int, past_end: int, *, payload: bool = False) -> None:
        """Z6: what a client must not send, it refuses itself."""
        what = f"{length} bytes at {offset}"
        if offset < 0 or length < 0 or length > self._length_max:
            raise BlockError(errno.EINVAL, f"{what}: the protocol cannot carry this")
        if offset + length > self.size:
            raise BlockError(past_end, f"{what}: the export has {self.size} bytes")
        if (offset | length) & (self.info.block_size_minimum - 1):
            raise BlockError(errno.EINVAL, f"{what}: not in blocks of {self.info.block_size_minimum} bytes")
        if payload and length > self.info.payload_bytes_max:
            raise BlockError(errno.EINVAL, f"{what}: the server takes {self.info.payload_bytes_max} at once")

    def _check_change(self, kind: str, offset: int, length: int, *, payload: bool = False) -> None:
        if self.read_only:
            raise BlockError(errno.EPERM, f"{kind} of {length} bytes at {offset}: the export is read-only")
        self._check(offset, length, errno.ENOSPC, payload=payload)

    def _need(self, flag: TransmissionFlag, kind: str) -> None:
        if not self.can(flag):
            raise BlockError(errno.ENOTSUP, f"{kind}: the export does not offer it")

    def _fua(self, fua: bool) -> int:
        if fua:
            self._need(TransmissionFlag.SEND_FUA, "fua")
        return CommandFlag.FUA if fua else 0

    async def _ask(
        self, command: Command, flags: int, offset: int, length: int, *, expected: int = 0,
        data: memoryview | None = None,
    ) -> Any:
        if asyncio.get_running_loop() is not self._loop:
            asking = self._ask(command, flags, offset, length, expected=expected, data=data)
            return await self._home.run(asking)
        self._check_open(command)
        what = f"{command.name} of {length} bytes at {offset}"
        if self._line or len(self._waiting) + self._places_given >= self._in_flight_max:
            await self._wait_for_place(what)
        self._cookie += 1
        cookie = self._cookie
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[cookie] = reply, what
        self._reader.expect(cookie, expected, offset=offset, wants_extents=command is Command.BLOCK_STATUS)
        self._out.append(self._pack_request(command, flags, cookie, offset, length))
        if data:
            self._out.append(data)
        self._queue_flush()
        try:
            return await reply
        except asyncio.CancelledError:
            try:
                if self.finishes_changes and command in _CHANGES and cookie in self._waiting:
                    await self._late_reply(cookie, what)
            finally:
                if data:
                    self._out.keep(data)  # the caller may change it now
            raise

    async def _late_reply(self, cookie: int, what: str) -> None:
        """Wait for the reply to a request whose own future was cancelled; whatever it says."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[cookie] = reply, what
        with contextlib.suppress(BlockError, PeerError):
            await reply

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure

    def _check_open(self, command: Command) -> None:
        self._check_alive()
        if self._closing:
            raise WrongState(f"{command.name.lower()} on a client that is closed")

    async def _wait_for_place(self, what: str) -> None:
        """Stand in line until fewer than in_flight_max requests are on their way."""
        place = self._loop.create_future()
        self._line.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                with contextlib.suppress(ValueError):  # _give_places() may have dropped it
                    self._line.remove(place)
            elif place.exception() is None:
                self._places_given -= 1
                self._give_places()  # woken and cancelled in the same turn: the place is the next one's
            self._maybe_idle()
            raise
        except PeerError as error:
            raise type(error)(f"{what}: {error}") from error
        self._places_given -= 1
        if self._failure is not None:
            self._maybe_idle()
            self._check_alive()

    def _give_places(self) -> None:
        while self._line and len(self._waiting) + self._places_given < self._in_flight_max:
            place = self._line.popleft()
            if not place.done():  # done: its request was cancelled, and has yet to run
                self._places_given += 1
                place.set_result(None)

    # -- out -----------------------------------------------------------------------------------------------

    def _queue_flush(self) -> None:
        """Send in this turn of the loop, but after what else is asked in it."""
        if not self._flush_queued and not self._writing:
            self._flush_queued = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_queued = False
        if self._sock.fileno() < 0:
            return
        try:
            done = self._out.send(self._sock)
        except OSError as error:
            self._fail(ConnectionLost(f"the connection broke: {error}"))
            return
        if done and self._writing:
            self._watcher.remove_writer(self._sock)
        elif not done and not self._writing:
            self._watcher.add_writer(self._sock, self._flush)
        self._writing = not done

    # -- in ------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            count = self._sock.recvmsg_into(self._reader.targets())[0]
            if not count:
                raise ConnectionLost(f"the server closed the connection with {self.in_flight} requests in flight")
            self._reader.received(count)
            self.heard += 1
            while batch := self._reader.next_batch():
                for settled in batch:
                    self._settle(settled)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(ConnectionLost(f"the connection broke: {error}"))
        except PeerError as error:
            self._fail(error)

    def _settle(self, settled: Reply) -> None:
        cookie, error, data = settled
        reply, what = self._waiting.pop(cookie)
        if not reply.done():  # done: its request was cancelled
            if error:
                number = errno_of_wire(error)
                text = data if isinstance(data, str) and data else os.strerror(number)
                reply.set_exception(BlockError(number, f"{what}: the server says {text}"))
            else:
                reply.set_result(data)
        if self._line:
            self._give_places()
        elif self._idle is not None:
            self._maybe_idle()

    def _maybe_idle(self) -> None:
        if self._idle is not None and not self._busy() and not self._idle.done():
            self._idle.set_result(None)

    def _busy(self) -> bool:
        return bool(self._waiting or self._line or self._places_given)

    def _fail(self, failure: PeerError) -> None:
        """The connection is of no more use: nobody waits for it any longer."""
        if self._failure is not None:
            return
        self._failure = failure
        self._close_socket()
        if self.when_failed is not None:
            self.when_failed(failure)
        waiting, self._waiting = self._waiting, {}
        for reply, what in waiting.values():
            if not reply.done():
                error = type(failure)(f"{what}: {failure}")
                error.__cause__ = failure
                reply.set_exception(error)
        line, self._line = self._line, deque()
        for place in line:
            if not place.done():
                place.set_exception(failure)
        self._maybe_idle()

    def _close_socket(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._watcher.remove_reader(self._sock)
        if self._writing:
            self._watcher.remove_writer(self._sock)
            self._writing = False
        self._sock.close()
        self._out.clear()

    def leave(self, failure: PeerError) -> None:
        """Say goodbye without waiting for anything: who waits fails with `failure`. Home."""
        if self._failure is None:
            self._out.append(self._pack_request(Command.DISC, 0, 0, 0, 0))
            with contextlib.suppress(OSError):
                self._out.send(self._sock)
            self._fail(failure)

    async def close(self) -> None:
        """Take no more requests, wait for those in flight (F2), say goodbye, close. Twice is fine.

        What was written is not flushed by this. Cancelled: the socket is closed at once.
        """
        if asyncio.get_running_loop() is not self._loop:
            await self._home.run(self.close())
            return
        self._closing = True
        if self._sock.fileno() < 0:
            return
        try:
            if self._busy():
                if self._idle is None:
                    self._idle = self._loop.create_future()
                await asyncio.wait((self._idle,))  # not cancelled with one of several that close
            if self._failure is None:
                self._out.append(self._pack_request(Command.DISC, 0, 0, 0, 0))
                # Nothing is in flight, so nothing waits to be sent: if the kernel does not take one header now, the
                # server learns it from the end of the stream.
                with contextlib.suppress(OSError):
                    self._out.send(self._sock)
        except asyncio.CancelledError:
            self._fail(ConnectionLost("close() was cancelled"))
            raise
        finally:
            self._close_socket()


class Connecting:
    """What connect() returns: to be awaited, or entered with `async with`."""

    def __init__(self, uri: NbdUri, in_flight_max: int, tls: TlsCredentials | None) -> None:
        self._uri = uri
        self._tls = tls
        self._in_flight_max = in_flight_max
        self._client: Client | None = None

    def __await__(self) -> Generator[object, None, Client]:
        return _open(self._uri, self._in_flight_max, self._tls).__await__()

    async def __aenter__(self) -> Client:
        self._client = await _open(self._uri, self._in_flight_max, self._tls)
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._client is not None, "left without being entered"
        await self._client.close()


def connect(
    uri: str | NbdUri, *, in_flight_max: int = IN_FLIGHT_MAX, tls: TlsCredentials | None = None
) -> Connecting:
    """Connect to an export: `await connect(uri)`, or `async with connect(uri) as client`.

    ValueError for what is no NBD URI; when awaited, OSError if nobody listens, BlockError if the server refuses
    (ENOENT: no such export), PeerError if it is no NBD server or a broken one. There is no time limit in it:
    use asyncio.timeout(). in_flight_max: requests beyond wait in line.

    With an nbds URI, or tls= (which goes before what the URI says of credentials), there is TLS or no connection:
    UsageError for credentials that cannot be used, BlockError if the server has no TLS, PeerError if the two do not
    come to terms or the server is not who it should be.
    """
    if in_flight_max < 1:
        raise UsageError(f"in_flight_max={in_flight_max}: there must be room for one request")
    return Connecting(parse_uri(uri) if isinstance(uri, str) else uri, in_flight_max, tls)


async def _open(uri: NbdUri, in_flight_max: int, tls: TlsCredentials | None) -> Client:
    session = await open_session(uri, tls)
    return Client(session.sock, session.info, session.leftover, in_flight_max=in_flight_max)
