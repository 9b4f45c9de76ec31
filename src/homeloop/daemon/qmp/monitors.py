"""The control socket's server: any number of clients, each with a session of its own, on the main context.

    readable -> Session -> one command at a time -> its line ----\
                                    daemon's events -> a line -----> the client, in this order, within a limit

A client that does not read its lines is cut off when they are too many; nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.daemon.exporting import Daemon
from homeloop.daemon.qmp.arguments import ArgumentError
from homeloop.daemon.qmp.commands import VERSION, CommandFailed, execute
from homeloop.daemon.qmp.parsing import TooLong
from homeloop.daemon.qmp.session import GENERIC_ERROR, Command, Session
from homeloop.nbd.listening import Listener, adopt_listener, listen_unix

__all__ = ["MONITORS_MAX", "UNSENT_BYTES_MAX", "Monitors"]

logger = logging.getLogger(__name__)

MONITORS_MAX: Final = 32
UNSENT_BYTES_MAX: Final = 4 << 20       # of one client; some thousand answers
_RECEIVE_BYTES: Final = 16 << 10
_BACKLOG: Final = 16


class Monitors:
    """All clients of one control socket. The main context's; close() before the daemon's."""

    def __init__(self, daemon: Daemon, where: str | socket.socket) -> None:
        """Listen at a path, with a socket file that is for this user only, or on a socket that listens already.

        OSError, naming the path, if that cannot be.
        """
        self.on_quit: Callable[[], object] = lambda: None       # called when a client has sent quit
        self._daemon = daemon
        self._context = AioContext.of()
        self._listener: Listener = adopt_listener(where) if isinstance(where, socket.socket) else _listen(where)
        self._monitors: set[_Monitor] = set()
        self._numbers = itertools.count(1)
        daemon.subscribers.append(self._on_event)
        self._context.loop.add_reader(self._listener.sock, self._on_acceptable)

    def __repr__(self) -> str:
        return f"<Monitors {self._listener.path} clients={len(self._monitors)}>"

    def _on_acceptable(self) -> None:
        try:
            sock, _ = self._listener.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Short of descriptors. The socket stays readable: without a pause the loop would spin.
            logger.warning("control socket: cannot accept clients for a second: %s", error)
            self._context.loop.remove_reader(self._listener.sock)
            self._context.loop.call_later(1.0, self._accept_again)
            return
        sock.setblocking(False)
        if len(self._monitors) >= MONITORS_MAX:
            logger.warning("control socket: client refused: %d are here", MONITORS_MAX)
            sock.close()
            return
        monitor = _Monitor(self, self._daemon, sock, next(self._numbers))
        self._monitors.add(monitor)
        monitor.start(self._context)

    def _accept_again(self) -> None:
        if self._listener.sock.fileno() >= 0:
            self._context.loop.add_reader(self._listener.sock, self._on_acceptable)

    def _on_event(self, name: str, data: dict[str, object]) -> None:
        line = Session.event(name, data, time_us=time.time_ns() // 1000)
        for monitor in list(self._monitors):
            if monitor.session.negotiated:
                monitor.send(line)

    def forget(self, monitor: _Monitor) -> None:
        """A client has left."""
        self._monitors.discard(monitor)

    async def close(self) -> None:
        """Listen no more; let commands that run end, send what is unsent, close the clients. Twice is fine."""
        if self._listener.sock.fileno() >= 0:
            self._context.loop.remove_reader(self._listener.sock)
            self._listener.close()
        await asyncio.gather(*(monitor.close() for monitor in list(self._monitors)))
        with contextlib.suppress(ValueError):
            self._daemon.subscribers.remove(self._on_event)


def _listen(path: str) -> Listener:
    mask = os.umask(0o177)                          # its mode is that of its first moment: 0600
    try:
        return listen_unix(path, _BACKLOG)
    finally:
        os.umask(mask)


class _Monitor:
    """One client."""

    def __init__(self, owner: Monitors, daemon: Daemon, sock: socket.socket, number: int) -> None:
        self.session = Session(VERSION)
        self._owner = owner
        self._daemon = daemon
        self._sock = sock
        self._number = number
        self._unsent = bytearray()
        self._more = asyncio.Event()                # there is something to send, or an end to it
        self._ending = False                        # no new commands
        self._talking: Coroutine[None] | None = None
        self._sending: Coroutine[None] | None = None

    def start(self, context: AioContext) -> None:
        self.send(self.session.greeting())
        self._sending = context.spawn(self._send_all(), name=f"monitor {self._number} sends")
        self._talking = context.spawn(self._talk(), name=f"monitor {self._number}")

    def send(self, line: bytes) -> None:
        """Queue a line. A client with too many is cut off: it does not read."""
        if len(self._unsent) + len(line) > UNSENT_BYTES_MAX:
            logger.warning("control socket: client %d does not read its answers: cut off", self._number)
            self._cut_off()
            return
        self._unsent += line
        self._more.set()

    def _cut_off(self) -> None:
        self._unsent.clear()
        self._ending = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)   # both coroutines see the end of it
        self._more.set()

    async def close(self) -> None:
        """Let a command that runs end, send what is there, for a while; then close."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        talking = self._talking
        if talking is not None:
            await asyncio.wait([asyncio.ensure_future(_end_of(talking))], timeout=10.0)
            talking.cancel()
            await _end_of(talking)

    async def _talk(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self._ending and (data := await loop.sock_recv(self._sock, _RECEIVE_BYTES)):
                self.session.feed(data)
                await self._answer_all()
        except TooLong as error:
            logger.warning("control socket: client %d: %s", self._number, error)
        except OSError:
            pass                                    # the client went away
        finally:
            self._ending = True
            self._more.set()
            if self._sending is not None:
                await asyncio.wait([asyncio.ensure_future(_end_of(self._sending))], timeout=5.0)
                self._sending.cancel()
            self._sock.close()
            self._owner.forget(self)

    async def _answer_all(self) -> None:
        while not self._ending and (item := self.session.next_item()) is not None:
            if not isinstance(item, Command):
                self.send(item.line)
                continue
            line, went_well = await self._run(item)
            self.send(line)
            if item.name == "quit" and went_well:
                self._ending = True
                self._owner.on_quit()

    async def _run(self, command: Command) -> tuple[bytes, bool]:
        """Run a command: its answer, and whether it is one."""
        refuse = self.session.refuse
        try:
            result = await execute(self._daemon, command.name, command.arguments)
        except ArgumentError as error:
            return refuse(command, GENERIC_ERROR, str(error)), False
        except CommandFailed as error:
            return refuse(command, error.kind, str(error)), False
        except Exception as error:
            logger.exception("control socket: %s failed by a mistake of ours", command.name)
            return refuse(command, GENERIC_ERROR, f"Internal error: {type(error).__name__}: {error}"), False
        return self.session.answer(command, result), True

    async def _send_all(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while self._unsent or not self._ending:
                self._more.clear()
                if not self._unsent:
                    await self._more.wait()
                    continue
                # A copy, so that lines may be added meanwhile; bounded, so that they count as unsent.
                piece = bytes(self._unsent[: 64 << 10])
                await loop.sock_sendall(self._sock, piece)
                del self._unsent[: len(piece)]


async def _end_of(running: Coroutine[Any]) -> None:
    """Wait for an end, whatever it is; a cancelled wait leaves it alone."""
    ended = asyncio.Event()
    running.add_done_callback(lambda _running: ended.set())
    await ended.wait()
