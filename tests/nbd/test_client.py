"""The client: many requests at once, what it refuses itself, and servers that are broken."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from homeloop.block.memory import Memory
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import Runtime, run
from homeloop.errors import BlockError, ConnectionLost, PeerError, WrongState
from homeloop.nbd.client import Client, connect
from homeloop.nbd.client_handshake import ServerInfo
from homeloop.nbd.protocol import TransmissionFlag
from homeloop.nbd.serving import serve
from tests.nbd import wire
from tests.nbd.talking import Gated, soon, turns, until

SIZE = 4 << 20


class Blocks(Memory):
    """Memory in blocks of 512 bytes."""

    block_size_min = 512


@asynccontextmanager
async def client_of(driver: Any, **options: Any) -> AsyncIterator[Client]:
    async with serve(driver, iothread=False, **options) as uri, connect(uri) as client:
        yield client


def test_random_requests_at_once(seed: int) -> None:
    """Each task has a range of its own, and finds what it wrote there."""
    async def main() -> None:
        async with serve(Memory(SIZE)) as uri, connect(uri) as client:

            async def work(number: int) -> None:
                dice = random.Random(seed + number)
                start, room = number << 18, 1 << 18
                model = bytearray(room)
                for _ in range(30):
                    length = dice.choice([1, 512, 4096, 40_000, 100_000, room])
                    offset = dice.randrange(room - length + 1)
                    if dice.random() < 0.5:
                        model[offset:offset + length] = data = dice.randbytes(length)
                        await client.write(start + offset, data, fua=dice.random() < 0.1)
                    elif dice.random() < 0.2:
                        model[offset:offset + length] = bytes(length)
                        await client.write_zeroes(start + offset, length, may_trim=dice.random() < 0.5)
                    else:
                        assert await client.read(start + offset, length) == model[offset:offset + length]

            await asyncio.gather(*[work(number) for number in range(16)])
            await client.flush()
            await client.trim(0, SIZE)
            assert client.in_flight == 0

    run(main())


def test_what_it_is_told() -> None:
    async def main() -> None:
        async with client_of(Blocks(SIZE), name="a/b ö", description="text") as client:
            assert (client.size, client.info.name, client.info.description) == (SIZE, "a/b ö", "text")
            assert client.info.block_size_minimum == 512
            assert client.can(TransmissionFlag.CAN_MULTI_CONN)
            assert not client.read_only
            assert "'a/b ö' open" in repr(client)
        assert "closed" in repr(client)

    run(main())


def test_await_and_close() -> None:
    async def main() -> None:
        async with serve(Memory(SIZE), iothread=False) as uri:
            client = await connect(uri)
            async with client:
                await client.read(0, 1)
            await client.close()
            with pytest.raises(WrongState, match="read on a client that is closed"):
                await client.read(0, 1)

    run(main())


@pytest.mark.parametrize(("request_", "number"), [
    (lambda c: c.read(SIZE, 512), errno.EINVAL),
    (lambda c: c.read(-512, 512), errno.EINVAL),
    (lambda c: c.read(0, -512), errno.EINVAL),
    (lambda c: c.read(1, 512), errno.EINVAL),
    (lambda c: c.write(SIZE, bytes(512)), errno.ENOSPC),
    (lambda c: c.write(0, b"x"), errno.EINVAL),
    (lambda c: c.write_zeroes(0, 1 << 64), errno.EINVAL),
    (lambda c: c.trim(0, 2 * SIZE), errno.ENOSPC),
])
def test_z6_refused_here(request_: Callable[[Client], Awaitable[Any]], number: int) -> None:
    async def main() -> None:
        async with client_of(Blocks(SIZE)) as client:
            with pytest.raises(BlockError) as caught:
                await request_(client)
            assert caught.value.errno == number
            assert await client.read(0, 512) == bytes(512)

    run(main())


def test_z6_payload_above_the_maximum() -> None:
    async def main() -> None:
        async with client_of(Memory(1 << 26)) as client:
            with pytest.raises(BlockError, match="the server takes 33554432 at once"):
                await client.read(0, (1 << 25) + 1)
            assert len(await client.read(0, 1 << 25)) == 1 << 25

    run(main())


def test_x5_what_is_not_offered() -> None:
    class Plain:
        size = SIZE
        thread_model = "inline"

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, offset: int, data: Any) -> None:
            pass

    async def main() -> None:
        async with client_of(Plain()) as client:
            for request in (client.flush(), client.trim(0, 512), client.write(0, b"x", fua=True)):
                with pytest.raises(BlockError) as caught:
                    await request
                assert caught.value.errno == errno.ENOTSUP
        async with client_of(Plain(), read_only=True) as client:
            for request in (client.write(0, b"x"), client.trim(0, 1), client.write_zeroes(0, 1)):
                with pytest.raises(BlockError) as caught:
                    await request
                assert caught.value.errno == errno.EPERM

    run(main())


def test_the_servers_error() -> None:
    class Failing(Memory):
        def read(self, offset: int, length: int) -> bytes:
            raise OSError(errno.ENOSPC, "odd")

    async def main() -> None:
        async with client_of(Failing(SIZE)) as client:
            with pytest.raises(BlockError, match="READ of 512 bytes at 1024") as caught:
                await client.read(1024, 512)
            assert caught.value.errno == errno.ENOSPC
            await client.write(0, b"goes on")

    run(main())


def test_a_cancelled_request_leaves_the_others_alone() -> None:
    """The late reply is for nobody, and its bytes are not taken for the next one's."""
    async def main() -> None:
        driver = Gated(SIZE)
        async with client_of(driver) as client:
            first = asyncio.ensure_future(client.read(0, 512))
            second = asyncio.ensure_future(client.read(4096, 512))
            await until(lambda: len(driver.waiting) == 2)
            first.cancel()
            await turns()
            driver.release(0)
            await until(lambda: client.in_flight == 1)
            driver.release(4096)
            assert await soon(second) == bytes(512)

    run(main())


