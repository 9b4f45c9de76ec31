"""The server: who may come in, where requests run, how exports and the server end."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.current import current_context
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.errors import BlockError, PeerError, WrongState, WrongThread
from homeloop.nbd.client import connect
from homeloop.nbd.handshake import HandshakeLimits
from homeloop.nbd.server import Server, ServerLimits
from homeloop.nbd.uri import parse_uri
from tests.nbd import wire
from tests.nbd.talking import Gated, RawClient, soon, until

SIZE = 1 << 20
LOGGER = "homeloop.nbd.server"


@asynccontextmanager
async def serving(path: Path, *devices: Any, **limits: Any) -> AsyncIterator[Server]:
    """A server with exports disk0, disk1..., all at home in the server's context."""
    server = Server(AioContext.of(), limits=ServerLimits(**limits), name="test")
    try:
        for number, driver in enumerate(devices):
            await server.add_export(f"disk{number}", Device(driver))
        await server.listen(path / "s")
        yield server
    finally:
        await soon(server.close())


async def raw(server: Server, *, flags: bool = True) -> RawClient:
    """A client that has read the greeting and, if wanted, sent its flags."""
    client = RawClient(socket.socket(socket.AF_UNIX))
    path = parse_uri(server.uri()).socket
    assert path is not None
    await soon(asyncio.get_running_loop().sock_connect(client.sock, path))
    if flags:
        assert await client.receive(18) == b"NBDMAGICIHAVEOPT\0\x03"
        await client.send(wire.client_flags())
    return client


async def entered(server: Server, name: str) -> RawClient:
    """A client in transmission."""
    client = await raw(server)
    await client.send(wire.info(wire.GO, name))
    answers = wire.option_answers(await client.receive(2 * 20 + 12))
    assert answers[-1].kind == wire.ACK
    return client


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_several_exports_and_their_homes(tmp_path: Path) -> None:
    seen: dict[str, set[object]] = {"a": set(), "b": set()}

    class Where(Memory):
        def __init__(self, name: str) -> None:
            super().__init__(SIZE)
            self.name = name

        def read(self, offset: int, length: int) -> Any:
            seen[self.name].add((current_context(), threading.current_thread().name))
            return super().read(offset, length)

    async def main() -> None:
        with IOThread("io-a") as a, IOThread("io-b") as b:
            server = Server(AioContext.of())
            await server.add_export("a", Device(Where("a")), a.context, description="first")
            await server.add_export("b", Device(Where("b")), b.context)
            await server.listen(tmp_path / "s")
            for name in ("a", "b"):
                async with connect(server.uri(name)) as client:
                    assert await client.read(0, 512) == bytes(512)
            await until(lambda: server.statistics().connections == 0)
            await server.close()
            assert seen == {"a": {(a.context, "io-a")}, "b": {(b.context, "io-b")}}

    run(main())


def test_li1_list(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE), Memory(SIZE)) as server:
            client = await raw(server)
            await client.send(wire.option(wire.LIST) + wire.option(wire.ABORT))
            kinds = [answer.kind for answer in wire.option_answers(await client.ended())]
            assert kinds == [wire.SERVER, wire.SERVER, wire.ACK, wire.ACK]

    run(main())


