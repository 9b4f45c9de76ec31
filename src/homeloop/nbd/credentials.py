"""TLS credentials as QEMU, nbdkit and libnbd lay them out: a folder of PEM files, a file of pre-shared keys.

    ca-cert.pem  server-cert.pem  server-key.pem  client-cert.pem  client-key.pem        in one folder
    alice:6bf0...                                                                         a line of the key file

A value that says which files and keys; what is missing is said when it is made. The files are read when a server is
made or a client connects.
"""

from __future__ import annotations

import getpass
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from homeloop.errors import UsageError
from homeloop.nbd.uri import NbdUri

__all__ = ["TlsCredentials", "read_psk_file"]

_PSK_FILE_BYTES_MAX: Final = 1 << 20
_PSK_CIPHERS: Final = "kECDHEPSK:kDHEPSK:kPSK:!eNULL"  # forward secrecy first; some of "PSK" would encrypt nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsCredentials:
    """What one side shows, and what it believes. Made by for_server() or for_client().

    Certificates, or pre-shared keys (`psk`: user and key). TLS 1.2 at least (T12). A value, for any thread.
    """

    authorities: str | None = None  # path of the certificates that the peer's must come from; None: the system's
    certificate: str | None = None  # path of ours
    key: str | None = None  # path of its private key
    verify_peer: bool = True  # a client: check the server's certificate; a server: clients must have one
    psk: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    @classmethod
    def for_server(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        psk_file: str | os.PathLike[str] | None = None,
        verify_peer: bool = False,
    ) -> TlsCredentials:
        """Take server-cert.pem and server-key.pem of the folder, and ca-cert.pem if clients need a certificate.

        Or the keys of a file. Not both: with TLS 1.3 OpenSSL would then take the certificate also for clients that
        have come with a key, and expect to be answered with it. UsageError, naming each, for files that are missing
        or no keys, and where this Python has no pre-shared keys.
        """
        if (folder is None) == (psk_file is None):
            raise UsageError("a TLS server needs either certificates or pre-shared keys")
        if folder is None and verify_peer:
            raise UsageError("to verify clients a TLS server needs certificates; who has a key is known by it")
        if folder is None:
            return cls(psk=_psk_of(psk_file), verify_peer=False)
        wanted = ["server-cert.pem", "server-key.pem"] + (["ca-cert.pem"] if verify_peer else [])
        found = _files(folder, wanted)
        return cls(
            authorities=found["ca-cert.pem"] if verify_peer else None,
            certificate=found["server-cert.pem"],
            key=found["server-key.pem"],
            verify_peer=verify_peer,
        )

    @classmethod
    def for_client(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        psk_file: str | os.PathLike[str] | None = None,
        username: str | None = None,
        verify_peer: bool = True,
    ) -> TlsCredentials:
        """Take ca-cert.pem of the folder, and client-cert.pem with client-key.pem if they are there.

        No folder and no key file: the system's authorities. username: whose line of the key file; None: that of who
        runs this. UsageError as in for_server().
        """
        if psk_file is not None:
            username = username if username is not None else getpass.getuser()
            keys = dict(_psk_of(psk_file))
            if username not in keys:
                raise UsageError(f"{os.fspath(psk_file)} has no key of user {username!r}")
            return cls(psk=((username, keys[username]),), verify_peer=verify_peer)
        if folder is None:
            return cls(verify_peer=verify_peer)
        found = _files(folder, ["ca-cert.pem"] if verify_peer else [])
        own = {name: os.path.join(os.fspath(folder), name) for name in ("client-cert.pem", "client-key.pem")}
        there = [name for name, path in own.items() if os.path.exists(path)]
        if len(there) == 1:
            text = f"TLS credentials in {os.fspath(folder)}: only {there[0]} of {', '.join(own)}"
            raise UsageError(text)
        return cls(
            authorities=found.get("ca-cert.pem"),
            certificate=own["client-cert.pem"] if there else None,
            key=own["client-key.pem"] if there else None,
            verify_peer=verify_peer,
        )

    @classmethod
    def of_uri(cls, uri: NbdUri) -> TlsCredentials:
        """What a client's nbds URI says, for_client()."""
        if uri.tls_type == "psk" or (uri.tls_type is None and uri.tls_psk_file is not None):
            return cls.for_client(psk_file=uri.tls_psk_file, username=uri.username)
        return cls.for_client(uri.tls_certificates, verify_peer=uri.tls_verify_peer)

    def server_context(self) -> ssl.SSLContext:
        """Read the files. UsageError, naming it, for one that cannot be used."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nobody resumes a session; a ticket is a write that the client may not wait for
        if self.verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
        if self.psk:
            keys = dict(self.psk)
            # An identity that nobody has gets no key, and no handshake.
            context.set_psk_server_callback(  # type: ignore[attr-defined,unused-ignore]
                lambda identity: keys.get(identity or "", b"")
            )
        return context

    def client_context(self, *, check_hostname: bool) -> ssl.SSLContext:
        """The same for a client. check_hostname: there is a name to check."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        # With a key the server proves itself by it. It must not get away with a certificate: none is trusted.
        context.check_hostname = check_hostname and self.verify_peer and not self.psk
        context.verify_mode = ssl.CERT_REQUIRED if self.verify_peer or self.psk else ssl.CERT_NONE
        if self.psk:
            (user,) = self.psk
            context.set_psk_client_callback(lambda hint: user)  # type: ignore[attr-defined,unused-ignore]
        elif self.verify_peer and self.authorities is None:
            context.load_default_certs()
        return context

    def _no_phrase(self) -> str:
        """OpenSSL would ask at the terminal, and whoever serves would stand still meanwhile."""
        raise ValueError(f"its key {self.key} is protected by a pass phrase; write the key without one")

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        if self.psk:
            _check_psk()
            context.set_ciphers(_PSK_CIPHERS)
        if self.certificate is not None:
            _load(self.certificate, lambda: context.load_cert_chain(self.certificate or "", self.key, self._no_phrase))
        if self.authorities is not None:
            _load(self.authorities, lambda: context.load_verify_locations(self.authorities))
        return context