def test_f2_close_waits_for_what_is_in_flight() -> None:
    async def main() -> None:
        driver = Gated(SIZE)
        async with client_of(driver) as client:
            reading = asyncio.ensure_future(client.read(0, 512))
            await until(lambda: driver.waiting)
            closing = asyncio.ensure_future(client.close())
            await turns()
            assert not closing.done()
            driver.release()
            assert await soon(reading) == bytes(512)
            await soon(closing)

    run(main())


def test_bs7_extents() -> None:
    """What the server tells, cut to what was asked."""
    async def main() -> None:
        async with client_of(Memory(SIZE)) as client:
            await client.write(1 << 20, b"x" * 65536)
            page = (65536, False, False)
            assert await client.extents(0, SIZE) == [
                (1 << 20, True, True), page, (SIZE - (1 << 20) - 65536, True, True),
            ]
            assert await client.extents((1 << 20) - 512, 1024) == [(512, True, True), (512, False, False)]
            for offset, length in ((0, 0), (SIZE, 1), (-1, 1)):
                with pytest.raises(BlockError) as caught:
                    await client.extents(offset, length)
                assert caught.value.errno == errno.EINVAL

    run(main())


def test_hints_and_fast_zeroes() -> None:
    class Slow(Memory):
        def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
            raise OSError(errno.ENOTSUP, "slow today")

    async def main() -> None:
        async with client_of(Memory(SIZE)) as client:
            await client.cache(0, SIZE)
            await client.write(0, b"x")
            await client.write_zeroes(0, 512, fast=True)
            assert await client.read(0, 512) == bytes(512)
        async with client_of(Slow(SIZE)) as client:
            with pytest.raises(BlockError, match=r"the server says .*slow today") as caught:
                await client.write_zeroes(0, 512, fast=True)
            assert caught.value.errno == errno.ENOTSUP

    run(main())


def test_sr3_a_server_without_structured_replies() -> None:
    """Its replies are simple ones; where its holes are nobody knows."""
    async def main() -> None:
        says = (HELLO, NO_EXT, UNSUP, GO_ACK, wire.simple_reply(1, 0, b"abc"))
        async with fake_server(*says) as uri, connect(uri) as client:
            assert not client.info.structured
            assert await client.extents(0, 4096) == [(4096, False, False)]
            assert await client.read(0, 3) == b"abc"

    asyncio.run(main())


@pytest.mark.parametrize("answer", [wire.simple_reply(1, 0, bytes(512)), wire.data_chunk(1, 512, bytes(512))])
def test_r3_r6_a_broken_server_with_structured_replies(answer: bytes) -> None:
    async def main() -> None:
        acks = [struct.pack(">QIII", 0x0003E889045565A9, number, 1, 0) for number in (8, 10)]
        async with fake_server(HELLO, NO_EXT, *acks, GO_ACK, answer) as uri:
            with pytest.raises(PeerError, match=r"cookie 0x1|chunk of bytes"):
                async with connect(uri) as client:
                    await soon(client.read(0, 512))

    asyncio.run(main())


