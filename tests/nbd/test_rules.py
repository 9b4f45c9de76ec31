"""Rules of the protocol that no other file is about: one test each, by bytes, from both sides. Ids of the checklist."""

from __future__ import annotations

import asyncio
import errno
import inspect
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.runtime import run
from homeloop.errors import BlockError, UsageError
from homeloop.nbd.chunks import ChunkReader
from homeloop.nbd.client import Client, connect
from homeloop.nbd.handshake import Agreed
from homeloop.nbd.server import Server
from homeloop.nbd.serving import serve
from tests.nbd import wire
from tests.nbd.talking import RawClient, Reply, soon, talk, turns, until
from tests.nbd.test_transmission import receive

SIZE = 1 << 20
HELLO = b"NBDMAGICIHAVEOPT\0\3"


def reply(option: int, kind: int = wire.ACK, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(data)) + data


def export(flags: int = 1, size: int = SIZE) -> bytes:
    """The end of a GO."""
    return reply(wire.GO, wire.INFO_REPLY, struct.pack(">HQH", 0, size, flags)) + reply(wire.GO)


NO_HEADERS = (reply(wire.EXT, wire.UNSUP), reply(wire.STRUCTURED, wire.UNSUP))


@asynccontextmanager
async def recording(*says: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that says these things, each after it has heard something; and what it hears, to its end."""
    heard: list[bytes] = []
    loop = asyncio.get_running_loop()

    async def serve_one() -> None:
        sock, _ = await loop.sock_accept(listener)
        with sock:
            for index, data in enumerate(says):
                if index:
                    heard.append(await loop.sock_recv(sock, 1 << 16))
                await loop.sock_sendall(sock, data)
            while data := await loop.sock_recv(sock, 1 << 16):
                heard.append(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        serving = loop.create_task(serve_one())
        try:
            yield f"nbd://127.0.0.1:{listener.getsockname()[1]}/", heard
            await soon(serving)     # the client has left
        finally:
            serving.cancel()


# The baseline


def test_b1_b2_b4_w1_the_baseline_suffices(tmp_path: Path) -> None:
    """LIST, INFO, GO, ABORT, and in transmission simple replies, READ, WRITE, DISC; nothing else is asked for."""
    async def main() -> None:
        server = Server(AioContext.of())
        await server.add_export("disk", Device(Memory(SIZE)))
        await server.listen(tmp_path / "s")

        async def newcomer() -> RawClient:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(tmp_path / "s"))
            client = RawClient(sock)
            assert await client.receive(18) == HELLO
            await client.send(wire.client_flags(1))
            return client

        client = await newcomer()
        await client.send(wire.option(wire.LIST) + wire.info(wire.INFO, "disk") + wire.option(wire.ABORT))
        kinds = [answer.kind for answer in wire.option_answers(await client.ended())]
        assert kinds == [wire.SERVER, wire.ACK, wire.INFO_REPLY, wire.ACK, wire.ACK]
        client = await newcomer()
        await client.send(wire.info(wire.GO, "disk"))
        await client.receive(20 + 12 + 20)
        await client.send(wire.write(7, 512, b"data"))
        assert await client.reply() == Reply(7, 0)
        await client.send(wire.request(wire.READ, 8, 510, 8) + wire.request(wire.DISC))
        assert await client.ended() == wire.simple_reply(8, 0, b"\0\0data\0\0")
        await server.close()

    run(main())


def test_b6_what_a_server_should_have(tmp_path: Path) -> None:
    """FLUSH, FUA, block sizes on demand and without insisting, EXPORT_NAME; TLS is test_starttls.py."""
    async def main() -> None:
        async with talk(Memory(SIZE)) as both:
            assert both.connection._device.can_flush
        async with serve(Memory(SIZE)) as uri, connect(uri) as client:
            assert client.info.flags & 0xC == 0xC

    run(main())


def test_b5_d4_wz3_x5_a_client_uses_what_is_offered() -> None:
    """The server has nothing but reads and writes."""
    async def main() -> None:
        async with recording(HELLO, *NO_HEADERS, export(1)) as (uri, heard):
            client = await connect(uri)
            for asked in (
                client.flush(), client.trim(0, 512), client.write_zeroes(0, 512), client.cache(0, 512),
                client.write(0, b"x", fua=True),
            ):
                with pytest.raises(BlockError) as caught:
                    await asked
                assert caught.value.errno == errno.ENOTSUP
            with pytest.raises(BlockError):
                await client.write_zeroes(0, 512, fast=True)
            await client.close()
        assert b"".join(heard[3:]) == wire.request(wire.DISC)     # and nothing else

    asyncio.run(main())


def test_d4_f2_flush_and_disc_have_no_range() -> None:
    async def main() -> None:
        async with recording(HELLO, *NO_HEADERS, export(1 | 4), wire.simple_reply(1)) as (uri, heard):
            async with connect(uri) as client:
                await soon(client.flush())
        assert heard[3] == wire.request(wire.FLUSH, 1)
        assert b"".join(heard[4:]) == wire.request(wire.DISC)

    asyncio.run(main())


def test_x11_fua_is_for_changes_only() -> None:
    with_fua = {name for name in ("read", "write", "flush", "trim", "write_zeroes", "cache", "extents")
                if "fua" in inspect.signature(getattr(Client, name)).parameters}
    assert with_fua == {"write", "trim", "write_zeroes"}


def test_t11_each_connection_stands_for_itself() -> None:
    """What the last server at an address had says nothing about the next."""
    async def main() -> None:
        async with recording(HELLO, *NO_HEADERS, export()) as (uri, _):
            async with connect(uri) as client:
                assert not client.info.structured
        port = int(uri.rpartition(":")[2].strip("/"))
        async with serve(Memory(SIZE), listen=("127.0.0.1", port)) as same, connect(uri) as client:
            assert same == uri
            assert client.info.extended
        async with recording(HELLO, *NO_HEADERS, export()) as (uri, _), connect(uri) as client:
            assert not client.info.structured

    run(main())


# Sizes


def test_z2_a_size_is_a_multiple_of_the_minimum() -> None:
    class Odd(Memory):
        block_size_min = 512

    with pytest.raises(UsageError, match="not a multiple of its block_size_min 512"):
        Device(Odd(SIZE + 1))


def test_z3_without_an_agreement() -> None:
    """Single bytes, and 32 MiB."""
    async def main() -> None:
        async with talk(Memory(33 << 20)) as both:
            await both.client.send(wire.write(1, 1, b"x"))
            assert (await both.client.reply()).error == 0
            await both.client.send(wire.request(wire.READ, 2, 1, 1))
            assert (await both.client.reply(1)).data == b"x"
            data = b"y" * (1 << 25)
            await both.client.send(wire.write(3, 3, data))
            assert (await both.client.reply()).error == 0
            await both.client.send(wire.request(wire.READ, 4, 3, 1 << 25))
            assert (await both.client.reply(1 << 25)).data == data

    asyncio.run(main())


def test_z4_z7_e1_e2_e4_mistakes_cost_an_error_and_no_more() -> None:
    """Blocks of 512 bytes, and a client that does not know of them."""
    class Blocks(Memory):
        block_size_min = 512

    einval, enospc = 22, 28

    async def main() -> None:
        async with talk(Blocks(SIZE)) as both:
            for asked, error in [
                (wire.request(wire.READ, 1, 1, 512), einval),
                (wire.request(wire.READ, 1, 0, 511), einval),
                (wire.write(1, 1, b"x" * 512), einval),
                (wire.write(1, 0, b"x"), einval),
                (wire.request(wire.TRIM, 1, 0, 100), einval),
                (wire.request(wire.READ, 1, SIZE, 512), einval),
                (wire.write(1, SIZE, b"x" * 512), enospc),
                (wire.request(wire.WRITE_ZEROES, 1, SIZE - 512, 1024), enospc),
                (wire.request(wire.TRIM, 1, SIZE, 512), einval),
                (wire.request(77, 1), einval),
                (wire.request(wire.READ, 1, 0, 512, 0x4000), einval),
            ]:
                await both.client.send(asked)
                assert (await both.client.reply()).error == error
            await both.client.send(wire.request(wire.READ, 9, 0, 1024))
            assert (await both.client.reply(1024)).data == bytes(1024)

    asyncio.run(main())


# Durability and commands


class Recorded(Memory):
    """Memory that writes down what it is asked, and flushes when the test says so."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.asked: list[str] = []
        self.stable = asyncio.Event()

    def write(self, offset: int, data: Any) -> None:
        self.asked.append("write")
        super().write(offset, data)

    async def flush(self) -> None:  # type: ignore[override]
        self.asked.append("flush")
        await self.stable.wait()
        self.asked.append("stable")

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False) -> None:
        self.asked.append(f"write_zeroes may_trim={may_trim}")
        super().write_zeroes(offset, length, may_trim=may_trim, fast=fast)


