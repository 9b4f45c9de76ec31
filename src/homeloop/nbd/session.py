"""One session with a server: connected, hands shaken, transmission about to begin. Made by blocking calls.

For threads that may block: a worker, or the connector's own. Resolving a name, connecting and shaking hands with a
peer that is dead or stopped can each take as long as they like, so an attempt has a limit as a whole, and may be given
up from another thread. In a coroutine connect() does the same without blocking.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from dataclasses import dataclass
from typing import Final

from homeloop.errors import ConnectionLost
from homeloop.nbd.client import refusal_error
from homeloop.nbd.client_handshake import ClientHandshake, Entered, Refused, ServerInfo
from homeloop.nbd.uri import NbdUri

__all__ = ["ATTEMPT_S", "Attempt", "Session"]

ATTEMPT_S: Final = 30.0  # that one attempt may take; a server that is only slow shakes hands in a fraction of it
_RECEIVE_BYTES: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Session:
    """A connection in transmission that nobody has used yet: the socket, not blocking, and what was agreed."""

    sock: socket.socket
    info: ServerInfo
    leftover: bytes

    def close(self) -> None:
        """Drop it. Twice is fine."""
        self.sock.close()


class Attempt:
    """One attempt to make a session."""

    def __init__(self, uri: NbdUri, limit_s: float = ATTEMPT_S) -> None:
        self._uri = uri
        self._limit_s = limit_s
        self._end = 0.0                             # the thread of run()
        self._lock = threading.Lock()               # a leaf
        self._sock: socket.socket | None = None     # under _lock: while run() uses it
        self._given_up = False                      # under _lock

    def run(self) -> Session:
        """Connect and shake hands. A thread that may block; once.

        OSError if nobody listens (TimeoutError after limit_s, ConnectionAbortedError if it was given up), BlockError
        if the server refuses, PeerError if it is none or a broken one.
        """
        self._end = time.monotonic() + self._limit_s
        sock = self._connected()
        try:
            session = self._shake_hands(sock)
            with self._lock:
                self._sock = None
                self._check_wanted_locked()
            return session
        except BaseException:
            self._drop(sock)
            raise

    def give_up(self) -> None:
        """Let run() end with an error soon: at once unless it resolves a name. Any thread."""
        with self._lock:
            self._given_up = True
            if self._sock is not None:
                with contextlib.suppress(OSError):  # not connected yet, or not any more
                    self._sock.shutdown(socket.SHUT_RDWR)

    def _connected(self) -> socket.socket:
        uri = self._uri
        if uri.socket is not None:
            return self._connect_to(socket.AF_UNIX, uri.socket)
        addresses = socket.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
        for number, (family, _, _, _, address) in enumerate(addresses, 1):
            try:
                return self._connect_to(family, address)
            except OSError:
                if number == len(addresses):
                    raise
        raise OSError(errno.EADDRNOTAVAIL, f"host {uri.host} has no address")

    def _connect_to(self, family: int, address: str | tuple[object, ...]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            with self._lock:
                self._check_wanted_locked()
                self._sock = sock
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._limit(sock)
            sock.connect(address)
        except BaseException:
            self._drop(sock)
            raise
        return sock

    def _shake_hands(self, sock: socket.socket) -> Session:
        export = self._uri.export
        handshake = ClientHandshake(export)
        while True:
            self._limit(sock)
            data = sock.recv(_RECEIVE_BYTES)
            if not data:
                with self._lock:
                    self._check_wanted_locked()
                raise ConnectionLost(f"the server hung up during the handshake for export {export!r}")
            handshake.feed(data)
            while (turn := handshake.next_turn()) is not None:
                if turn.data:
                    with contextlib.suppress(*([OSError] if isinstance(turn.end, Refused) else [])):
                        sock.sendall(turn.data)
                if isinstance(turn.end, Refused):
                    raise refusal_error(self._uri, turn.end)
                if isinstance(turn.end, Entered):
                    sock.setblocking(False)
                    return Session(sock, turn.end.info, turn.end.leftover)

    def _limit(self, sock: socket.socket) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"no session with {self._uri} after {self._limit_s:g} s")
        sock.settimeout(left)

    def _check_wanted_locked(self) -> None:
        if self._given_up:
            raise ConnectionAbortedError(errno.ECONNABORTED, f"the attempt to reach {self._uri} was given up")

    def _drop(self, sock: socket.socket) -> None:
        with self._lock:                            # give_up() must not touch a descriptor that is somebody else's
            self._sock = None
            sock.close()
