"""TLS under a connection: a socket that speaks it, with the few methods that a connection uses of a plain one.

    wire = TlsSocket(sock, context, server_side=True)
    await wire.handshake(loop)
    watch = watcher_of(loop, wire)              # a plain socket: the loop itself
    watch.add_reader(wire, ...); wire.recvmsg_into(targets); wire.sendmsg(pieces)

OpenSSL works between two buffers in memory, and here the bytes are moved between those and the socket: so it never
waits for the socket, reading needs no writing first, and a session can go from one loop to another. What has been
decrypted and not fetched yet makes no socket readable: that is what the watcher is for.

One thread at a time; who hands a wire over stops using it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias

from homeloop.errors import PeerError, UsageError
from homeloop.nbd.sending import BytesLike

__all__ = ["TlsSocket", "Watcher", "Wire", "receive", "send_all", "watcher_of"]

_RECEIVE_BYTES: Final = 128 << 10  # of one receive, encrypted; eight of the largest records
_ENCRYPT_BYTES: Final = 128 << 10  # encrypted at once: what is held twice while the socket does not take it
_ANSWERS_BYTES_MAX: Final = 64 << 10  # of what OpenSSL itself says (key updates, alerts) to a peer that does not read


class TlsSocket:
    """A non-blocking socket with TLS on it. It owns the socket."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, hostname: str | None = None
    ) -> None:
        """UsageError for a hostname that is none."""
        self._sock = sock
        self._incoming = ssl.MemoryBIO()  # encrypted
        self._outgoing = ssl.MemoryBIO()  # encrypted
        try:
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname
            )
        except ValueError as error:
            raise UsageError(f"TLS with host {hostname!r}: {error}") from error
        self._memory = bytearray(_RECEIVE_BYTES)
        self._unsent = memoryview(b"")  # taken out of _outgoing, not taken by the kernel yet
        self._taken = 0  # bytes of the caller's that are encrypted, and not reported as sent
        self.has_more = False  # the last recvmsg_into() left something behind that needs no socket to be read

    def fileno(self) -> int:
        """Of the socket."""
        return self._sock.fileno()

    def version(self) -> str | None:
        """Of TLS, as in "TLSv1.3"."""
        return self._tls.version()

    # -- during the handshakes -----------------------------------------------------------------------------

    async def handshake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Shake hands. PeerError if that fails, OSError if the connection breaks; the wire is of no more use then."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_outgoing(loop)
                await self._feed(loop)
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):
                    await self._send_outgoing(loop)  # the alert that says why
                raise PeerError(f"the TLS handshake failed: {_reason(error)}") from error
        await self._send_outgoing(loop)

    async def recv(self, loop: asyncio.AbstractEventLoop, count: int) -> bytes:
        """Return up to `count` bytes; none at the end of the stream."""
        target = memoryview(bytearray(count))
        while True:
            try:
                filled = self._read_into((target,))
            except ssl.SSLWantReadError:
                await self._feed(loop)
                continue
            with contextlib.suppress(OSError):
                await self._send_outgoing(loop)  # an answer of OpenSSL's own; who is gone misses nothing
            return bytes(target[:filled])

    async def sendall(self, loop: asyncio.AbstractEventLoop, data: bytes) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            view = view[self._encrypt((view,), 0) :]
            await self._send_outgoing(loop)

    async def _feed(self, loop: asyncio.AbstractEventLoop) -> None:
        data = await loop.sock_recv(self._sock, _RECEIVE_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _send_outgoing(self, loop: asyncio.AbstractEventLoop) -> None:
        if data := self._outgoing.read():
            await loop.sock_sendall(self._sock, data)

    # -- in transmission -----------------------------------------------------------------------------------

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> tuple[int]:
        """As socket.recvmsg_into(). PeerError for what is no TLS, or was changed on its way."""
        while True:
            try:
                filled = self._read_into(buffers)
                break
            except ssl.SSLWantReadError:
                self._pull()
        # What is being sent may be there, too: at most one part, which may have been encrypted while answers waited.
        if self._outgoing.pending > _ANSWERS_BYTES_MAX + (2 * _ENCRYPT_BYTES if self._taken else 0):
            raise PeerError("it asks for TLS answers that it does not read")
        if self._outgoing.pending and not self._taken:
            with contextlib.suppress(OSError):
                self._flush()  # else with what is sent next: nobody waits for it
        return (filled,)

    def _read_into(self, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers with what is here; 0 at the end of the stream, SSLWantReadError if there is nothing."""
        filled = 0
        self.has_more = True
        try:
            for buffer in buffers:
                position = 0
                while position < len(buffer):
                    rest = buffer[position:]
                    count = self._tls.read(len(rest), rest)
                    if not count:
                        return filled
                    position += int(count)
                    filled += int(count)
        except ssl.SSLWantReadError:
            self.has_more = False
            if not filled:
                raise
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            # It may have gone without closing TLS. What was being sent is cut in its middle then, and seen.
            pass
        except ssl.SSLError as error:
            raise PeerError(f"TLS: {_reason(error)}") from error
        return filled

    def _pull(self) -> None:
        count = self._sock.recv_into(self._memory)
        if count:
            self._incoming.write(memoryview(self._memory)[:count])
        else:
            self._incoming.write_eof()

    def sendmsg(self, buffers: Sequence[BytesLike]) -> int:
        """As socket.sendmsg(): how much of the buffers has been sent, and is not to be offered again.

        What is encrypted cannot be taken back: until the kernel has taken it, the same bytes must be offered first.
        """
        done = 0
        while True:
            if not self._taken:
                self._taken = self._encrypt(buffers, done)
                if not self._taken:
                    return done
            try:
                self._flush()
            except BlockingIOError:
                if done:
                    return done
                raise
            done += self._taken
            self._taken = 0

    def _encrypt(self, buffers: Sequence[BytesLike], skip: int) -> int:
        """Encrypt the next part of what lies behind the first `skip` bytes; return how many bytes that is."""
        room = _ENCRYPT_BYTES
        part: list[BytesLike] = []
        for buffer in buffers:
            size = len(buffer)
            if skip >= size:
                skip -= size
                continue
            # Joined: each piece on its own would be a record of its own.
            piece = memoryview(buffer)[skip : skip + room]
            skip = 0
            part.append(piece)
            room -= len(piece)
            if not room:
                break
        plain = memoryview(part[0] if len(part) == 1 else b"".join(part))
        left = plain
        while left:
            left = left[self._tls.write(left) :]
        return len(plain)

    def _flush(self) -> None:
        """Send what is encrypted. BlockingIOError if the kernel does not take it all."""
        while True:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
            if not self._outgoing.pending:
                return
            self._unsent = memoryview(self._outgoing.read())

    def close(self) -> None:
        """Say that nothing follows (O5, F1), as far as the kernel takes it now, and close the socket. Twice is fine."""
        if self._sock.fileno() < 0:
            return
        with contextlib.suppress(ssl.SSLError, OSError, ValueError):
            try:
                self._tls.unwrap()
            finally:
                self._flush()
        self._sock.close()


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{error.reason}: {error.verify_message}"
    return str(error.reason or error.strerror or error)


Wire: TypeAlias = socket.socket | TlsSocket


async def receive(loop: asyncio.AbstractEventLoop, wire: Wire, count: int) -> bytes:
    """Return up to `count` bytes of a wire, whatever it is made of; none at the end of the stream."""
    return await (wire.recv(loop, count) if isinstance(wire, TlsSocket) else loop.sock_recv(wire, count))


async def send_all(loop: asyncio.AbstractEventLoop, wire: Wire, data: bytes) -> None:
    """Send all of it."""
    await (wire.sendall(loop, data) if isinstance(wire, TlsSocket) else loop.sock_sendall(wire, data))


class Watcher(Protocol):
    """What a connection uses of a loop to wait for its wire."""

    def add_reader(self, fd: Any, callback: Callable[[], object], /) -> object:
        """Call back whenever there is something to read."""

    def remove_reader(self, fd: Any, /) -> object:
        """No more."""

    def add_writer(self, fd: Any, callback: Callable[[], object], /) -> object:
        """Call back whenever something can be sent."""

    def remove_writer(self, fd: Any, /) -> object:
        """No more."""


def watcher_of(loop: asyncio.AbstractEventLoop, wire: Wire) -> Watcher:
    """Return what watches a wire: for a plain socket the loop itself."""
    return _TlsWatcher(loop, wire) if isinstance(wire, TlsSocket) else loop


class _TlsWatcher:
    """Watches one TlsSocket: also for what lies decrypted in it. Home thread of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wire: TlsSocket) -> None:
        self._loop = loop
        self._wire = wire
        self._on_readable: Callable[[], object] | None = None
        self._queued = False  # _again() will run

    def add_reader(self, fd: Any, callback: Callable[[], object], /) -> None:
        self._on_readable = callback
        self._loop.add_reader(fd, self._ready)
        self._queue()

    def remove_reader(self, fd: Any, /) -> None:
        self._on_readable = None
        self._loop.remove_reader(fd)

    def add_writer(self, fd: Any, callback: Callable[[], object], /) -> None:
        self._loop.add_writer(fd, callback)

    def remove_writer(self, fd: Any, /) -> None:
        self._loop.remove_writer(fd)

    def _ready(self) -> None:
        if self._on_readable is not None:
            self._on_readable()
            self._queue()

    def _queue(self) -> None:
        # Through the loop: others get their turn between two rounds.
        if self._on_readable is not None and self._wire.has_more and not self._queued:
            self._queued = True
            self._loop.call_soon(self._again)

    def _again(self) -> None:
        self._queued = False
        if self._wire.has_more:
            self._ready()