def test_nobody_listens() -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await connect("nbd+unix:///?socket=/nonexistent/s")
        with pytest.raises(ValueError, match="scheme"):
            connect("http://x")
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            with pytest.raises(ConnectionRefusedError):
                await connect(f"nbd://127.0.0.1:{bound.getsockname()[1]}/")

    run(main())


# Broken servers

HELLO = b"NBDMAGICIHAVEOPT\0\x03"
NO_EXT = struct.pack(">QIII", 0x0003E889045565A9, 11, (1 << 31) + 1, 0)    # to EXTENDED_HEADERS
UNSUP = struct.pack(">QIII", 0x0003E889045565A9, 8, (1 << 31) + 1, 0)      # to STRUCTURED_REPLY
GO_ACK = (
    struct.pack(">QIII", 0x0003E889045565A9, 7, 3, 12) + struct.pack(">HQH", 0, SIZE, 0x6D)
    + struct.pack(">QIII", 0x0003E889045565A9, 7, 1, 0)
)


@asynccontextmanager
async def fake_server(*says: bytes) -> AsyncIterator[str]:
    """A server that says these things, each after it has heard something, and then hangs up."""
    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for index, data in enumerate(says):
            if index:
                await reader.read(1 << 16)
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    async with server:
        yield f"nbd://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(("says", "error"), [
    ((b"220 mail.example ESMTP ready\r\n",), "no NBD server"),
    ((b"",), "hung up during the handshake"),
    ((HELLO, NO_EXT, UNSUP, GO_ACK[:30]), "hung up during the handshake"),
    ((HELLO, NO_EXT, UNSUP, GO_ACK + b"surprise"), "8 bytes before any request"),
    ((HELLO, NO_EXT, UNSUP, GO_ACK), "closed the connection"),
    ((HELLO, NO_EXT, UNSUP, GO_ACK, b"garbage!" * 2), "reply magic"),
    ((HELLO, NO_EXT, UNSUP, GO_ACK, wire.simple_reply(99)), "cookie 0x63"),
    ((HELLO, NO_EXT, UNSUP, GO_ACK, wire.simple_reply(1)[:10]), "closed the connection"),
])
def test_a_broken_server(says: tuple[bytes, ...], error: str) -> None:
    """Every request fails, those that wait and those to come; nothing hangs."""
    async def main() -> None:
        async with fake_server(*says) as uri:
            with pytest.raises(PeerError, match=error):
                async with connect(uri) as client:
                    results = await soon(asyncio.gather(
                        client.read(0, 512), client.write(0, b"x"), return_exceptions=True,
                    ))
                    assert all(isinstance(result, PeerError) for result in results), results
                    await client.read(0, 512)

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "number"), [
    (wire.UNKNOWN, errno.ENOENT), (wire.POLICY, errno.EACCES), (wire.SHUTDOWN, errno.ESHUTDOWN),
    ((1 << 31) + 99, errno.EPROTO),
])
def test_refused(kind: int, number: int) -> None:
    async def main() -> None:
        refusal = struct.pack(">QIII", 0x0003E889045565A9, 7, kind, 5) + b"never"
        async with fake_server(HELLO, NO_EXT, UNSUP, refusal) as uri:
            with pytest.raises(BlockError, match="never") as caught:
                await connect(uri)
            assert caught.value.errno == number

    asyncio.run(main())


def test_x12_unknown_error_number() -> None:
    async def main() -> None:
        async with fake_server(HELLO, NO_EXT, UNSUP, GO_ACK, wire.simple_reply(1, 4711)) as uri, connect(uri) as client:
            with pytest.raises(BlockError) as caught:
                await client.read(0, 512)
            assert caught.value.errno == errno.EINVAL

    asyncio.run(main())


# Who may ask, how many at once, and what is left of a request that nobody waits for

def test_requests_from_everywhere() -> None:
    """A coroutine of another context, of a loop of another make, and a plain thread: all run at the client's home."""
    with Runtime(name="app") as rt, IOThread("io") as io:
        ending: asyncio.Future[None] | None = None
        clients: list[Client] = []

        async def hold(ready: threading.Event) -> None:
            nonlocal ending
            ending = asyncio.get_running_loop().create_future()
            async with client_of(Memory(SIZE)) as client:
                clients.append(client)
                ready.set()
                await ending

        ready = threading.Event()
        holder = rt.main.spawn(hold(ready))
        assert ready.wait(10)
        (client,) = clients
        try:
            rt.call(client.write(0, b"from a thread"))
            io.call(client.write(4096, b"from an IOThread"))
            asyncio.run(soon(client.write(8192, b"from asyncio")))
            assert rt.call(client.read(0, 13)) == b"from a thread"
            assert io.call(client.read(4096, 16)) == b"from an IOThread"
            assert asyncio.run(soon(client.read(8192, 12))) == b"from asyncio"
            io.call(client.close())
            with pytest.raises(WrongState):
                rt.call(client.flush())
        finally:
            assert ending is not None
            rt.main.post(ending.set_result, None)
            holder.result(10)


