"""TLS with peers that others wrote: clients of libnbd and QEMU at our server, our client at qemu-nbd and nbdkit."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from homeloop.block.memory import Memory
from homeloop.core.runtime import run
from homeloop.errors import BlockError, PeerError
from homeloop.nbd.client import connect
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.serving import serve
from tests.nbd.certificates import Certificates
from tests.nbd.talking import LIMIT_S
from tests.nbd.test_interop import image, tell

SIZE = 16 << 20
KEY = "a1" * 32
has_psk = pytest.mark.skipif(not getattr(ssl, "HAS_PSK", False), reason="this Python's ssl has no pre-shared keys")
pytestmark = pytest.mark.foreign("openssl")


@asynccontextmanager
async def serving(credentials: TlsCredentials) -> AsyncIterator[str]:
    """On TCP: the host's name is checked."""
    async with serve(Memory(SIZE), name="disk", listen=("127.0.0.1", 0), tls=credentials) as uri:
        yield uri


@pytest.mark.foreign("nbdinfo", "nbdcopy", "openssl")
@pytest.mark.parametrize("verify_peer", [False, True])
def test_libnbd(certificates: Certificates, tmp_path: Path, seed: int, verify_peer: bool) -> None:
    source = image(tmp_path / "source", seed)

    async def main() -> None:
        async with serving(TlsCredentials.for_server(certificates.all, verify_peer=verify_peer)) as uri:
            secure = f"{uri}?tls-certificates={certificates.all}"
            told = json.loads(await tell("nbdinfo", "--json", secure))
            assert told["TLS"] is True
            assert told["exports"][0]["export-size"] == SIZE
            await tell("nbdcopy", source, secure)
            await tell("nbdcopy", secure, tmp_path / "copy")
            for wrong in (uri.replace("nbds", "nbd"), f"{uri}?tls-certificates={certificates.stranger}"):
                with pytest.raises(AssertionError, match=r"TLS|certificate"):
                    await tell("nbdinfo", wrong)

    run(main())
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@pytest.mark.foreign("nbdsh", "openssl")
def test_nbdsh(certificates: Certificates) -> None:
    script = """
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates(CERTIFICATES)
h.connect_uri(URI)
assert h.get_tls_negotiated() and h.get_structured_replies_negotiated()
h.pwrite(b"x" * 100_000, 5)
assert h.pread(100_010, 0) == bytes(5) + b"x" * 100_000 + bytes(5)
h.zero(100, 0)
h.flush()
h.shutdown()
print("done")
"""

    async def main() -> None:
        async with serving(TlsCredentials.for_server(certificates.all, verify_peer=True)) as uri:
            values = f"URI = {uri!r}; CERTIFICATES = {str(certificates.all)!r}"
            assert "done" in await tell("nbdsh", "-c", values, "-c", script)

    run(main())


@pytest.mark.foreign("qemu-img", "openssl")
def test_qemu_img(certificates: Certificates, tmp_path: Path, seed: int) -> None:
    source = image(tmp_path / "source", seed)

    async def main() -> None:
        async with serving(TlsCredentials.for_server(certificates.all, verify_peer=True)) as uri:
            port = uri.partition("127.0.0.1:")[2].partition("/")[0]
            secret = ["--object", f"tls-creds-x509,id=tls0,dir={certificates.all},endpoint=client"]
            disk = f"driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=tls0"
            assert "16 MiB" in await tell("qemu-img", "info", *secret, "--image-opts", disk)
            await tell("qemu-img", "convert", *secret, "-n", "--target-image-opts", "-f", "raw", source, disk)
            raw = f"driver=raw,file.filename={source}"
            await tell("qemu-img", "compare", *secret, "--image-opts", raw, disk)

    run(main())


@contextlib.contextmanager
def server(*command: str | Path, socket: Path) -> Iterator[None]:
    """A server of others' that listens on a unix socket; ended afterwards."""
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE)
    try:
        while not socket.exists():
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            assert process.stderr is not None
            pytest.fail(f"{command} ended: {process.stderr.read().decode()}")
        yield
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        assert process.stderr is not None
        process.stderr.close()


