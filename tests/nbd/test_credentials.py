"""TLS credentials: what is missing is said, by name, and no key is in any text."""

from __future__ import annotations

import getpass
import ssl
import subprocess
from pathlib import Path

import pytest

from homeloop.errors import UsageError
from homeloop.nbd.credentials import TlsCredentials, read_psk_file
from homeloop.nbd.uri import NbdUri, parse_uri
from tests.nbd.certificates import Certificates

has_psk = pytest.mark.skipif(not getattr(ssl, "HAS_PSK", False), reason="this Python's ssl has no pre-shared keys")
KEY = "00112233445566778899aabbccddeeff"


def test_a_server_needs_something() -> None:
    for arguments in ({}, {"folder": "x", "psk_file": "y"}):
        with pytest.raises(UsageError, match="needs either certificates or pre-shared keys"):
            TlsCredentials.for_server(**arguments)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere"):
        TlsCredentials.for_server(tmp_path / "nowhere")
    (tmp_path / "server-key.pem").touch()
    with pytest.raises(UsageError, match=r"missing server-cert\.pem, ca-cert\.pem"):
        TlsCredentials.for_server(tmp_path, verify_peer=True)
    with pytest.raises(UsageError, match=r"missing ca-cert\.pem"):
        TlsCredentials.for_client(tmp_path)
    (tmp_path / "client-key.pem").touch()
    with pytest.raises(UsageError, match=r"only client-key\.pem of client-cert\.pem, client-key\.pem"):
        TlsCredentials.for_client(tmp_path, verify_peer=False)


@pytest.mark.foreign("openssl")
def test_a_file_that_is_no_certificate_is_named(certificates: Certificates, tmp_path: Path) -> None:
    for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(UsageError, match=r"server-cert\.pem: "):
        TlsCredentials.for_server(tmp_path).server_context()
    with pytest.raises(UsageError, match=r"ca-cert\.pem: "):
        TlsCredentials.for_client(tmp_path).client_context(check_hostname=True)
    (tmp_path / "server-cert.pem").write_bytes((certificates.all / "server-cert.pem").read_bytes())
    (tmp_path / "server-key.pem").write_bytes((certificates.stranger / "server-key.pem").read_bytes())
    with pytest.raises(UsageError, match=r"server-cert\.pem: "):
        TlsCredentials.for_server(tmp_path).server_context()


@pytest.mark.foreign("openssl")
def test_a_key_with_a_pass_phrase_is_refused(certificates: Certificates, tmp_path: Path) -> None:
    """Nobody is asked for it: that would be at the terminal, with all loops of the process held up."""
    (tmp_path / "server-cert.pem").write_bytes((certificates.all / "server-cert.pem").read_bytes())
    subprocess.run(
        ["openssl", "pkey", "-in", certificates.all / "server-key.pem", "-aes256", "-passout", "pass:secret",
         "-out", tmp_path / "server-key.pem"],
        check=True, capture_output=True, timeout=60,
    )
    with pytest.raises(UsageError, match=r"server-cert\.pem: its key .*server-key\.pem is protected by a pass phrase"):
        TlsCredentials.for_server(tmp_path).server_context()


@pytest.mark.foreign("openssl")
def test_t12_tls_1_2_at_least_and_nothing_older(certificates: Certificates) -> None:
    server = TlsCredentials.for_server(certificates.all, verify_peer=True).server_context()
    client = TlsCredentials.for_client(certificates.all).client_context(check_hostname=True)
    for context in (server, client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.options & ssl.OP_NO_RENEGOTIATION
    assert client.check_hostname
    assert not TlsCredentials.for_client(certificates.all).client_context(check_hostname=False).check_hostname
    trusting = TlsCredentials.for_client(certificates.all, verify_peer=False).client_context(check_hostname=True)
    assert trusting.verify_mode is ssl.CERT_NONE
    assert TlsCredentials.for_client().client_context(check_hostname=True).verify_mode is ssl.CERT_REQUIRED


@pytest.mark.foreign("openssl")
def test_of_uri(certificates: Certificates) -> None:
    uri = parse_uri(f"nbds://h/?tls-certificates={certificates.all}&tls-verify-peer=0")
    assert TlsCredentials.of_uri(uri) == TlsCredentials.for_client(certificates.all, verify_peer=False)
    assert TlsCredentials.of_uri(NbdUri(tls=True)) == TlsCredentials.for_client()


@pytest.mark.parametrize(("text", "says"), [
    ("alice", "line 1: write user:key"),
    ("# keys\n\nalice:12xy", "line 3: write user:key"),
    (":1234", "line 1"),
    ("alice:", "line 1"),
    ("a:12\na:34", "line 2: 'a' is there twice"),
    ("# none", "there is none in it"),
    ("x" * (1 << 20) + "y", "more than"),
])
def test_broken_key_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        read_psk_file(path)
    assert "12xy" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(f"# of us\nalice:{KEY}\n\n a:b:0102 \n")
    assert read_psk_file(path) == {"alice": bytes.fromhex(KEY), "a:b": b"\1\2"}
    with pytest.raises(UsageError, match="nowhere"):
        read_psk_file(tmp_path / "nowhere")
    path.write_bytes(b"\xff\xfe:12")
    with pytest.raises(UsageError, match=r"keys\.psk"):
        read_psk_file(path)


@pytest.mark.skipif(getattr(ssl, "HAS_PSK", False), reason="this Python has pre-shared keys")
def test_pre_shared_keys_need_a_newer_python(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text(f"alice:{KEY}")
    for make in (TlsCredentials.for_server, TlsCredentials.for_client):
        with pytest.raises(UsageError, match=r"need Python 3\.13"):
            make(psk_file=tmp_path / "keys.psk")


@has_psk
def test_pre_shared_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(f"alice:{KEY}\n{getpass.getuser()}:ff\n")
    alice = TlsCredentials.for_client(psk_file=path, username="alice")
    assert alice.psk == (("alice", bytes.fromhex(KEY)),)
    assert KEY not in repr(alice) + repr(TlsCredentials.for_server(psk_file=path))
    assert TlsCredentials.for_client(psk_file=path).psk[0][1] == b"\xff"
    assert TlsCredentials.of_uri(parse_uri(f"nbds://alice@h/?tls-psk-file={path}")) == alice
    server = TlsCredentials.for_server(psk_file=path)
    for context in (alice.client_context(check_hostname=True), server.server_context()):
        names = [cipher["name"] for cipher in context.get_ciphers()]
        assert "ECDHE-PSK-CHACHA20-POLY1305" in names
        assert not [name for name in names if "NULL" in name]
    with pytest.raises(UsageError, match="no key of user 'bob'"):
        TlsCredentials.for_client(psk_file=path, username="bob")
    # A server without the key does not get away with a certificate.
    assert alice.client_context(check_hostname=True).verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(UsageError, match="needs certificates"):
        TlsCredentials.for_server(psk_file=path, verify_peer=True)