def test_d3_no_reply_to_fua_before_it_is_stable() -> None:
    async def main() -> None:
        driver = Recorded()
        async with talk(driver) as both:
            await both.client.send(wire.write(1, 0, b"abc", wire.FUA) + wire.request(wire.READ, 2, 0, 3))
            assert (await both.client.reply(3)).cookie == 2     # the other one overtakes it
            await until(lambda: driver.asked == ["write", "flush"])
            await turns()
            assert both.connection.statistics().in_flight == 1
            driver.stable.set()
            assert (await both.client.reply()).cookie == 1
            assert driver.asked == ["write", "flush", "stable"]

    asyncio.run(main())


def test_x7_d1_a_flush_covers_what_was_answered_on_another_connection() -> None:
    async def main() -> None:
        driver = Recorded()
        driver.stable.set()
        async with serve(driver, iothread=False) as uri, connect(uri) as one, connect(uri) as other:
            await soon(one.write(0, b"abc"))
            await soon(other.flush())
            assert driver.asked == ["write", "flush", "stable"]
            assert await soon(other.read(0, 3)) == b"abc"

    run(main())


def test_tr1_trim_is_a_hint() -> None:
    """A driver that does nothing about it has done enough."""
    class Deaf(Recorded):
        def trim(self, offset: int, length: int) -> None:
            self.asked.append("trim")

    async def main() -> None:
        driver = Deaf()
        async with talk(driver) as both:
            await both.client.send(wire.request(wire.TRIM, 2, 0, 512))
            assert (await both.client.reply()).error == 0
            assert driver.asked == ["trim"]

    asyncio.run(main())