async def _use(uri: str, tls: TlsCredentials | None = None) -> None:
    async with connect(uri, tls=tls) as client:
        assert client.size == SIZE
        data = os.urandom(1 << 20)
        await client.write(4096, data)
        await client.flush()
        assert await client.read(4096, len(data)) == data
        assert sum(length for length, _hole, _zero in await client.extents(0, SIZE))


@pytest.mark.foreign("nbdkit", "openssl")
def test_our_client_at_nbdkit(certificates: Certificates, tmp_path: Path) -> None:
    path = tmp_path / "s"
    folder = f"--tls-certificates={certificates.all}"
    command = ["nbdkit", "-f", "-U", str(path), "--tls=require", folder, "--tls-verify-peer", "memory", str(SIZE)]
    uri = f"nbds+unix:///?socket={path}"

    async def main() -> None:
        await _use(f"{uri}&tls-certificates={certificates.all}&tls-hostname=localhost")
        await _use(uri, TlsCredentials.for_client(certificates.all))
        with pytest.raises(PeerError, match="CERTIFICATE_VERIFY_FAILED"):
            await connect(f"{uri}&tls-certificates={certificates.stranger}")
        with pytest.raises(BlockError, match="TLS"):
            await connect(uri.replace("nbds", "nbd"))

    with server(*command, socket=path):
        run(main())


@pytest.mark.foreign("qemu-nbd", "openssl")
def test_our_client_at_qemu_nbd(certificates: Certificates, tmp_path: Path) -> None:
    path, disk = tmp_path / "s", tmp_path / "disk"
    disk.touch()
    os.truncate(disk, SIZE)
    creds = f"tls-creds-x509,id=tls0,dir={certificates.all},endpoint=server,verify-peer=on"
    command = ["qemu-nbd", "--object", creds, "--tls-creds", "tls0", "-t", "-k", str(path), "-f", "raw", str(disk)]

    async def main() -> None:
        await _use(f"nbds+unix:///?socket={path}&tls-certificates={certificates.all}&tls-hostname=localhost")
        for refused in (certificates.anonymous, certificates.stranger):
            with pytest.raises((PeerError, OSError)):
                await connect(f"nbds+unix:///?socket={path}&tls-certificates={refused}")

    with server(*command, socket=path):
        run(main())


@has_psk
@pytest.mark.foreign("nbdinfo", "nbdcopy")
def test_pre_shared_keys_of_libnbd(tmp_path: Path, seed: int) -> None:
    keys, source = tmp_path / "keys.psk", image(tmp_path / "source", seed)
    keys.write_text(f"alice:{KEY}\n")
    keys.chmod(0o600)

    async def main() -> None:
        async with serving(TlsCredentials.for_server(psk_file=keys)) as uri:
            secure = f"{uri.replace('//', '//alice@')}?tls-psk-file={keys}"
            assert json.loads(await tell("nbdinfo", "--json", secure))["TLS"] is True
            await tell("nbdcopy", source, secure)
            await tell("nbdcopy", secure, tmp_path / "copy")

    run(main())
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@has_psk
@pytest.mark.foreign("nbdkit", "qemu-nbd")
def test_pre_shared_keys_of_nbdkit_and_qemu(tmp_path: Path) -> None:
    keys, disk = tmp_path / "keys.psk", tmp_path / "disk"
    keys.write_text(f"alice:{KEY}\nbob:{'b2' * 16}\n")
    disk.touch()
    os.truncate(disk, SIZE)

    async def main(path: Path) -> None:
        for user in ("alice", "bob"):
            await _use(f"nbds+unix://{user}@/?socket={path}&tls-psk-file={keys}")

    kit, qemu = tmp_path / "kit", tmp_path / "qemu"
    with server("nbdkit", "-f", "-U", kit, "--tls=require", f"--tls-psk={keys}", "memory", str(SIZE), socket=kit):
        run(main(kit))
    creds = f"tls-creds-psk,id=tls0,dir={tmp_path},endpoint=server"
    with server("qemu-nbd", "--object", creds, "--tls-creds", "tls0", "-t", "-k", qemu, "-f", "raw", disk, socket=qemu):
        run(main(qemu))
