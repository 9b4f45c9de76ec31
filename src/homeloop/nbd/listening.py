"""Listening sockets: unix and TCP, stale socket files, and what is left behind.

Functions of plain sockets; the server waits for them to become readable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from homeloop.nbd.uri import NbdUri

__all__ = ["Listener", "adopt_listener", "listen_tcp", "listen_unix", "peer_name", "prepare_tcp"]

# Linux's defaults would be two hours, then 75 s nine times.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """One listening socket, non-blocking, and how clients name it."""

    sock: socket.socket
    uri: NbdUri
    path: str | None = None  # of the socket file, if there is one
    inode: tuple[int, int] | None = None  # of that file when it was ours

    def close(self) -> None:
        """Stop listening; remove the socket file unless somebody else has put his own there. Twice is fine."""
        if self.sock.fileno() < 0:
            return
        if self.path is not None and _inode(self.path) == self.inode:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self.sock.close()


def listen_unix(path: str, backlog: int) -> Listener:
    """Listen on a unix socket; a file that a dead server left behind is replaced.

    Raises OSError: EADDRINUSE if somebody listens there, or if something that is no socket has that name;
    ENAMETOOLONG for a path that no socket can have.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if path.startswith("\0"):  # abstract: no file, nothing to clear up
            sock.bind(path)
            sock.listen(backlog)
            return Listener(sock=sock, uri=NbdUri(socket=path))
        _clear_stale(path)
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno is None:  # Python's own check: "AF_UNIX path too long"
                raise OSError(errno.ENAMETOOLONG, f"{len(os.fsencode(path))} bytes: {error}", path) from error
            raise OSError(error.errno, f"cannot listen: {error.strerror}", path) from error
        sock.listen(backlog)
        return Listener(sock=sock, uri=NbdUri(socket=path), path=path, inode=_inode(path))
    except BaseException:
        sock.close()
        raise


def adopt_listener(sock: socket.socket) -> Listener:
    """Take over a unix or TCP socket that listens already; its file is somebody else's to remove."""
    sock.setblocking(False)
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Listener(sock=sock, uri=NbdUri(socket=os.fsdecode(name)))
    return Listener(sock=sock, uri=NbdUri(host=name[0], port=name[1]))


def _clear_stale(path: str) -> None:
    """Remove the socket file of a server that is gone. Raises OSError if it is not gone, or no socket."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, "cannot listen: this is a file, and no socket", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its queue is full: it lives
    raise OSError(errno.EADDRINUSE, "cannot listen: another server listens on this socket", path)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def listen_tcp(host: str, addresses: Iterable[tuple[Any, ...]], backlog: int) -> list[Listener]:
    """Listen on every address that getaddrinfo() returned for `host`, all with the same port.

    Addresses of a family that this machine does not have are passed over. Raises OSError if none is left.
    """
    listeners: list[Listener] = []
    unusable: OSError | None = None
    port = 0
    try:
        for family, kind, proto, _, address in addresses:
            if port:
                address = (address[0], port, *address[2:])
            try:
                sock = _listen_tcp(family, kind, proto, address, backlog)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    text = f"cannot listen on {address[0]} port {address[1]}: {error.strerror}"
                    raise OSError(error.errno, text) from error
                unusable = error
                continue
            port = sock.getsockname()[1]
            listeners.append(Listener(sock=sock, uri=NbdUri(host=host, port=port)))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    if not listeners:
        text = f"cannot listen on {host}: no address of it is ours"
        raise OSError(errno.EADDRNOTAVAIL, text) from unusable
    return listeners


def _listen_tcp(
    family: int, kind: int, proto: int, address: tuple[Any, ...], backlog: int
) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def prepare_tcp(sock: socket.socket) -> None:
    """Send what there is at once, and find out when the other end is gone without a word, within some minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def peer_name(sock: socket.socket, number: int) -> str:
    """Return what to call a client in log lines and statistics."""
    if sock.family != socket.AF_UNIX:
        try:
            host, port = sock.getpeername()[:2]
        except OSError:
            return f"client {number}"
        return f"client {number} ({host} port {port})"
    if hasattr(socket, "SO_PEERCRED"):
        try:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return f"client {number}"
        return f"client {number} (pid {int.from_bytes(credentials[:4], sys.byteorder)})"
    return f"client {number}"
