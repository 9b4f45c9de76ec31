"""One session with a server: connected, hands shaken, TLS if asked for, transmission about to begin.

shake_hands() is the one place where a client's handshake is done; who connects the socket, and on which loop, is its
caller's matter. A session is nobody's until a Client takes it over: it may go from one loop to another before.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from typing import Final

from homeloop.errors import BlockError, ConnectionLost
from homeloop.nbd.client_handshake import ClientHandshake, Refused, ServerInfo
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.protocol import OptionReply
from homeloop.nbd.tls import TlsSocket, Wire, receive, send_all
from homeloop.nbd.uri import NbdUri

__all__ = ["Session", "no_address", "open_session", "shake_hands"]

_RECEIVE_BYTES: Final = 16 << 10  # of one receive during the handshake

# What a refusal of the handshake means in errno's words.
_ERRNO_OF_REFUSAL: Final = {
    OptionReply.ERR_UNSUP: errno.ENOTSUP,
    OptionReply.ERR_POLICY: errno.EACCES,
    OptionReply.ERR_INVALID: errno.EINVAL,
    OptionReply.ERR_TLS_REQD: errno.EACCES,
    OptionReply.ERR_UNKNOWN: errno.ENOENT,
    OptionReply.ERR_SHUTDOWN: errno.ESHUTDOWN,
    OptionReply.ERR_TOO_BIG: errno.EINVAL,
}


@dataclass(frozen=True, slots=True)
class Session:
    """A connection in transmission that nobody has used yet: the socket, not blocking, and what was agreed."""

    sock: Wire
    info: ServerInfo
    leftover: bytes

    def close(self) -> None:
        """Drop it. Twice is fine."""
        self.sock.close()


async def open_session(uri: NbdUri, tls: TlsCredentials | None) -> Session:
    """Connect and shake hands. Errors as with connect()."""
    loop = asyncio.get_running_loop()
    return await shake_hands(await _connected(loop, uri), uri, tls)


async def shake_hands(sock: socket.socket, uri: NbdUri, tls: TlsCredentials | None) -> Session:
    """Shake hands on a socket that is connected and does not block; it is closed if that fails."""
    loop = asyncio.get_running_loop()
    wire: Wire = sock
    try:
        if tls is None and uri.tls:
            tls = TlsCredentials.of_uri(uri)
        hostname = uri.tls_hostname or (uri.host if uri.socket is None else None)
        tls_context = tls.client_context(check_hostname=hostname is not None) if tls is not None else None
        handshake = ClientHandshake(uri.export, tls=tls_context is not None)
        while True:
            data = await receive(loop, wire, _RECEIVE_BYTES)
            if not data:
                raise ConnectionLost(f"the server hung up during the handshake for export {uri.export!r}")
            handshake.feed(data)
            while (turn := handshake.next_turn()) is not None:
                if isinstance(turn.end, Refused):
                    with contextlib.suppress(OSError):  # the server may have hung up with its refusal
                        await send_all(loop, wire, turn.data)
                    raise _refusal(uri, turn.end)
                if turn.starttls:
                    assert tls_context is not None
                    assert not isinstance(wire, TlsSocket)
                    wire = secured = TlsSocket(wire, tls_context, server_side=False, hostname=hostname)
                    await secured.handshake(loop)
                if turn.data:
                    await send_all(loop, wire, turn.data)
                if turn.end is not None:
                    return Session(wire, turn.end.info, turn.end.leftover)
    except BaseException:
        wire.close()
        raise


def _refusal(uri: NbdUri, end: Refused) -> BlockError:
    try:
        reply = OptionReply(end.reply)
    except ValueError:
        return BlockError(errno.EPROTO, f"export {uri.export!r}: refused with {end.reply:#x}: {end.text}")
    number = _ERRNO_OF_REFUSAL.get(reply, errno.EPROTO)
    return BlockError(number, f"export {uri.export!r}: {reply.name}: {end.text}")


def no_address(uri: NbdUri, error: Exception) -> OSError:
    """What getaddrinfo() raised, with the host, and with an errno of this platform. A name IDNA cannot encode is a
    UnicodeError."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return OSError(errno.EADDRNOTAVAIL, f"cannot find the host {uri.host!r}: {text}")


async def _connected(loop: asyncio.AbstractEventLoop, uri: NbdUri) -> socket.socket:
    if uri.socket is not None:
        return await _connect_to(loop, uri, socket.AF_UNIX, uri.socket)
    try:
        addresses = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise no_address(uri, error) from error
    for number, (family, _, _, _, address) in enumerate(addresses, 1):
        try:
            return await _connect_to(loop, uri, family, address)
        except OSError:
            if number == len(addresses):
                raise
    raise OSError(errno.EADDRNOTAVAIL, f"host {uri.host} has no address")


async def _connect_to(
    loop: asyncio.AbstractEventLoop, uri: NbdUri, family: int, address: str | tuple[object, ...]
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, address)
    except OSError as error:
        sock.close()
        if not error.errno:
            raise
        # asyncio says "Connect call failed" and the address: not why.
        raise OSError(error.errno, f"cannot connect to {uri}: {os.strerror(error.errno)}") from error
    except BaseException:
        sock.close()
        raise
    return sock