def test_in10_requests_sent_behind_go(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server:
            client = await raw(server)
            await client.send(wire.info(wire.GO, "disk0") + wire.request(wire.READ, 5, 0, 512))
            await client.receive(2 * 20 + 12)
            assert (await client.reply(512)).cookie == 5
            client.close()

    run(main())


def test_en1_unknown_export(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server:
            client = await raw(server)
            await client.send(wire.option(wire.EXPORT_NAME, b"no"))
            assert await client.ended() == b""
            with pytest.raises(BlockError) as caught:
                await connect(server.uri("no"))
            assert caught.value.errno == errno.ENOENT

    run(main())
    assert len(logged(caplog)) == 1
    assert "'no'" in logged(caplog)[0]


@pytest.mark.parametrize("data", [b"GET / HTTP/1.0\r\n\r\n", wire.client_flags(4), wire.client_flags() + bytes(16)])
def test_malformed_handshake_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server, connect(server.uri("disk0")) as other:
            client = await raw(server, flags=False)
            await client.send(data)
            assert (await client.ended())[18:] == b""
            assert await other.read(0, 512) == bytes(512)
            await until(lambda: server.statistics().failed == 1)

    run(main())
    assert len(logged(caplog)) == 1
    assert "client 2" in logged(caplog)[0]


def test_malformed_request_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server, connect(server.uri("disk0")) as other:
            client = await entered(server, "disk0")
            await client.send(bytes(28))
            assert await client.ended() == b""
            assert await other.read(0, 512) == bytes(512)
            await until(lambda: server.statistics().connections == 1)
            assert server.statistics().failed == 1

    run(main())
    (line,) = logged(caplog)
    assert "client 2" in line
    assert "'disk0'" in line
    assert "magic is 0x00000000" in line


def test_our_own_mistake_is_logged_with_its_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        device: Any = Device(Memory(SIZE))
        device.read = lambda offset, length, caller: 1 // 0
        server = Server(AioContext.of())
        await server.add_export("", device)
        await server.listen(tmp_path / "s")
        async with connect(server.uri()) as client:
            with pytest.raises(PeerError, match="closed the connection"):
                await client.read(0, 512)
        await server.close()

    run(main())
    (record,) = [record for record in caplog.records if record.name == LOGGER]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_client_that_goes_during_the_handshake_is_no_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server:
            for data in (b"", wire.client_flags()[:2], wire.client_flags() + wire.option(wire.LIST)[:9]):
                client = await raw(server, flags=False)
                await client.receive(18)
                await client.send(data)
                client.close()
            await until(lambda: server.statistics().accepted == 3 and server.statistics().handshakes == 0)

    run(main())
    assert logged(caplog) == []


def test_connection_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE), connections_max=2) as server:
            served, shaking = await entered(server, "disk0"), await raw(server)
            third = await raw(server, flags=False)
            assert await third.ended() == b""
            assert server.statistics().refused == 1
            shaking.close()
            await until(lambda: server.statistics().handshakes == 0)
            fourth = await entered(server, "disk0")
            fourth.close()
            served.close()

    run(main())
    (line,) = logged(caplog)
    assert "2 clients are here" in line


def test_handshake_time_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE), handshake_s=0.02) as server:
            client = await raw(server)
            assert await client.ended() == b""
            served = await raw(server)
            await served.send(wire.info(wire.GO, "disk0"))
            await served.receive(2 * 20 + 12)
            await asyncio.sleep(0.05)       # tidy: allow sleep: that the limit is over changes nothing here
            await served.send(wire.request(wire.READ, 1, 0, 512))
            assert (await served.reply(512)).cookie == 1
            served.close()

    run(main())
    (line,) = logged(caplog)
    assert "0.02 s" in line


