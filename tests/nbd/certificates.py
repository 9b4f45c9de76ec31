"""Certificates for a test: made by `openssl`, once in a run, and valid for two days."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Folders as QEMU, nbdkit and libnbd want them."""

    all: Path           # authority, server and client
    anonymous: Path     # the authority alone: a client that shows nothing
    stranger: Path      # all three, of another authority


def _openssl(folder: Path, *args: str) -> None:
    command = ["openssl", "req", "-x509", *KEY, *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def _authority(folder: Path, name: str) -> None:
    """An authority, and what it signs."""
    folder.mkdir()
    _openssl(
        folder, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", f"/CN={name}",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )
    for side, use, names in [
        ("server", "serverAuth", "DNS:localhost,DNS:disks.example,IP:127.0.0.1"),
        ("client", "clientAuth", "DNS:client"),
    ]:
        _openssl(
            folder, "-keyout", f"{side}-key.pem", "-out", f"{side}-cert.pem", "-subj", f"/CN={name} {side}",
            "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem",
            "-addext", "basicConstraints=critical,CA:FALSE",
            "-addext", "keyUsage=critical,digitalSignature",
            "-addext", f"extendedKeyUsage={use}", "-addext", f"subjectAltName={names}",
        )


def make_certificates(folder: Path) -> Certificates:
    made = Certificates(all=folder / "all", anonymous=folder / "anonymous", stranger=folder / "stranger")
    _authority(made.all, "test")
    _authority(made.stranger, "stranger")
    made.anonymous.mkdir()
    shutil.copy(made.all / "ca-cert.pem", made.anonymous)
    return made