def test_wz1_zeroes_with_and_without_holes() -> None:
    async def main() -> None:
        driver = Recorded()
        async with talk(driver) as both:
            for flags in (0, wire.NO_HOLE):
                for asked in (wire.write(1, 0, b"abcdef"), wire.request(wire.WRITE_ZEROES, 2, 1, 3, flags)):
                    await both.client.send(asked)
                    assert (await both.client.reply()).error == 0
                await both.client.send(wire.request(wire.READ, 3, 0, 6))
                assert (await both.client.reply(6)).data == b"a\0\0\0ef"
            zeroings = [asked for asked in driver.asked if asked.startswith("write_zeroes")]
            assert zeroings == ["write_zeroes may_trim=True", "write_zeroes may_trim=False"]

    asyncio.run(main())


# Replies


def test_r5_unknown_chunk_flags_are_ignored_and_none_are_sent() -> None:
    reader = ChunkReader()
    reader.expect(1, 3)
    data = wire.data_chunk(1, 0, b"ab", 0x4000) + wire.data_chunk(1, 2, b"c", 0x8001)
    found = []
    for _ in receive(reader, data):
        found += reader.next_batch()
    assert found == [(1, 0, b"abc")]

    async def main() -> None:
        async with talk(Memory(SIZE), agreed=Agreed(structured=True, allocation_id=1)) as both:
            for command, flags in [(wire.READ, 0), (wire.READ, wire.DF), (wire.BLOCK_STATUS, 0), (wire.READ, 0x4000)]:
                await both.client.send(wire.request(command, 1, 0, 512, flags))
                assert (await both.client.chunk()).flags == 1

    asyncio.run(main())


def test_bs6_mc12_reserved_bits() -> None:
    """The server leaves them zero: all that base:allocation tells fits in two bits. The client ignores them."""
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=Agreed(structured=True, allocation_id=1)) as both:
            await both.client.send(wire.write(1, 4096, b"x"))
            await both.client.reply()
            await both.client.send(wire.request(wire.BLOCK_STATUS, 2, 0, SIZE))
            payload = (await both.client.chunk()).payload
            flags = struct.unpack(f">{len(payload) // 4}I", payload)[2::2]
            assert set(flags) == {0, 3}
        agreed = (
            reply(wire.EXT, wire.UNSUP), reply(wire.STRUCTURED),
            reply(wire.SET_META, wire.META_REPLY, struct.pack(">I", 9) + b"base:allocation") + reply(wire.SET_META),
        )
        status = wire.chunk(1, 5, struct.pack(">5I", 9, 512, 0xFFFFFFFD, 512, 0xFFFFFFFC))
        async with recording(HELLO, *agreed, export(), status) as (uri, _):
            async with connect(uri) as client:
                assert await soon(client.extents(0, 1024)) == [(512, True, False), (512, False, False)]

    asyncio.run(main())