def _load(path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise UsageError(f"TLS credentials {path}: {error}") from error


def _files(folder: str | os.PathLike[str], wanted: list[str]) -> dict[str, str]:
    if not os.path.isdir(folder):
        raise UsageError(f"TLS credentials: there is no folder {os.fspath(folder)}")
    paths = {name: os.path.join(os.fspath(folder), name) for name in wanted}
    missing = [name for name, path in paths.items() if not os.path.isfile(path)]
    if missing:
        raise UsageError(f"TLS credentials in {os.fspath(folder)}: missing {', '.join(missing)}")
    return paths


def _check_psk() -> None:
    if not getattr(ssl, "HAS_PSK", False):
        raise UsageError("pre-shared keys need Python 3.13 or later; certificates work on every one")


def _psk_of(path: str | os.PathLike[str] | None) -> tuple[tuple[str, bytes], ...]:
    if path is None:
        return ()
    _check_psk()
    return tuple(read_psk_file(path).items())


def read_psk_file(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the keys by user. UsageError, with the line, for what is no `user:hexkey`; no key is in the text."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_PSK_FILE_BYTES_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"pre-shared keys {os.fspath(path)}: {error}") from error
    if len(text) > _PSK_FILE_BYTES_MAX:
        raise UsageError(f"pre-shared keys {os.fspath(path)}: more than {_PSK_FILE_BYTES_MAX} characters")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        user, colon, digits = line.rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not colon or not user or not key:
            raise UsageError(f"pre-shared keys {os.fspath(path)}, line {number}: write user:key, the key in hex digits")
        if user in keys:
            raise UsageError(f"pre-shared keys {os.fspath(path)}, line {number}: {user!r} is there twice")
        keys[user] = key
    if not keys:
        raise UsageError(f"pre-shared keys {os.fspath(path)}: there is none in it")
    return keys
