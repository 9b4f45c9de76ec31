"""A server on a unix socket that says exactly what the test says, connection by connection."""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from tests.nbd import wire
from tests.nbd.talking import soon

HELLO = b"NBDMAGICIHAVEOPT\0\x03"
OPTION_REPLY = 0x0003E889045565A9
FLAGS = 0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x400      # has flags, flush, fua, trim, write zeroes, cache


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes


class Peer:
    """One connection, in transmission, with simple replies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def asked(self) -> Asked:
        """The next request."""
        magic, flags, command, cookie, offset, length = struct.unpack(
            ">IHHQQI", await soon(self._reader.readexactly(28)))
        assert magic == 0x25609513, hex(magic)
        data = await soon(self._reader.readexactly(length)) if command == wire.WRITE else b""
        return Asked(command, flags, cookie, offset, length, data)

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def answer(self, asked: Asked, error: int = 0) -> None:
        """Success, with zeroes for a READ, or an error."""
        data = bytes(asked.length) if asked.command == wire.READ and not error else b""
        self.say(wire.simple_reply(asked.cookie, error, data))

    async def ended(self) -> bytes:
        """What still comes until the client's end."""
        return await soon(self._reader.read())

    def hang_up(self) -> None:
        self.writer.transport.abort()


class Scripted:
    """`async with` it; it listens between start() and stop()."""

    def __init__(self, path: Path, size: int = 1 << 20, flags: int = FLAGS) -> None:
        self.path = path
        self.uri = f"nbd+unix:///?socket={path}"
        self.size = size
        self.flags = flags
        self.refuses = 0                                        # GO is answered with this error
        self.accepted = 0
        self._peers: asyncio.Queue[Peer] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Scripted:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        for writer in self._writers:
            writer.transport.abort()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        """Nobody listens any more; the connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self.path.unlink(missing_ok=True)

    async def peer(self) -> Peer:
        """The next connection that has shaken hands."""
        return await soon(self._peers.get())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.append(writer)
        try:
            writer.write(HELLO)
            await reader.readexactly(4)                         # the client's flags
            while True:
                _, option, length = struct.unpack(">QII", await reader.readexactly(16))
                await reader.readexactly(length)
                if option == wire.GO:
                    break
                writer.write(struct.pack(">QIII", OPTION_REPLY, option, wire.UNSUP, 0))
            if self.refuses:
                writer.write(struct.pack(">QIII", OPTION_REPLY, wire.GO, self.refuses, 2) + b"no")
                return
            info = struct.pack(">HQH", 0, self.size, self.flags)
            writer.write(struct.pack(">QIII", OPTION_REPLY, wire.GO, 3, len(info)) + info)
            writer.write(struct.pack(">QIII", OPTION_REPLY, wire.GO, 1, 0))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        await self._peers.put(Peer(reader, writer))


def socket_path(folder: Path) -> Path:
    """A path short enough for a unix socket."""
    path = folder / "s"
    assert len(os.fsencode(path)) < 100, path
    return path