@asynccontextmanager
async def narrow(driver: Any, in_flight_max: int) -> AsyncIterator[Client]:
    async with serve(driver, iothread=False) as uri, connect(uri, in_flight_max=in_flight_max) as client:
        yield client


def test_bounded_and_fair() -> None:
    """Two on their way, the others in line in the order in which they came; also one that came when a place was free
    but others were in line."""
    async def main() -> None:
        driver = Gated(SIZE)
        async with narrow(driver, 2) as client:
            reads = [asyncio.ensure_future(client.read(n * 512, 512)) for n in range(6)]
            await until(lambda: len(driver.waiting) == 2)
            assert list(driver.waiting) == [0, 512]
            assert client.in_flight == 2
            reads[2].cancel()                       # in line: it is never sent
            for n in (0, 1, 3, 4, 5):
                driver.release(n * 512)
                assert len(await soon(reads[n])) == 512
                await until(lambda n=n: len(driver.waiting) == (2 if n < 4 else 5 - n))
            assert driver.begun == 5
            await soon(client.close())

    run(main())


def test_a_place_of_a_cancelled_request_is_not_lost() -> None:
    """
        server              first in line               second in line
        1 replies: a place
        2                   is given it
        3                   is cancelled before it runs
        4                                               is given it instead
    """
    async def main() -> None:
        driver = Gated(SIZE)
        async with narrow(driver, 1) as client:
            reads = [asyncio.ensure_future(client.read(n * 512, 512)) for n in range(3)]
            await until(lambda: driver.waiting)
            settle = client._settle

            def settle_and_cancel(settled: Any) -> None:
                settle(settled)
                reads[1].cancel()

            client._settle = settle_and_cancel  # type: ignore[method-assign]
            driver.release(0)
            assert len(await soon(reads[0])) == 512
            await until(lambda: 1024 in driver.waiting)
            driver.release(1024)
            assert len(await soon(reads[2])) == 512
            assert reads[1].cancelled()

    run(main())


def test_who_waits_in_line_is_told_when_the_connection_ends() -> None:
    async def main() -> None:
        async with fake_server(HELLO, NO_EXT, UNSUP, GO_ACK) as uri:
            client = await connect(uri, in_flight_max=1)
            told = await soon(asyncio.gather(*[client.read(0, 512) for _ in range(3)], return_exceptions=True))
            assert [type(error) for error in told] == [ConnectionLost] * 3
            await client.close()

    asyncio.run(main())


def test_data_of_a_cancelled_write_may_be_changed() -> None:
    """The rest of the request still goes out, as it was: the stream goes on behind it, and no junk is written."""
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        info = ServerInfo(name="", size=SIZE, flags=TransmissionFlag.HAS_FLAGS)
        client = Client(ours, info, b"")
        data = bytearray(b"x" * (1 << 20))          # more than the socket takes
        writing = asyncio.ensure_future(client.write(0, data))
        await until(lambda: client._writing)
        writing.cancel()
        await turns()
        data[:] = b"y" * len(data)
        theirs.setblocking(False)
        received = bytearray()
        while len(received) < 28 + len(data):
            received += await soon(asyncio.get_running_loop().sock_recv(theirs, 1 << 20))
        assert received[28:] == b"x" * len(data)
        assert client.in_flight == 1                # until its reply has come
        theirs.close()
        await until(lambda: "failed" in repr(client))

    asyncio.run(main())


def test_two_closes_at_once_and_one_cancelled() -> None:
    async def main() -> None:
        driver = Gated(SIZE)
        async with client_of(driver) as client:
            reading = asyncio.ensure_future(client.read(0, 512))
            await until(lambda: driver.waiting)
            first, second = (asyncio.ensure_future(client.close()) for _ in range(2))
            await turns()
            first.cancel()
            with pytest.raises(ConnectionLost, match="close"):
                await soon(reading)
            await soon(second)
            driver.release()

    run(main())
