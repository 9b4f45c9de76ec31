"""The wire that speaks TLS: it sends and receives as a socket does, whatever the kernel takes at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from homeloop.errors import PeerError, UsageError
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.sending import SendQueue
from homeloop.nbd.tls import TlsSocket, receive, send_all, watcher_of
from tests.nbd.certificates import Certificates
from tests.nbd.talking import soon, turns, until

pytestmark = pytest.mark.foreign("openssl")


class Stingy(socket.socket):
    """A socket that takes a few bytes at once, and then for a while none."""

    dice = random.Random(0)

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        if self.dice.random() < 0.3:
            raise BlockingIOError
        return super().send(data[:self.dice.randrange(1, 30_000)])


@asynccontextmanager
async def pair(certificates: Certificates, kind: type[socket.socket] = socket.socket) -> AsyncIterator[list[TlsSocket]]:
    """The two ends of a connection, after their handshake."""
    loop = asyncio.get_running_loop()
    ends = []
    for sock, server in zip(socket.socketpair(), (True, False), strict=True):
        sock = kind(fileno=sock.detach())
        sock.setblocking(False)
        if server:
            context = TlsCredentials.for_server(certificates.all).server_context()
        else:
            context = TlsCredentials.for_client(certificates.all).client_context(check_hostname=False)
        ends.append(TlsSocket(sock, context, server_side=server))
    try:
        await soon(asyncio.gather(*(end.handshake(loop) for end in ends)))
        yield ends
    finally:
        for end in ends:
            end.close()
            end.close()     # twice is fine


def received(wire: TlsSocket, size: int = 1 << 16) -> bytes | None:
    """What is there; None: nothing yet."""
    target = memoryview(bytearray(size))
    try:
        return bytes(target[:wire.recvmsg_into([target])[0]])
    except BlockingIOError:
        return None


def test_pieces_arrive_whatever_the_kernel_takes(certificates: Certificates, seed: int) -> None:
    """Nothing is lost or doubled, and nothing counts as sent before the kernel has it."""
    async def main() -> None:
        dice = Stingy.dice = random.Random(seed)
        async with pair(certificates, Stingy) as (one, other):
            out = SendQueue()
            expected, found = bytearray(), bytearray()
            for _ in range(40):
                for _ in range(dice.randrange(20)):
                    piece = dice.randbytes(dice.choice([0, 1, 28, 4096, 16384, 70_000, 300_000]))
                    expected += piece
                    out.append(memoryview(piece) if dice.random() < 0.5 else piece)
                before = out.sent_bytes + out.unsent_bytes
                done = out.send(one)
                assert done == (not out.pieces)
                assert out.sent_bytes + out.unsent_bytes == before
                if dice.random() < 0.5:
                    while part := received(other, dice.choice([1, 1000, 1 << 20])):
                        found += part
            while len(found) < len(expected):
                out.send(one)
                while part := received(other):
                    found += part
            assert found == expected
            assert out.unsent_bytes == 0
            assert not one._unsent

    asyncio.run(main())


def test_nothing_counts_as_sent_while_it_is_held_here(certificates: Certificates) -> None:
    async def main() -> None:
        async with pair(certificates) as (one, other):
            data = bytes(8 << 20)
            out = SendQueue()
            out.append(data)
            assert not out.send(one)
            assert 0 < out.unsent_bytes < len(data)
            with pytest.raises(BlockingIOError):
                one.sendmsg(out.pieces)
            held = out.unsent_bytes
            assert held == len(data) - out.sent_bytes
            taken = 0
            while taken < len(data):
                taken += len(received(other, 1 << 20) or b"")
                out.send(one)
            assert out.unsent_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("sending", [False, True])
def test_answers_that_are_not_read(certificates: Certificates, sending: bool) -> None:
    """OpenSSL's own, to key updates: Python cannot ask for one, so they are put where OpenSSL puts them."""
    async def main() -> None:
        async with pair(certificates) as (one, other):
            if sending:
                with pytest.raises(BlockingIOError):
                    while one.sendmsg([bytes(1 << 20)]):
                        pass
            else:
                with contextlib.suppress(BlockingIOError):
                    while one._sock.send(bytes(1 << 16)):
                        pass
            with pytest.raises(PeerError, match="does not read"):
                for _ in range(1 << 10):
                    one._outgoing.write(bytes(1 << 10))
                    await send_all(asyncio.get_running_loop(), other, b"x")
                    assert received(one) == b"x"

    asyncio.run(main())


