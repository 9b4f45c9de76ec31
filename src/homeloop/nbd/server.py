"""The NBD server: accepts and handshakes in its own context, then gives each client to its export's home.

    listener -> accept -> Handshake -> (GO) -> export.context: Connection.start()
                                                     |
    server's context <- post -- _ended_at_home() <- Connection is closed

What is listed here (exports, clients) belongs to the server's context. A connection belongs to its export's; the
two meet in posts, never in a lock. A client that misbehaves costs one line in the log and its own connection.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import logging
import os
import socket
from dataclasses import dataclass, field
from typing import Any, Final

from homeloop.block.device import Device
from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.starting import start_now
from homeloop.errors import PeerError, UsageError, WrongState, WrongThread
from homeloop.nbd.budget import Budget
from homeloop.nbd.connection import Connection
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.export import Export, ExportStatistics, Offers, OnError
from homeloop.nbd.handshake import Ended, Handshake, HandshakeLimits, Negotiated, TlsMode, find_export
from homeloop.nbd.limits import ConnectionLimits
from homeloop.nbd.listening import Listener, adopt_listener, listen_tcp, listen_unix, peer_name, prepare_tcp
from homeloop.nbd.patience import Patience
from homeloop.nbd.tls import TlsSocket, Wire, receive, send_all
from homeloop.nbd.uri import NbdUri, format_uri
from homeloop.nbd.watchdog import Watchdog

__all__ = ["Server", "ServerLimits", "ServerStatistics"]

logger = logging.getLogger(__name__)

_RECEIVE_BYTES: Final = 16 << 10  # of one receive during the handshake
# Of a unix socket; TCP finds its own. The default, 208 KiB, cannot take one reply of nbdcopy's 256 KiB reads whole,
# and we would wait for the client in the middle of each: 590 MiB/s out of a cached file, 790 with 1 MiB, 740 with 4.
_SEND_BUFFER_BYTES: Final = 1 << 20
_ACCEPTS_MAX: Final = 16  # in one turn of the loop
# accept() fails with these while the machine is short of something. The listening socket stays readable: without
# a pause the loop would spin until it gets better.
_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What all clients together, and each, may occupy. A value, for any thread."""

    connections_max: int = 256  # shaking hands or served; one more is closed at once
    handshake_s: float = 30.0  # for the whole of it
    handshake_grace_s: float = 5.0  # where all places are taken, who shakes hands for longer makes room for others
    in_flight_bytes_max: int = 1 << 30  # of all together: payload of requests that run, and replies not taken yet
    stalled_s: float | None = 120.0  # for a client that takes none of its replies, or stops within a request
    idle_s: float | None = None  # for one that asks for nothing
    backlog: int = 128  # of the listening sockets
    accept_pause_s: float = 1.0  # after accept() failed for want of file descriptors or memory
    blocked_s: float | None = 1.0  # a home that takes longer to come round is named in the log; None: nobody looks
    handshake: HandshakeLimits = field(default_factory=HandshakeLimits)
    connection: ConnectionLimits = field(default_factory=ConnectionLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """One moment of a server; counts are since its start."""

    name: str
    uris: tuple[str, ...]
    handshakes: int  # clients that have not chosen an export yet
    connections: int  # clients that have
    accepted: int
    refused: int  # over the limit
    failed: int  # ended by a handshake or a request that broke the protocol, or by a mistake of ours
    exports: tuple[ExportStatistics, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class _Newcomer:
    """A client that has not chosen an export yet."""

    number: int
    peer: str
    wire: Wire  # ours until it is handed over
    handshake: Handshake
    since: float  # of the loop's clock
    running: Coroutine[None] | None = None
    handed_over: bool = False
    cut_off: bool = False


class Server:
    """An NBD server. Made anywhere; its methods are for the home thread of `context`, unless they say otherwise.

    tls: what clients with TLS are met with; None: there is none. tls_required: no client is served without; False:
    those that do not ask for it see the exports that are not `tls_only`.
    """

    def __init__(
        self,
        context: AioContext,
        *,
        limits: ServerLimits | None = None,
        name: str = "nbd",
        tls: TlsCredentials | None = None,
        tls_required: bool = True,
    ) -> None:
        """Reads the credentials' files: UsageError for one that cannot be used."""
        self.name = name
        self._tls = tls.server_context() if tls is not None else None
        self._tls_mode = TlsMode.NONE
        if tls is not None:
            self._tls_mode = TlsMode.REQUIRED if tls_required else TlsMode.SELECTIVE
        self._context = context
        self._limits = limits = limits if limits is not None else ServerLimits()
        self._budget = Budget(limits.in_flight_bytes_max)
        self._watchdog = Watchdog(name, limits.blocked_s) if limits.blocked_s is not None else None
        # The server's context only, all of them.
        self._patience = Patience(context, stalled_s=limits.stalled_s, idle_s=limits.idle_s)
        self._listeners: list[Listener] = []
        self._exports: dict[str, Export] = {}
        self._offers = Offers(self._exports)  # the same exports as handshakes see them
        self._leaving: list[Export] = []  # withdrawn, and with clients that finish their requests
        self._newcomers: dict[int, _Newcomer] = {}  # by number: clients that have not chosen an export
        self._numbers = itertools.count(1)  # of clients
        self._export_numbers = itertools.count(1)
        self._connections = 0
        self._accepted = 0
        self._refused = 0
        self._failed = 0
        self._closing = False
        self._client_left = asyncio.Event()  # pulsed when a handshake or a connection has ended

    def __repr__(self) -> str:
        return f"<Server {self.name} exports={len(self._exports)} connections={self._connections}>"

    # -- listening -----------------------------------------------------------------------------------------

    async def listen(
        self, where: str | os.PathLike[str] | tuple[str, int] | socket.socket, *, export: str = ""
    ) -> str:
        """Listen on a unix socket's path, or on (host, port); port 0 takes a free one. Return the URI of `export`.

        Or take over a socket that listens already. A socket file that a dead server left is replaced. Raises OSError,
        naming the address: EADDRINUSE if somebody listens there.
        """
        self._check_home("listen()")
        if self._closing:
            raise WrongState(f"server {self.name} is closed")
        if isinstance(where, tuple):
            host, port = where
            addresses = await self._addresses(host, port)
            if self._closing:
                raise WrongState(f"server {self.name} was closed meanwhile")
            listeners = listen_tcp(host or "localhost", addresses, self._limits.backlog)
        elif isinstance(where, socket.socket):
            listeners = [adopt_listener(where)]
        else:
            listeners = [listen_unix(os.fspath(where), self._limits.backlog)]
        for listener in listeners:
            self._listeners.append(listener)
            self._watch(listener)
        return self.uri(export, listeners[0])

    async def _addresses(self, host: str, port: int) -> list[tuple[Any, ...]]:
        def resolve(flags: int) -> list[tuple[Any, ...]]:
            flags |= socket.AI_PASSIVE
            return list(socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags))

        try:
            return resolve(socket.AI_NUMERICHOST)
        except socket.gaierror:
            return await self._context.worker(resolve, 0)  # a name: somebody must be asked, which takes its time

    def uri(self, export: str = "", listener: Listener | None = None) -> str:
        """Return the URI of an export, at the first address that the server listens on."""
        if listener is None:
            if not self._listeners:
                raise WrongState(f"server {self.name} does not listen")
            listener = self._listeners[0]
        at = listener.uri
        return format_uri(
            NbdUri(socket=at.socket, host=at.host, port=at.port, export=export, tls=self._needs_tls(export))
        )

    def _needs_tls(self, export: str) -> bool:
        if self._tls_mode is not TlsMode.SELECTIVE:
            return self._tls_mode is TlsMode.REQUIRED
        found = find_export(self._offers, export)
        return found is not None and found.tls_only

    def _watch(self, listener: Listener) -> None:
        if not self._closing:
            self._context.loop.add_reader(listener.sock, self._on_acceptable, listener)

    def _on_acceptable(self, listener: Listener) -> None:
        for _ in range(_ACCEPTS_MAX):
            try:
                sock, _ = listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    raise
                pause_s = self._limits.accept_pause_s
                logger.warning("%s: cannot accept clients for %.1f s: %s", self.name, pause_s, error)
                self._context.loop.remove_reader(listener.sock)
                self._context.loop.call_later(pause_s, self._watch, listener)
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        number = next(self._numbers)
        peer = peer_name(sock, number)
        if self._connections + len(self._newcomers) >= self._limits.connections_max and not self._make_room():
            self._refused += 1
            sock.close()
            logger.warning("%s: %s refused: %d clients are here", self.name, peer, self._limits.connections_max)
            return
        self._accepted += 1
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        else:
            prepare_tcp(sock)
        handshake = Handshake(self._offers, limits=self._limits.handshake, tls=self._tls_mode)
        now = self._context.loop.time()
        newcomer = _Newcomer(number=number, peer=peer, wire=sock, handshake=handshake, since=now)
        self._newcomers[number] = newcomer
        newcomer.running = self._context.spawn(self._shake_hands(newcomer))
        newcomer.running.add_done_callback(functools.partial(self._left_handshake, newcomer))

    def _make_room(self) -> bool:
        """Cut off a client that begins a handshake and does not go on: who means it takes milliseconds."""
        oldest = next((one for one in self._newcomers.values() if not one.cut_off), None)
        if oldest is None or self._context.loop.time() - oldest.since < self._limits.handshake_grace_s:
            return False
        assert oldest.running is not None, oldest
        self._failed += 1
        logger.warning("%s: %s cut off in its handshake: others wait for its place", self.name, oldest.peer)
        oldest.cut_off = True
        oldest.running.cancel()
        return True

    # -- handshakes ----------------------------------------------------------------------------------------

    async def _shake_hands(self, newcomer: _Newcomer) -> None:
        peer = newcomer.peer
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                end = await self._negotiate(newcomer)
            if isinstance(end, Negotiated):
                newcomer.handed_over = self._hand_over(peer, newcomer.wire, end)
            elif end is not None and end.reason:
                logger.warning("%s: %s: %s", self.name, peer, end.reason)
        except TimeoutError:
            self._failed += 1
            logger.warning("%s: %s: no handshake in %g s", self.name, peer, self._limits.handshake_s)
        except PeerError as error:
            self._failed += 1
            logger.warning("%s: %s: %s", self.name, peer, error)
        except OSError:
            pass  # the client went away
        except Exception:
            self._failed += 1
            logger.exception("%s: %s: the handshake failed by a mistake of ours", self.name, peer)

    def _left_handshake(self, newcomer: _Newcomer, _running: object) -> None:
        """Also called for a coroutine that was cancelled before its first step."""
        if not newcomer.handed_over:
            newcomer.wire.close()
        del self._newcomers[newcomer.number]
        self._client_left.set()

    async def _negotiate(self, newcomer: _Newcomer) -> Negotiated | Ended | None:
        """Talk until the client has chosen, or left (None: without a word)."""
        loop, handshake = self._context.loop, newcomer.handshake
        await send_all(loop, newcomer.wire, handshake.greeting())
        while data := await receive(loop, newcomer.wire, _RECEIVE_BYTES):
            handshake.feed(data)
            while (turn := handshake.next_turn()) is not None:
                if turn.data:
                    await send_all(loop, newcomer.wire, turn.data)
                if turn.starttls:
                    await self._start_tls(newcomer)
                if turn.end is not None:
                    return turn.end
        return None

    async def _start_tls(self, newcomer: _Newcomer) -> None:
        """Shake hands for TLS, within the time of the whole handshake; PeerError ends the session (T4)."""
        assert self._tls is not None, "STARTTLS without credentials"
        assert not isinstance(newcomer.wire, TlsSocket), "STARTTLS twice"
        newcomer.wire = wire = TlsSocket(newcomer.wire, self._tls, server_side=True)
        await wire.handshake(self._context.loop)

    def _hand_over(self, peer: str, wire: Wire, end: Negotiated) -> bool:
        """Give the client to its export's home; False if that is not possible any more."""
        export = self._exports.get(end.export.name)
        if export is None or export.number != end.export.number:
            return False  # removed while the client was told of it
        context = export.context
        connection = Connection(
            wire,
            export.device,
            peer=peer,
            spawn=functools.partial(start_now, context),
            on_closed=functools.partial(self._ended_at_home, export),
            read_only=export.read_only,
            on_error=export.on_error,
            agreed=end.agreed,
            limits=self._limits.connection,
            budget=self._budget,
        )
        if not context.try_post(connection.start, end.leftover):
            logger.warning("%s: %s: the context of export %r has ended", self.name, peer, export.name)
            return False
        export.attach(connection)
        self._patience.begin(connection, context)
        self._connections += 1
        return True

    # -- the ends of connections ---------------------------------------------------------------------------

    def _ended_at_home(self, export: Export, connection: Connection, error: BaseException | None) -> None:
        """The export's home: a connection is closed."""
        if isinstance(error, PeerError):
            logger.warning("%s: %s on export %r: %s", self.name, connection.peer, export.name, error)
        elif error is not None:
            text = "%s: %s on export %r: ended by a mistake of ours"
            logger.error(text, self.name, connection.peer, export.name, exc_info=error)
        self._context.try_post(self._forget, export, connection, error is not None)

    def _forget(self, export: Export, connection: Connection, failed: bool) -> None:
        export.detach(connection)
        self._patience.end(connection)
        if not export.connections and export in self._leaving:
            self._leaving.remove(export)
            self._watch_no_more(export)
        self._connections -= 1
        self._failed += failed
        self._client_left.set()

    # -- exports -------------------------------------------------------------------------------------------

    async def add_export(
        self,
        name: str,
        device: Device,
        context: AioContext | None = None,
        *,
        description: str = "",
        read_only: bool = False,
        tls_only: bool = False,
        on_error: OnError | None = None,
    ) -> Export:
        """Offer a device under a name; its requests run in `context` (None: the server's own).

        tls_only: to clients with TLS; UsageError if the server has no credentials for that. on_error(command, error)
        is called there for each request that is answered with an error.

        The device stays the caller's, to be closed after remove_export() or close(). ValueError for a name
        that the protocol cannot carry, WrongState if the name is taken.
        """
        self._check_home("add_export()")
        if self._closing:
            raise WrongState(f"server {self.name} is closed")
        if name in self._exports:
            raise WrongState(f"server {self.name} has an export named {name!r} already")
        if tls_only and self._tls is None:
            raise UsageError(f"export {name!r} is for TLS only, and server {self.name} has no TLS credentials")
        export = Export(
            name,
            device,
            context if context is not None else self._context,
            number=next(self._export_numbers),
            description=description,
            read_only=read_only,
            tls_only=tls_only,
            on_error=on_error,
            payload_bytes_max=self._limits.connection.payload_bytes_max,
        )
        self._exports[name] = export
        if self._watchdog is not None:
            self._watchdog.watch(export)
        return export

    async def remove_export(self, name: str, *, hard: bool = False) -> None:
        """Offer it no more; finish its requests in flight, send their replies, close its connections.

        hard: cut the connections off instead: no reply is sent any more, but what a device has begun runs to its
        end. An export that is being removed can be removed hard as well, which ends the wait for clients that do
        not take their replies. Returns when no request runs any more; cancelled, the export stays withdrawn and
        ends without us. WrongState if there is no export of that name.
        """
        self._check_home("remove_export()")
        if name in self._exports:
            leaving = [self._exports[name]]
            self._withdraw(leaving[0])
        else:
            leaving = [export for export in self._leaving if hard and export.name == name]
            if not leaving:
                raise WrongState(f"server {self.name} has no export named {name!r}")
        for export in leaving:
            self._let_go(export, hard)
        while any(export.connections for export in leaving):
            await self._next_leave()

    def _withdraw(self, export: Export) -> None:
        """Offer it no more."""
        del self._exports[export.name]
        if export.connections:
            self._leaving.append(export)
        else:
            self._watch_no_more(export)

    def _watch_no_more(self, export: Export) -> None:
        if self._watchdog is not None:
            self._watchdog.forget(export)

    def _let_go(self, export: Export, hard: bool) -> None:
        """Let the connections of a withdrawn export end."""
        for connection in list(export.connections):
            if not export.context.try_post(connection.abort if hard else connection.shutdown):
                connection.abandon()  # its home has ended, and it with it
                self._forget(export, connection, True)

    async def close(self) -> None:
        """Stop listening, finish the requests in flight, close all connections, remove socket files.

        Clients that shake hands meanwhile are told that the server shuts down (O6); those that still do so in
        the end are cut off. Twice is fine.
        """
        self._check_home("close()")
        self._closing = True
        for listener in self._listeners:
            self._context.loop.remove_reader(listener.sock)
            listener.close()
        self._listeners.clear()
        for newcomer in self._newcomers.values():
            newcomer.handshake.shutting_down = True
        for export in list(self._exports.values()):
            self._withdraw(export)
            self._let_go(export, False)
        while self._connections:
            await self._next_leave()
        for newcomer in self._newcomers.values():
            assert newcomer.running is not None, newcomer
            newcomer.running.cancel()
        while self._newcomers:
            await self._next_leave()

    async def _next_leave(self) -> None:
        self._client_left.clear()
        await self._client_left.wait()

    def statistics(self) -> ServerStatistics:
        """Return the counts of the server, its exports and their connections."""
        self._check_home("statistics()")
        return ServerStatistics(
            name=self.name,
            uris=tuple(self.uri("", listener) for listener in self._listeners),
            handshakes=len(self._newcomers),
            connections=self._connections,
            accepted=self._accepted,
            refused=self._refused,
            failed=self._failed,
            exports=tuple(export.statistics() for export in self._exports.values()),
        )

    def _check_home(self, what: str) -> None:
        if not self._context.is_current():
            text = f"{what} of server {self.name}: call it in its context, `await context.run(...)` from elsewhere"
            raise WrongThread(text)