def test_handshakes_that_go_nowhere_keep_nobody_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Slowloris: each holds a place until its time is up. The one that has been at it for the longest makes room."""
    async def main() -> None:
        limits = {"connections_max": 3, "handshake_s": 600.0, "handshake_grace_s": 0.0}
        async with serving(tmp_path, Memory(SIZE), **limits) as server:
            slow = [await raw(server) for _ in range(3)]
            await slow[1].send(wire.option(wire.LIST)[:5])
            async with connect(server.uri("disk0")) as client:
                assert await client.read(0, 512) == bytes(512)
                assert await slow[0].ended() == b""
                more = [await raw(server) for _ in range(4)]
                assert await more[0].ended() == b""
                await until(lambda: server.statistics().handshakes == 2)
                assert await client.read(0, 512) == bytes(512)
            for other in (*slow, *more):
                other.close()
            assert server.statistics().refused == 0

    run(main())
    assert len(logged(caplog)) == 5
    assert "client 1 " in logged(caplog)[0]
    assert "cut off in its handshake" in logged(caplog)[0]


def test_tcp_connections_find_out_when_the_other_end_is_gone() -> None:
    async def main() -> None:
        server = Server(AioContext.of())
        await server.add_export("disk", Device(Memory(SIZE)))
        await server.listen(("127.0.0.1", 0))
        async with connect(server.uri("disk")):
            (connection,) = server._exports["disk"].connections
            sock: Any = connection._sock
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 300
        await server.close()

    run(main())


def test_a_client_that_does_not_read_its_lists(tmp_path: Path) -> None:
    """Each LIST costs it 16 bytes and us far more: answers are sent one by one, not gathered."""
    async def main() -> None:
        limits = HandshakeLimits(options_max=100_000)
        async with serving(tmp_path, *[Memory(512)] * 100, handshake_s=0.3, handshake=limits) as server:
            client = await raw(server)
            sending = asyncio.ensure_future(client.send(wire.option(wire.LIST) * 50_000))
            with pytest.raises(ConnectionError):        # the time limit of the handshake
                await sending
            assert len(await client.ended()) < 2 << 20
            await until(lambda: server.statistics().handshakes == 0)

    run(main())


def test_no_file_descriptors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """accept() fails, and the socket stays readable: one line and a pause, no spinning; then it goes on."""
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE), accept_pause_s=0.05) as server:
            client = RawClient(socket.socket(socket.AF_UNIX))
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                client.sock.connect(str(tmp_path / "s"))
                await until(lambda: logged(caplog))
                rounds = len(logged(caplog))
                for _ in range(100):
                    await asyncio.sleep(0)
                assert len(logged(caplog)) <= rounds + 1
                assert server.statistics().accepted == 0
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert await client.receive(8) == b"NBDMAGIC"
            client.close()

    run(main())
    assert "cannot accept" in logged(caplog)[0]


# Ends


def test_remove_export_drains(tmp_path: Path) -> None:
    async def main() -> None:
        driver = Gated()
        async with serving(tmp_path, driver, Memory(SIZE)) as server:
            client = await entered(server, "disk0")
            await client.send(wire.request(wire.READ, 1, 0, 512))
            await until(lambda: driver.waiting)
            removing = asyncio.ensure_future(server.remove_export("disk0"))
            with pytest.raises(BlockError, match="ERR_UNKNOWN"):
                await connect(server.uri("disk0"))
            assert not removing.done()
            driver.release()
            assert await client.ended() == wire.simple_reply(1, 0, bytes(512))
            await soon(removing)
            async with connect(server.uri("disk1")) as other:
                assert await other.read(0, 512) == bytes(512)
            with pytest.raises(WrongState, match="no export named 'disk0'"):
                await server.remove_export("disk0")
            await server.add_export("disk0", Device(Memory(512)))

    run(main())


def test_f3_o6_close(tmp_path: Path) -> None:
    """Requests in flight are finished; who shakes hands is told; nobody can come in; the file is gone."""
    async def main() -> None:
        driver = Gated()
        async with serving(tmp_path, driver) as server:
            client = await entered(server, "disk0")
            await client.send(wire.request(wire.READ, 1, 0, 512))
            shaking, silent = await raw(server), await raw(server)
            await until(lambda: driver.waiting and server.statistics().handshakes == 2)
            closing = asyncio.ensure_future(server.close())
            await asyncio.sleep(0)
            await shaking.send(wire.info(wire.GO, "disk0") + wire.option(wire.ABORT))
            kinds = [answer.kind for answer in wire.option_answers(await shaking.ended())]
            assert kinds == [wire.SHUTDOWN, wire.ACK]
            assert not (tmp_path / "s").exists()
            assert not closing.done()
            driver.release()
            assert await client.ended() == wire.simple_reply(1, 0, bytes(512))
            await soon(closing)
            assert await silent.ended() == b""
            with pytest.raises(WrongState):
                await server.listen(tmp_path / "s")
            with pytest.raises(WrongState):
                await server.add_export("x", Device(Memory(512)))

    run(main())


def test_close_twice_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        driver = Gated()
        async with serving(tmp_path, driver) as server:
            client = await entered(server, "disk0")
            await client.send(wire.request(wire.READ, 1, 0, 512))
            await until(lambda: driver.waiting)
            both = asyncio.gather(server.close(), server.close())
            await asyncio.sleep(0)
            driver.release()
            await soon(both)
            client.close()

    run(main())


def test_close_with_a_handshake_that_has_not_begun(tmp_path: Path) -> None:
    """Its coroutine is cancelled before its first step; its socket must be closed all the same."""
    async def main() -> None:
        server = Server(AioContext.of())
        await server.listen(tmp_path / "s")
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "s"))
        await until(lambda: server.statistics().accepted)
        await soon(server.close())
        raw_client = RawClient(client)
        assert (await raw_client.ended())[18:] == b""
        raw_client.close()

    run(main())


def test_export_whose_context_has_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = Server(AioContext.of())
        with IOThread("short") as io:
            await server.add_export("x", Device(Memory(SIZE)), io.context)
        await server.listen(tmp_path / "s")
        with pytest.raises(PeerError):
            async with connect(server.uri("x")) as client:
                await client.read(0, 512)
        await soon(server.close())

    run(main())
    assert "has ended" in logged(caplog)[0]


def test_export_whose_context_ends_under_its_clients(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(AioContext.of())
        await server.listen(tmp_path / "s")
        with IOThread("short") as io:
            await server.add_export("x", Device(Memory(SIZE)), io.context)
            client = await entered(server, "x")
        await soon(server.close())
        assert await client.ended() == b""
        assert server.statistics().failed == 1

    run(main())


# Counts, threads, addresses


class HalfBad(Memory):
    """Cannot read its second half."""

    def read(self, offset: int, length: int) -> Any:
        if offset >= self.size // 2:
            raise OSError(errno.EIO, "scratched")
        return super().read(offset, length)


def test_statistics(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, HalfBad(SIZE), Memory(SIZE)) as server:
            async with connect(server.uri("disk0")) as client:
                await client.write(0, bytes(1000))
                await client.read(0, 2000)
                with pytest.raises(BlockError) as caught:
                    await client.read(1 << 19, 600)
                text = caught.value.text.partition("the server says ")[2]
                export = server.statistics().exports[0]
                assert (export.requests, export.errors, len(export.connections)) == (3, 1, 1)
            await until(lambda: server.statistics().connections == 0)
            now = server.statistics()
            export = now.exports[0]
            assert (now.accepted, now.refused, now.failed, now.handshakes) == (1, 0, 0, 0)
            assert (export.requests, export.errors, export.clients, export.connections) == (4, 1, 1, ())
            assert export.received_bytes == 4 * 32 + 1000       # extended headers
            assert export.sent_bytes == 32 + (40 + 2000) + (38 + len(text))
            assert (export.device.reads, export.device.written_bytes) == (1, 1000)
            assert now.uris == (server.uri(),)

    run(main())


def test_other_threads_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(AioContext.of())
        with IOThread("io") as io:
            for method in (server.close, lambda: server.remove_export("x"), lambda: server.listen(tmp_path / "s")):
                with pytest.raises(WrongThread, match=r"context\.run"):
                    await io.run(method())
        await server.close()

    run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tcp(host: str) -> None:
    async def main() -> None:
        server = Server(AioContext.of())
        await server.add_export("a b", Device(Memory(SIZE)))
        uri = await server.listen((host, 0), export="a b")
        assert uri.startswith(f"nbd://{host}:")
        assert uri.endswith("/a%20b")
        async with connect(uri) as client:
            await client.write(0, b"tcp")
            assert await client.read(0, 3) == b"tcp"
        await server.close()

    run(main())


def test_names_are_taken_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server:
            with pytest.raises(WrongState, match="'disk0' already"):
                await server.add_export("disk0", Device(Memory(SIZE)))

    run(main())


def test_b1_it_runs_on_a_loop_of_another_make(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server:
            client = await entered(server, "disk0")
            await client.send(struct.pack(">IHHQQI", 0x25609513, 0, wire.DISC, 0, 0, 0))
            assert await client.ended() == b""

    asyncio.run(main())