def test_targets_are_filled_in_turn(certificates: Certificates) -> None:
    async def main() -> None:
        async with pair(certificates) as (one, other):
            await send_all(asyncio.get_running_loop(), one, b"abcdefgh")
            first, second = memoryview(bytearray(3)), memoryview(bytearray(2))
            assert other.recvmsg_into([first, second]) == (5,)
            assert bytes(first) + bytes(second) == b"abcde"
            assert other.has_more
            assert received(other) == b"fgh"
            assert not other.has_more
            assert received(other) is None

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_the_watcher_sees_what_is_decrypted(certificates: Certificates, size: int) -> None:
    """One record, fetched in small parts, while the socket has no byte more; others run in between."""
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with pair(certificates) as (one, other):
            found: list[bytes] = []
            watch = watcher_of(loop, other)

            def on_readable() -> None:
                part = received(other, size)
                if part:
                    found.append(part)

            watch.add_reader(other, on_readable)
            await send_all(loop, one, bytes(range(100)))
            await until(lambda: b"".join(found) == bytes(range(100)))
            await send_all(loop, one, bytes(10))
            await until(lambda: b"".join(found)[100:])
            watch.remove_reader(other)
            count = len(found)
            await turns()
            assert len(found) == count      # removed: also for what is decrypted
            watch.add_reader(other, on_readable)
            await until(lambda: b"".join(found)[100:] == bytes(10))
            watch.remove_reader(other)

    asyncio.run(main())


def test_a_plain_socket_is_watched_by_its_loop() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair()
        with one, other:
            one.setblocking(False)
            other.setblocking(False)
            assert watcher_of(loop, one) is loop
            await send_all(loop, one, b"abc")
            assert await soon(receive(loop, other, 10)) == b"abc"

    asyncio.run(main())


def test_o5_the_end_of_the_stream(certificates: Certificates) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with pair(certificates) as (one, other):
            await send_all(loop, one, b"last")
            one.close()
            assert one.fileno() < 0
            assert received(other) == b"last"
            assert received(other) == b""
            assert received(other) == b""
        async with pair(certificates) as (one, other):      # without a word
            one._sock.close()
            assert received(other) == b""
            assert await soon(receive(loop, other, 10)) == b""

    asyncio.run(main())


def test_bytes_that_were_changed(certificates: Certificates) -> None:
    async def main() -> None:
        async with pair(certificates) as (one, other):
            one._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
            with pytest.raises(PeerError, match="TLS: "):
                received(other)

    asyncio.run(main())


def test_no_certificate_no_handshake(certificates: Certificates) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair()
        one.setblocking(False)
        other.setblocking(False)
        server = TlsSocket(one, TlsCredentials.for_server(certificates.stranger).server_context(), server_side=True)
        trusting = TlsCredentials.for_client(certificates.all)
        with pytest.raises(UsageError, match="host ''"):
            TlsSocket(other, trusting.client_context(check_hostname=True), server_side=False, hostname="")
        client = TlsSocket(
            other, trusting.client_context(check_hostname=True), server_side=False, hostname="localhost"
        )
        ends = await soon(asyncio.gather(server.handshake(loop), client.handshake(loop), return_exceptions=True))
        assert [type(end) for end in ends] == [PeerError, PeerError]
        assert "CERTIFICATE_VERIFY_FAILED" in str(ends[1])
        server.close()
        client.close()

    asyncio.run(main())
