"""TLS credentials as objects with ids, as QEMU has them. The main context's.

An NBD server reads them when it is started; what happens to the object or its files later does not change it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

from homeloop.core.workers import to_worker
from homeloop.errors import UsageError
from homeloop.nbd.credentials import TlsCredentials

__all__ = ["KEYS_FILE", "TLS_TYPES", "TlsObjects"]

TLS_TYPES: Final = ("tls-creds-x509", "tls-creds-psk")
KEYS_FILE: Final = "keys.psk"       # in the folder of a tls-creds-psk


class TlsObjects(Mapping[str, TlsCredentials]):
    """All of them, by id."""

    def __init__(self) -> None:
        self._credentials: dict[str, TlsCredentials] = {}
        self.types: dict[str, str] = {}     # id -> qom-type

    def __getitem__(self, id: str) -> TlsCredentials:
        return self._credentials[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._credentials)

    def __len__(self) -> int:
        return len(self._credentials)

    async def add(self, id: str, qom_type: str, options: Mapping[str, Any]) -> None:
        """Read the files, in a worker. UsageError, naming it, for one that is missing or cannot be used."""
        if options.get("endpoint", "client") != "server":
            raise UsageError("TLS credentials are for a server here: endpoint=server")
        if "dir" not in options:
            raise UsageError("Missing 'dir' property value")
        self.types[id] = qom_type           # before it waits: nobody else may take the id meanwhile
        try:
            self._credentials[id] = await to_worker(_read, qom_type, options)
        except BaseException:
            del self.types[id]
            raise

    def delete(self, id: str) -> None:
        """Forget one; a server that was started with it goes on."""
        del self._credentials[id], self.types[id]

    def find(self, id: str) -> TlsCredentials:
        """UsageError, in QEMU's words, if there are none of that id."""
        if id not in self._credentials:
            raise UsageError(f"No TLS credentials with id '{id}'")
        return self._credentials[id]


def _read(qom_type: str, options: Mapping[str, Any]) -> TlsCredentials:
    folder = options["dir"]
    if qom_type == "tls-creds-psk":
        found = TlsCredentials.for_server(psk_file=os.path.join(folder, KEYS_FILE))
    else:
        found = TlsCredentials.for_server(folder, verify_peer=options.get("verify-peer", True))
    found.server_context()              # or a file that cannot be used would only be found by who needs it
    return found
