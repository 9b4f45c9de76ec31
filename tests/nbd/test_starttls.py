"""STARTTLS, rule by rule (T1 to T14, O5, O9 of the checklist): both handshakes, and the server that runs them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.errors import BlockError, PeerError, UsageError
from homeloop.nbd.client import connect
from homeloop.nbd.client_handshake import ClientHandshake, ClientTurn, Refused
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.handshake import Agreed, Ended, Negotiated, TlsMode
from homeloop.nbd.server import Server, ServerLimits
from homeloop.nbd.serving import serve
from homeloop.nbd.tls import TlsSocket
from homeloop.nbd.uri import parse_uri
from tests.nbd import wire
from tests.nbd.certificates import Certificates
from tests.nbd.talking import RawClient, soon, until
from tests.nbd.test_client import fake_server
from tests.nbd.test_client_handshake import reply
from tests.nbd.test_handshake import DISK, OTHER, Talk

SIZE = 1 << 20
SECRET = replace(DISK, name="secret", tls_only=True)
STARTTLS = wire.option(wire.STARTTLS)
HELLO = b"NBDMAGICIHAVEOPT\0\3"


class TlsTalk(Talk):
    """One handshake with a server that has TLS."""

    def __init__(self, mode: TlsMode) -> None:
        super().__init__({"disk": DISK, "other": OTHER, "secret": SECRET}, tls=mode)

    def begin_tls(self) -> None:
        assert self.say_kinds(STARTTLS) == [wire.ACK]


EVERY = [
    *(wire.option(number) for number in (wire.LIST, wire.PEEK, wire.STRUCTURED, wire.EXT, 12, 0x7654321)),
    wire.info(wire.INFO, "disk"), wire.info(wire.GO, "disk"), wire.info(wire.GO, "none"),
    wire.meta(wire.LIST_META, "disk"), wire.meta(wire.SET_META, "disk", ("base:allocation",)),
    wire.option(wire.GO, b"malformed"), wire.option(wire.LIST, b"x"),
]


def test_t1_t2_notls_never_says_that_tls_is_required() -> None:
    talk = TlsTalk(TlsMode.NONE)
    assert talk.say_kinds(STARTTLS) == [wire.UNSUP]
    for option in EVERY:
        assert wire.TLS_REQD not in TlsTalk(TlsMode.NONE).say_kinds(option)


@pytest.mark.parametrize("mode", [TlsMode.SELECTIVE, TlsMode.REQUIRED])
def test_t3_starttls_is_acknowledged_once_and_has_no_data(mode: TlsMode) -> None:
    talk = TlsTalk(mode)
    assert talk.say_kinds(wire.option(wire.STARTTLS, b"x")) == [wire.INVALID]
    assert talk.secure == 0
    talk.begin_tls()
    assert talk.secure == 1
    assert talk.say_kinds(STARTTLS) == [wire.INVALID]
    assert talk.secure == 1
    assert talk.say_kinds(wire.info(wire.GO, "secret"))[-1] == wire.ACK
    assert talk.end == Negotiated(export=SECRET, leftover=b"")


def test_t5_forcedtls_wants_it_for_everything() -> None:
    for option in EVERY:
        assert TlsTalk(TlsMode.REQUIRED).say_kinds(option) == [wire.TLS_REQD]
    talk = TlsTalk(TlsMode.REQUIRED)
    talk.feed([wire.option(wire.EXPORT_NAME, b"disk")])
    assert talk.sent == b""
    assert talk.end == Ended("EXPORT_NAME before STARTTLS")
    talk = TlsTalk(TlsMode.REQUIRED)
    assert talk.say_kinds(wire.option(wire.ABORT)) == [wire.ACK]
    assert talk.end == Ended()


def test_t6_t13_selectivetls_wants_it_for_exports_that_are_for_it() -> None:
    talk = TlsTalk(TlsMode.SELECTIVE)
    listed = [answer.data[4:10] for answer in talk.say(wire.option(wire.LIST)) if answer.kind == wire.SERVER]
    assert listed == [b"diska ", b"other"]
    assert talk.say_kinds(wire.info(wire.INFO, "secret")) == [wire.TLS_REQD]
    assert talk.say_kinds(wire.info(wire.GO, "secret")) == [wire.TLS_REQD]
    assert talk.say_kinds(wire.info(wire.GO, "none")) == [wire.UNKNOWN]
    talk.say(wire.option(wire.STRUCTURED))
    assert talk.say_kinds(wire.meta(wire.SET_META, "secret", ("base:allocation",))) == [wire.POLICY]
    assert talk.say_kinds(wire.info(wire.GO, "disk"))[-1] == wire.ACK
    talk = TlsTalk(TlsMode.SELECTIVE)
    talk.feed([wire.option(wire.EXPORT_NAME, b"secret")])
    assert talk.sent == b""
    assert isinstance(talk.end, Ended)
    assert "without TLS" in talk.end.reason


@pytest.mark.parametrize("mode", [TlsMode.SELECTIVE, TlsMode.REQUIRED])
def test_t7_never_required_within_tls(mode: TlsMode) -> None:
    for option in [*EVERY, wire.info(wire.INFO, "secret"), wire.meta(wire.LIST_META, "secret")]:
        talk = TlsTalk(mode)
        talk.begin_tls()
        kinds = talk.say_kinds(option)
        assert kinds
        assert wire.TLS_REQD not in kinds
    talk = TlsTalk(mode)
    talk.begin_tls()
    assert talk.say_kinds(wire.option(wire.LIST)).count(wire.SERVER) == 3


def test_t7_no_information_with_the_refusal() -> None:
    assert [answer.kind for answer in TlsTalk(TlsMode.REQUIRED).say(wire.info(wire.GO, "disk"))] == [wire.TLS_REQD]


@pytest.mark.parametrize("headers", [wire.STRUCTURED, wire.EXT])
def test_o9_nothing_survives_starttls(headers: int) -> None:
    """What was agreed in clear may have been asked for by anybody."""
    talk = TlsTalk(TlsMode.SELECTIVE)
    assert talk.say_kinds(wire.option(headers)) == [wire.ACK]
    talk.say(wire.meta(wire.SET_META, "disk", ("base:allocation",)))
    talk.begin_tls()
    assert talk.say_kinds(wire.meta(wire.LIST_META, "disk")) == [wire.INVALID]
    talk.say(wire.info(wire.GO, "disk"))
    assert talk.end == Negotiated(export=DISK, leftover=b"", agreed=Agreed())


@pytest.mark.parametrize("behind", [wire.info(wire.GO, "disk"), b"\x16\x03\x01", b"x"])
def test_t14_bytes_in_clear_behind_starttls(behind: bytes) -> None:
    talk = TlsTalk(TlsMode.SELECTIVE)
    with pytest.raises(PeerError, match="in clear behind STARTTLS"):
        talk.say(STARTTLS + behind)
    assert talk.secure == 0
    assert talk.handshake.next_turn() is None


def test_o6_a_server_that_shuts_down_starts_nothing() -> None:
    talk = TlsTalk(TlsMode.REQUIRED)
    talk.handshake.shutting_down = True
    assert talk.say_kinds(STARTTLS) == [wire.SHUTDOWN]


# The client's side


def client_turns(*says: bytes) -> list[ClientTurn]:
    handshake = ClientHandshake("disk", tls=True)
    turns: list[ClientTurn] = []
    for data in says:
        handshake.feed(data)
        while (turn := handshake.next_turn()) is not None:
            turns.append(turn)
    return turns


def test_t8_t10_o9_the_client_asks_for_tls_before_anything_else() -> None:
    first, second = client_turns(HELLO, reply(wire.ACK, number=wire.STARTTLS))
    assert first == ClientTurn(wire.client_flags() + STARTTLS)
    assert second == ClientTurn(wire.option(wire.EXT), starttls=True)   # in TLS


@pytest.mark.parametrize("kind", [wire.UNSUP, wire.POLICY, wire.SHUTDOWN])
def test_t9_t10_the_client_leaves_if_tls_is_refused(kind: int) -> None:
    turns = client_turns(HELLO, reply(kind, b"not today", number=wire.STARTTLS))
    assert turns[-1].data == wire.option(wire.ABORT)
    assert turns[-1].end == Refused(reply=kind, text="no TLS: not today")


def test_t14_the_client_believes_nothing_in_clear_behind_the_reply() -> None:
    injected = reply(wire.ACK, number=wire.EXT)
    with pytest.raises(PeerError, match="20 bytes in clear behind the reply to STARTTLS"):
        client_turns(HELLO, reply(wire.ACK, number=wire.STARTTLS) + injected)


def test_t8_a_reply_that_is_none() -> None:
    with pytest.raises(PeerError, match="reply type 2 to STARTTLS"):
        client_turns(HELLO, reply(wire.SERVER, number=wire.STARTTLS))


# Servers that run


needs_openssl = pytest.mark.foreign("openssl")


@asynccontextmanager
async def serving(
    folder: Path, tls: TlsCredentials | None, *, limits: ServerLimits | None = None, required: bool = True
) -> AsyncIterator[Server]:
    """A server with two exports, the second for TLS only; at home elsewhere."""
    with IOThread("io") as io:
        server = Server(AioContext.of(), limits=limits, tls=tls, tls_required=required)
        for name in ("open", "secret"):
            device = Device(Memory(SIZE))
            await server.add_export(name, device, io.context, tls_only=name == "secret" and tls is not None)
        await server.listen(folder / "s")
        try:
            yield server
        finally:
            await server.close()


async def raw(folder: Path) -> RawClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(folder / "s"))
    client = RawClient(sock)
    assert len(await client.receive(18)) == 18
    await client.send(wire.client_flags())
    return client


async def started(folder: Path, credentials: TlsCredentials) -> TlsSocket:
    """A client that has gone through STARTTLS."""
    client = await raw(folder)
    await client.send(STARTTLS)
    assert wire.option_answers(await client.receive(20))[0].kind == wire.ACK
    secure = TlsSocket(client.sock, credentials.client_context(check_hostname=False), server_side=False)
    await soon(secure.handshake(asyncio.get_running_loop()))
    return secure


@needs_openssl
def test_t3_t12_served_at_the_exports_home(certificates: Certificates, tmp_path: Path) -> None:
    """The session begins in the server's context and goes on in another thread; data both ways, large and small."""
    async def main() -> None:
        async with serving(tmp_path, TlsCredentials.for_server(certificates.all)) as server:
            uri = server.uri("secret")
            assert uri.startswith("nbds+unix:///secret?socket=")
            async with connect(uri, tls=TlsCredentials.for_client(certificates.anonymous)) as client:
                data = bytes(range(256)) * 4096
                await soon(client.write(0, data))
                await soon(asyncio.gather(*(client.write(i, b"%7d" % i) for i in range(0, 7000, 7))))
                data = b"".join(b"%7d" % i for i in range(0, 7000, 7)) + data[7000:]
                assert await soon(client.read(0, SIZE)) == data
                parts = await soon(asyncio.gather(*(client.read(i, 4096) for i in range(0, SIZE, 4096))))
                assert b"".join(parts) == data
            await until(lambda: server.statistics().connections == 0)
            now = server.statistics()
            assert (now.failed, now.accepted) == (0, 1)
            assert now.exports[1].received_bytes > SIZE

    run(main())


