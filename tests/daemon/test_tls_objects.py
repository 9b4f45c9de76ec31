"""TLS credentials as objects: made and deleted by command, used by an NBD server that is started with them."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from homeloop.core.runtime import run
from homeloop.daemon.exporting import Daemon, ExportConfig, ListenConfig
from homeloop.errors import BlockError, PeerError, UsageError
from homeloop.nbd.client import connect
from homeloop.nbd.credentials import TlsCredentials
from tests.daemon.qmp.control import Client, Failed, controlled
from tests.nbd.certificates import Certificates, make_certificates

MIB = 1 << 20


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The tests that use it are foreign("openssl")."""
    return make_certificates(tmp_path_factory.mktemp("tls"))


async def exported(client: Client, path: Path, **start: str) -> None:
    await client.run("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}}, **start)
    await client.run("block-export-add", type="nbd", id="e0", node_name="disk")


@pytest.mark.foreign("openssl")
def test_a_server_with_certificates(certificates: Certificates, tmp_path: Path) -> None:
    """Nobody comes in without; verify-peer, QEMU's default, wants one of the client's."""
    path = tmp_path / "nbd"
    uri = f"nbd+unix:///disk?socket={path}"
    secret = f"nbds+unix:///disk?socket={path}&tls-hostname=localhost"

    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            folder = str(certificates.all)
            tls = {"qom_type": "tls-creds-x509", "dir": folder, "endpoint": "server"}
            await client.run("object-add", id="strict", **tls)
            await client.run("object-add", id="open", verify_peer=False, **tls)
            await client.run("blockdev-add", driver="memory", node_name="disk", size=MIB)
            names = {entry["name"]: entry["type"] for entry in await client.run("qom-list", path="/objects")}
            assert names["open"] == "child<tls-creds-x509>"
            assert names["iothread-0"] == "child<iothread>"

            await exported(client, path, tls_creds="open")
            with pytest.raises(BlockError, match="TLS_REQD"):
                await connect(uri)
            async with connect(secret, tls=TlsCredentials.for_client(certificates.anonymous)) as nbd:
                await client.run("object-del", id="open")           # who was started with it goes on
                assert bytes(await nbd.read(0, 512)) == bytes(512)
            await client.run("nbd-server-stop")
            with pytest.raises(Failed, match="No TLS credentials with id 'open'"):
                await exported(client, path, tls_creds="open")

            await exported(client, path, tls_creds="strict")
            with pytest.raises((PeerError, BlockError, OSError)):
                async with connect(secret, tls=TlsCredentials.for_client(certificates.anonymous)) as nbd:
                    await nbd.read(0, 512)
            async with connect(secret, tls=TlsCredentials.for_client(certificates.all)) as nbd:
                assert bytes(await nbd.read(0, 512)) == bytes(512)
            await client.run("nbd-server-stop")
            await exported(client, path)                            # and without: in the clear again
            async with connect(uri) as nbd:
                assert bytes(await nbd.read(0, 512)) == bytes(512)
            assert set(daemon.tls_objects) == {"strict"}

    run(main())


@pytest.mark.foreign("openssl")
def test_what_cannot_be(certificates: Certificates, tmp_path: Path) -> None:
    """Nothing is there afterwards, and the id is free."""
    (tmp_path / "bad").mkdir()
    for name in ("server-cert.pem", "server-key.pem"):
        (tmp_path / "bad" / name).write_text("no certificate")
    x509 = {"qom_type": "tls-creds-x509", "endpoint": "server"}

    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            for arguments, says in (
                ({**x509, "dir": "/no/such"}, "there is no folder /no/such"),
                ({**x509, "dir": str(certificates.anonymous)}, "missing server-cert.pem, server-key.pem"),
                ({**x509, "dir": str(tmp_path / "bad"), "verify_peer": False}, "server-cert.pem: "),
                (x509, "Missing 'dir' property value"),
                ({**x509, "endpoint": "client", "dir": str(certificates.all)}, "endpoint=server"),
                ({**x509, "dir": 1}, "Invalid parameter type for 'dir', expected: string"),
                ({**x509, "priority": "NORMAL", "dir": "/"}, "Parameter 'priority' is unexpected"),
                ({"qom_type": "secret"}, "does not accept value 'secret'"),
            ):
                with pytest.raises(Failed, match=says):
                    await client.run("object-add", id="t0", **arguments)    # type: ignore[arg-type]
            with pytest.raises(Failed, match="attempt to add duplicate property 'iothread-0'"):
                await client.run("object-add", id="iothread-0", dir=str(certificates.all), **x509)
            with pytest.raises(Failed, match="object 't0' not found"):
                await client.run("object-del", id="t0")
            assert not daemon.tls_objects.types
            await client.run("object-add", id="t0", dir=str(certificates.all), **x509)
            with pytest.raises(Failed, match="attempt to add duplicate property 't0'"):
                await client.run("object-add", qom_type="iothread", id="t0")

    run(main())


def test_pre_shared_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:0011223344556677\n")
    psk = {"qom_type": "tls-creds-psk", "dir": str(tmp_path), "endpoint": "server"}
    path = tmp_path / "nbd"

    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            if not getattr(ssl, "HAS_PSK", False):
                with pytest.raises(Failed, match=r"need Python 3\.13"):
                    await client.run("object-add", id="t0", **psk)
                return
            await client.run("object-add", id="t0", **psk)
            await client.run("blockdev-add", driver="memory", node_name="disk", size=MIB)
            await exported(client, path, tls_creds="t0")
            alice = TlsCredentials.for_client(psk_file=tmp_path / "keys.psk", username="alice")
            async with connect(f"nbds+unix:///disk?socket={path}", tls=alice) as nbd:
                assert bytes(await nbd.read(0, 512)) == bytes(512)

    run(main())


@pytest.mark.foreign("openssl")
def test_some_exports_only_need_tls(certificates: Certificates, tmp_path: Path) -> None:
    """`serve --tls-only`: the others are for everybody, and who has no TLS cannot have that one."""
    async def main() -> None:
        tls = TlsCredentials.for_server(certificates.all)
        async with Daemon(tls=tls, tls_only={"secret"}) as daemon:
            await daemon.add_export(ExportConfig(source="memory:1M", name="secret"))
            await daemon.add_export(ExportConfig(source="memory:1M", name="open"))
            await daemon.listen(ListenConfig(socket=str(tmp_path / "s")))
            uri = daemon.server.uri("open")
            assert uri.startswith("nbd+unix:")
            assert daemon.server.uri("secret").startswith("nbds+unix:")
            async with connect(uri) as nbd:
                await nbd.read(0, 512)
            with pytest.raises(BlockError):
                await connect(uri.replace("/open", "/secret"))
            secret = daemon.server.uri("secret") + "&tls-hostname=localhost"
            async with connect(secret, tls=TlsCredentials.for_client(certificates.anonymous)) as nbd:
                await nbd.read(0, 512)

    run(main())


def test_tls_only_needs_tls() -> None:
    with pytest.raises(UsageError, match="'secret' is for TLS only"):
        Daemon(tls_only={"secret"})
