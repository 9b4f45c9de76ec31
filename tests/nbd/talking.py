"""A client made of a plain socket, and drivers that do what a test tells them."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.nbd.connection import Connection
from homeloop.nbd.handshake import Agreed
from homeloop.nbd.limits import ConnectionLimits

T = TypeVar("T")
LIMIT_S = 10.0


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait, with a limit."""
    return await asyncio.wait_for(awaitable, LIMIT_S)


async def turns(count: int = 20) -> None:
    """Let everything that is ready run, a few times over."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(what: Any, *args: Any) -> None:
    """Go round the loop until what(*args) is true, with a limit."""
    async with asyncio.timeout(LIMIT_S):
        while not what(*args):  # noqa: ASYNC110 - of states that no event announces
            await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Reply:
    """A simple reply."""

    cookie: int
    error: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a structured reply."""

    cookie: int
    kind: int
    payload: bytes = b""
    flags: int = 1


def error_chunk(cookie: int, error: int, text: str) -> Chunk:
    raw = text.encode()
    return Chunk(cookie, 32769, struct.pack(">IH", error, len(raw)) + raw)


def data_chunk(cookie: int, offset: int, data: bytes) -> Chunk:
    return Chunk(cookie, 1, struct.pack(">Q", offset) + data)


class RawClient:
    """Says exactly what the test says, and reads exactly what it asks for."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(self, data: bytes) -> None:
        await soon(asyncio.get_running_loop().sock_sendall(self.sock, data))

    async def receive(self, count: int) -> bytes:
        """Return `count` bytes; fewer only at the end of the stream."""
        found = bytearray()
        while len(found) < count:
            part = await soon(asyncio.get_running_loop().sock_recv(self.sock, count - len(found)))
            if not part:
                break
            found += part
        return bytes(found)

    async def reply(self, data_bytes: int = 0) -> Reply:
        """Return the next reply, which carries that many bytes if it is no error."""
        magic, error, cookie = struct.unpack(">IIQ", await self.receive(16))
        assert magic == 0x67446698, hex(magic)
        return Reply(cookie, error, b"" if error else await self.receive(data_bytes))

    async def chunk(self) -> Chunk:
        """Return the next reply, which is a chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", await self.receive(20))
        assert magic == 0x668E33EF, hex(magic)
        return Chunk(cookie, kind, await self.receive(length), flags)

    async def chunks(self, count: int) -> list[Chunk]:
        return [await self.chunk() for _ in range(count)]

    async def replies(self, count: int, data_bytes: int = 0) -> list[Reply]:
        return [await self.reply(data_bytes) for _ in range(count)]

    async def ended(self) -> bytes:
        """Return what still comes until the stream ends, and close our end."""
        found = bytearray()
        with self.sock:
            while True:
                try:
                    part = await soon(asyncio.get_running_loop().sock_recv(self.sock, 1 << 16))
                except ConnectionResetError:
                    return bytes(found)
                if not part:
                    return bytes(found)
                found += part

    def close(self) -> None:
        self.sock.close()


class CountingSocket(socket.socket):
    """A socket that counts the calls that matter."""

    sends = 0
    receives = 0

    def sendmsg(self, *args: Any) -> int:
        self.sends += 1
        return super().sendmsg(*args)

    def recvmsg_into(self, *args: Any) -> Any:
        self.receives += 1
        return super().recvmsg_into(*args)


class Gated(Memory):
    """Memory whose requests wait, each until the test releases it."""

    def __init__(self, size: int = 1 << 20) -> None:
        super().__init__(size)
        self.waiting: dict[int, asyncio.Future[None]] = {}      # offset -> what the request waits for
        self.begun = 0
        self.closed = False

    async def gate(self, offset: int) -> None:
        self.begun += 1
        self.waiting[offset] = asyncio.get_running_loop().create_future()
        try:
            await self.waiting[offset]
        finally:
            del self.waiting[offset]

    def release(self, *offsets: int) -> None:
        for offset in offsets or tuple(self.waiting):
            self.waiting[offset].set_result(None)

    def fail(self, offset: int, error: BaseException) -> None:
        self.waiting[offset].set_exception(error)

    async def read(self, offset: int, length: int) -> Any:  # type: ignore[override]
        await self.gate(offset)
        return super().read(offset, length)

    async def write(self, offset: int, data: Any) -> None:  # type: ignore[override]
        await self.gate(offset)
        super().write(offset, data)

    def close(self) -> None:
        self.closed = True


@dataclass
class Talk:
    """One connection, from both ends."""

    client: RawClient
    connection: Connection
    sock: CountingSocket
    closed: asyncio.Future[BaseException | None]
    tasks: list[asyncio.Task[None]]

    async def end(self) -> BaseException | None:
        """Return what the connection ended with."""
        return await soon(self.closed)


@asynccontextmanager
async def talk(
    driver: Any,
    *,
    read_only: bool = False,
    leftover: bytes = b"",
    start: bool = True,
    device: Any = None,
    agreed: Agreed | None = None,
    **limits: Any,
) -> AsyncIterator[Talk]:
    """A connection on one end of a socket pair, a raw client on the other."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    sock = CountingSocket(fileno=ours.detach())
    sock.setblocking(False)
    closed: asyncio.Future[BaseException | None] = loop.create_future()
    tasks: list[asyncio.Task[None]] = []

    def spawn(coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks.append(loop.create_task(coro))
        return tasks[-1]

    connection = Connection(
        sock,
        Device(driver) if device is None else device,
        peer="test",
        spawn=spawn,
        on_closed=lambda _, error: closed.set_result(error),
        read_only=read_only,
        agreed=agreed,
        limits=ConnectionLimits(**limits),
    )
    if start:
        connection.start(leftover)
    client = RawClient(theirs)
    try:
        yield Talk(client, connection, sock, closed, tasks)
    finally:
        client.close()
        connection.abort()
        if isinstance(driver, Gated):
            while not closed.done():
                driver.release()
                await asyncio.sleep(0)
        await soon(closed)
