"""One attempt to get a session, by a thread that may block.

Resolving a name, connecting and shaking hands with a peer that is dead or stopped can each take as long as they like,
so an attempt has a limit as a whole, and may be given up from another thread. The handshake is the one of session.py,
on a plain asyncio loop that the thread has for it alone: no context, and it is gone when run() returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
import time
from typing import Final

from homeloop.errors import ConnectionLost
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.session import Session, no_address, shake_hands
from homeloop.nbd.uri import NbdUri

__all__ = ["ATTEMPT_S", "Attempt"]

ATTEMPT_S: Final = 30.0  # that one attempt may take; a server that is only slow shakes hands in a fraction of it


class Attempt:
    """One attempt to make a session."""

    def __init__(self, uri: NbdUri, limit_s: float = ATTEMPT_S, *, tls: TlsCredentials | None = None) -> None:
        self._uri = uri
        self._tls = tls
        self._limit_s = limit_s
        self._end = 0.0                             # the thread of run()
        self._lock = threading.Lock()               # a leaf
        self._sock: socket.socket | None = None     # under _lock: a second descriptor of the one that run() uses
        self._given_up = False                      # under _lock

    def run(self) -> Session:
        """Connect and shake hands. A thread that may block, and runs no loop; once.

        OSError if nobody listens (TimeoutError after limit_s, ConnectionAbortedError if it was given up), BlockError
        if the server refuses, PeerError if it is none or a broken one.
        """
        self._end = time.monotonic() + self._limit_s
        sock = self._connected()
        try:
            loop = asyncio.SelectorEventLoop()
        except BaseException:                       # short of descriptors
            sock.close()
            self._forget()
            raise
        try:
            return loop.run_until_complete(self._shake_hands(sock))
        finally:
            loop.close()
            self._forget()

    def give_up(self) -> None:
        """Let run() end with an error soon: at once unless it resolves a name. Any thread."""
        with self._lock:
            self._given_up = True
            if self._sock is not None:
                with contextlib.suppress(OSError):  # not connected yet, or not any more
                    self._sock.shutdown(socket.SHUT_RDWR)

    async def _shake_hands(self, sock: socket.socket) -> Session:
        try:
            async with asyncio.timeout(max(0.0, self._end - time.monotonic())):
                session = await shake_hands(sock, self._uri, self._tls)
            with self._lock:
                wanted = not self._given_up
            if wanted:
                return session
            session.close()
        except TimeoutError:
            raise self._too_late() from None
        except (ConnectionLost, OSError):
            with self._lock:
                if not self._given_up:
                    raise
        raise self._unwanted()

    def _connected(self) -> socket.socket:
        uri = self._uri
        if uri.socket is not None:
            return self._connect_to(socket.AF_UNIX, uri.socket)
        try:
            addresses = socket.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise no_address(uri, error) from error
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
                if self._given_up:
                    raise self._unwanted()
                # Of its own: give_up() must not meet a descriptor that is somebody else's by then.
                self._sock = sock.dup()
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            left = self._end - time.monotonic()
            if left <= 0:
                raise self._too_late()
            sock.settimeout(left)
            sock.connect(address)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            self._forget()
            raise
        return sock

    def _forget(self) -> None:
        with self._lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None

    def _too_late(self) -> TimeoutError:
        return TimeoutError(errno.ETIMEDOUT, f"no session with {self._uri} after {self._limit_s:g} s")

    def _unwanted(self) -> ConnectionAbortedError:
        return ConnectionAbortedError(errno.ECONNABORTED, f"the attempt to reach {self._uri} was given up")