@needs_openssl
def test_t6_selective(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        credentials = TlsCredentials.for_server(certificates.all)
        async with serving(tmp_path, credentials, required=False) as server:
            assert server.uri("open").startswith("nbd+unix:///open")
            async with connect(server.uri("open")) as client:
                assert await client.read(0, 4) == bytes(4)
            with pytest.raises(BlockError, match="ERR_TLS_REQD"):
                await connect(server.uri("secret").replace("nbds", "nbd"))
            async with connect(server.uri("secret"), tls=TlsCredentials.for_client(certificates.all)) as client:
                assert await client.read(0, 4) == bytes(4)

    run(main())


def test_tls_only_without_credentials(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(AioContext.of())
        with pytest.raises(UsageError, match="has no TLS credentials"):
            await server.add_export("x", Device(Memory(SIZE)), tls_only=True)
        await server.close()

    run(main())


async def _gone(server: Server) -> None:
    await until(lambda: not (server.statistics().handshakes or server.statistics().connections))


@needs_openssl
@pytest.mark.parametrize("garbage", [
    b"GET / HTTP/1.1\r\n\r\n" + bytes(100), wire.info(wire.GO, "open"), b"\x16\x03\x01\x02\x00" + bytes(512),
    b"\x15\x03\x03\x00\x02\x02\x28", b"\xff" * 70000,
])
def test_t4_t14_a_failed_handshake_ends_the_session(
    certificates: Certificates, tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what was sent in clear behind STARTTLS and came too late to be seen there: no TLS, and never an option."""
    async def main() -> None:
        async with serving(tmp_path, TlsCredentials.for_server(certificates.all), required=False) as server:
            client = await raw(tmp_path)
            await client.send(STARTTLS)
            assert wire.option_answers(await client.receive(20))[0].kind == wire.ACK
            try:
                await client.send(garbage)
            except OSError:
                pass        # the server has seen enough
            answer = await client.ended()
            assert b"\x00\x03\xe8\x89\x04\x55\x65\xa9" not in answer
            await _gone(server)
            assert server.statistics().failed == 1

    run(main())
    assert "the TLS handshake failed" in caplog.text


@needs_openssl
def test_t14_o9_injected_options_are_never_heard(certificates: Certificates, tmp_path: Path) -> None:
    """CVE-2021-3716: in one segment with STARTTLS."""
    async def main() -> None:
        async with serving(tmp_path, TlsCredentials.for_server(certificates.all), required=False) as server:
            client = await raw(tmp_path)
            await client.send(STARTTLS + wire.option(wire.STRUCTURED) + wire.info(wire.GO, "open"))
            assert await client.ended() == b""
            await _gone(server)
            assert server.statistics().failed == 1
            # In turn: what was agreed before is gone, as the server's answers show.
            client = await raw(tmp_path)
            await client.send(wire.option(wire.STRUCTURED))
            assert wire.option_answers(await client.receive(20))[0].kind == wire.ACK
            await client.send(STARTTLS)
            await client.receive(20)
            context = TlsCredentials.for_client(certificates.all).client_context(check_hostname=False)
            secure = TlsSocket(client.sock, context, server_side=False)
            loop = asyncio.get_running_loop()
            await soon(secure.handshake(loop))
            await secure.sendall(loop, wire.info(wire.GO, "open"))
            answers = wire.option_answers(await soon(secure.recv(loop, 4096)))
            assert struct.unpack(">HQH", answers[0].data)[2] & 0x80 == 0       # no DF
            secure.close()

    run(main())


@needs_openssl
def test_the_time_of_the_handshake_covers_tls(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        limits = ServerLimits(handshake_s=0.3)
        async with serving(tmp_path, TlsCredentials.for_server(certificates.all), limits=limits) as server:
            client = await raw(tmp_path)
            await client.send(STARTTLS)
            await client.receive(20)
            await client.send(b"\x16\x03\x01\x02\x00\x01")      # the beginning of a ClientHello
            assert await client.ended() == b""
            await _gone(server)

    run(main())
    assert "no handshake in 0.3 s" in caplog.text


@needs_openssl
def test_o5_f1_the_server_closes_tls_before_the_socket(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        for last in (wire.request(wire.DISC), None):
            async with serving(tmp_path, TlsCredentials.for_server(certificates.all)) as server:
                secure = await started(tmp_path, TlsCredentials.for_client(certificates.all))
                await secure.sendall(loop, wire.info(wire.GO, "open"))
                await soon(secure.recv(loop, 4096))
                if last is not None:
                    await secure.sendall(loop, wire.request(wire.READ, 1, 0, 4) + last)
                    assert await soon(secure.recv(loop, 100)) == wire.simple_reply(1, 0, bytes(4))
                else:
                    await server.remove_export("open")
                assert await soon(secure.recv(loop, 100)) == b""
                assert secure._tls.read(1) == b""       # of a socket that is closed and no more: SSLEOFError
                secure.close()

    run(main())


@needs_openssl
def test_what_is_decrypted_does_not_get_stuck(certificates: Certificates, tmp_path: Path) -> None:
    """More requests in one record than the server looks at in one turn, and no byte more on the socket."""
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(tmp_path, TlsCredentials.for_server(certificates.all)):
            secure = await started(tmp_path, TlsCredentials.for_client(certificates.all))
            await secure.sendall(loop, wire.info(wire.GO, "open"))
            await soon(secure.recv(loop, 4096))
            # A large write makes the reader take a header alone: of the rest of the record it knows nothing.
            count = 300
            requests = wire.write(1, 0, bytes(100_000))
            requests += b"".join(wire.request(wire.READ, 2 + i, 0, 4) for i in range(count))
            requests += wire.write(9000, 0, bytes(100_000)) + wire.request(wire.READ, 9001, 0, 4)
            await secure.sendall(loop, requests)
            found = b""
            while len(found) < 16 + count * 20 + 16 + 20:
                found += await soon(secure.recv(loop, 65536))
            assert found.endswith(wire.simple_reply(9000) + wire.simple_reply(9001, 0, bytes(4)))
            secure.close()

    run(main())


@needs_openssl
def test_client_certificates(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        credentials = TlsCredentials.for_server(certificates.all, verify_peer=True)
        async with serving(tmp_path, credentials) as server:
            async with connect(server.uri("open"), tls=TlsCredentials.for_client(certificates.all)) as client:
                assert await client.read(0, 4) == bytes(4)
            strange = TlsCredentials(
                authorities=str(certificates.all / "ca-cert.pem"),
                certificate=str(certificates.stranger / "client-cert.pem"),
                key=str(certificates.stranger / "client-key.pem"),
            )
            for wrong in (TlsCredentials.for_client(certificates.anonymous), strange):
                with pytest.raises((PeerError, OSError)):
                    async with connect(server.uri("open"), tls=wrong) as client:
                        await client.read(0, 4)
            await _gone(server)
            assert server.statistics().failed == 2

    run(main())


@needs_openssl
def test_t9_the_client_wants_the_right_server(certificates: Certificates) -> None:
    async def main() -> None:
        credentials = TlsCredentials.for_server(certificates.all)
        async with serve(Memory(SIZE), tls=credentials, listen=("127.0.0.1", 0)) as uri:
            assert uri.startswith("nbds://127.0.0.1:")
            folder = f"tls-certificates={certificates.all}"
            async with connect(f"{uri}?{folder}") as client:
                assert await client.read(0, 4) == bytes(4)
            async with connect(f"{uri}?{folder}&tls-hostname=disks.example"):
                pass
            with pytest.raises(PeerError, match=r"not valid for 'other\.example'"):
                await connect(f"{uri}?{folder}&tls-hostname=other.example")
            for wrong in (f"tls-certificates={certificates.stranger}", ""):
                with pytest.raises(PeerError, match="CERTIFICATE_VERIFY_FAILED"):
                    await connect(f"{uri}?{wrong}")
            async with connect(f"{uri}?tls-verify-peer=0"):
                pass
            with pytest.raises(UsageError, match=r"'\.x'"):
                await connect(f"{uri}?{folder}&tls-hostname=.x")
            with pytest.raises(UsageError, match="there is no folder /nowhere"):
                await connect(f"{uri}?tls-certificates=/nowhere")

    run(main())


@needs_openssl
def test_t10_nbds_means_tls_or_nothing(certificates: Certificates, tmp_path: Path) -> None:
    tls = TlsCredentials.for_client(certificates.all)

    async def main() -> None:
        async with serving(tmp_path, None) as server:
            uri = server.uri("open")
            for make in (lambda: connect(uri.replace("nbd", "nbds", 1)), lambda: connect(uri, tls=tls)):
                with pytest.raises(BlockError, match="no TLS: "):
                    await make()
            await _gone(server)
            assert server.statistics().failed == 0      # it left with ABORT (O4)
        ack = struct.pack(">QIII", 0x0003E889045565A9, 5, 1, 0)
        for answer in (b"", b"this is no TLS", reply(wire.ACK, number=wire.EXT)):
            async with fake_server(HELLO, ack, answer) as uri:
                with pytest.raises(PeerError, match="the TLS handshake failed"):
                    await soon(_connected(lambda uri=uri: connect(uri, tls=tls)))

    run(main())


async def _connected(make: Callable[[], Awaitable[Any]]) -> Any:
    return await make()


@needs_openssl
def test_a_server_that_changes_a_byte_on_the_way(certificates: Certificates, tmp_path: Path) -> None:
    """Whoever is between the two: the client's requests fail, the server ends that connection, and both say why."""
    async def main() -> None:
        async with serving(tmp_path, TlsCredentials.for_server(certificates.all)) as server:
            secure = await started(tmp_path, TlsCredentials.for_client(certificates.all))
            loop = asyncio.get_running_loop()
            await secure.sendall(loop, wire.info(wire.GO, "open"))
            await soon(secure.recv(loop, 4096))
            await until(lambda: server.statistics().connections == 1)
            raw_socket = secure._sock
            await loop.sock_sendall(raw_socket, b"\x17\x03\x03\x00\x30" + bytes(48))
            with pytest.raises(PeerError, match=r"TLS: .*BAD_RECORD_MAC"):
                while await soon(secure.recv(loop, 100)):
                    pass
            await _gone(server)
            assert server.statistics().failed == 1
            secure.close()

    run(main())


has_psk = pytest.mark.skipif(not getattr(ssl, "HAS_PSK", False), reason="this Python's ssl has no pre-shared keys")


@has_psk
def test_pre_shared_keys(tmp_path: Path) -> None:
    keys, wrong = tmp_path / "keys.psk", tmp_path / "wrong.psk"
    keys.write_text("alice:" + "a1" * 32 + "\nbob:" + "b2" * 32)
    wrong.write_text("alice:" + "ff" * 32 + "\ncarol:" + "cc" * 32)

    async def main() -> None:
        async with serve(Memory(SIZE), tls=TlsCredentials.for_server(psk_file=keys)) as uri:
            for user in ("alice", "bob"):
                theirs = replace(parse_uri(uri), username=user, tls_psk_file=str(keys))
                async with connect(theirs) as client:
                    await client.write(0, user.encode())
                    assert await client.read(0, len(user)) == user.encode()
            for user in ("alice", "carol"):
                with pytest.raises((PeerError, OSError)):
                    await connect(uri, tls=TlsCredentials.for_client(psk_file=wrong, username=user))
            with pytest.raises((PeerError, OSError)):
                await connect(uri)      # by certificate

    run(main())


@has_psk
@needs_openssl
def test_a_server_without_the_key_is_not_believed_its_certificate(
    certificates: Certificates, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text("alice:" + "a1" * 32)

    async def main() -> None:
        async with serve(Memory(SIZE), tls=TlsCredentials.for_server(certificates.all)) as uri:
            with pytest.raises((PeerError, OSError)):
                await connect(uri, tls=TlsCredentials.for_client(psk_file=keys, username="alice"))

    run(main())


@pytest.mark.foreign("openssl")
def test_statistics_say_who_has_tls_and_which_replies(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(AioContext.of(), tls=TlsCredentials.for_server(certificates.all), tls_required=False)
        await server.add_export("disk", Device(Memory(SIZE)))
        await server.listen(tmp_path / "s")
        uri, tls = server.uri("disk"), TlsCredentials.for_client(certificates.anonymous)
        plain = RawClient(socket.socket(socket.AF_UNIX))
        await soon(asyncio.get_running_loop().sock_connect(plain.sock, str(tmp_path / "s")))
        async with connect(replace(parse_uri(uri), tls_hostname="localhost"), tls=tls) as secret:
            await secret.flush()
            await plain.send(wire.client_flags() + wire.option(wire.STRUCTURED) + wire.info(wire.GO, "disk"))
            await until(lambda: server.statistics().connections == 2)
            connections = server.statistics().exports[0].connections
            assert sorted((one.tls or "", one.replies) for one in connections) == [
                ("", "structured"), ("TLSv1.3", "extended"),
            ]
        plain.close()
        await server.close()

    run(main())
