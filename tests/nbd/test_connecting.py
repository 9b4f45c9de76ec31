"""connect(): which client one gets."""

from __future__ import annotations

import pytest

from homeloop.block.memory import Memory
from homeloop.core.runtime import run
from homeloop.errors import UsageError
from homeloop.nbd.client import Client
from homeloop.nbd.connecting import connect
from homeloop.nbd.reconnecting import ReconnectingClient
from homeloop.nbd.serving import serve


def test_both() -> None:
    """Each is awaited, or entered; both answer the same requests."""
    async def main() -> None:
        async with serve(Memory(4096)) as uri:
            async with connect(uri) as plain, connect(uri, reconnect_delay=5, open_timeout=5) as lasting:
                assert (type(plain), type(lasting)) == (Client, ReconnectingClient)
                await plain.write(0, b"x")
                assert await lasting.read(0, 2) == b"x\0"
                assert (plain.size, lasting.size) == (4096, 4096)
            for client in (await connect(uri), await connect(uri, reconnect_delay=0)):
                await client.close()

    run(main())
    with pytest.raises(UsageError):
        connect("nbd://x", reconnect_delay=-1)
    with pytest.raises(ValueError, match="scheme"):
        connect("http://x", reconnect_delay=1)
