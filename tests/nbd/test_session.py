"""A session is nobody's until a client takes it: made on one loop, used on another, or dropped."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from homeloop.block.memory import Memory
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.nbd.client import Client
from homeloop.nbd.serving import serve
from homeloop.nbd.session import Session, open_session
from homeloop.nbd.uri import parse_uri
from tests.nbd.talking import soon


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_nobody_listens(kind: str, tmp_path: Path) -> None:
    """The error says where, and why; its class is that of its errno."""
    async def main(text: str, wanted: type[OSError], says: str) -> None:
        with pytest.raises(wanted) as caught:
            await soon(open_session(parse_uri(text), None))
        assert (caught.value.strerror or "") == f"cannot connect to {text}: {says}"

    if kind == "unix":
        uri = f"nbd+unix:///a?socket={tmp_path}/s"
        run(main(uri, FileNotFoundError, "No such file or directory"))
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))         # and does not listen
        run(main(f"nbd://127.0.0.1:{sock.getsockname()[1]}/a", ConnectionRefusedError, "Connection refused"))


def test_from_one_loop_to_another() -> None:
    async def use(session: Session) -> bytes:
        async with Client(session.sock, session.info, session.leftover) as client:
            await client.write(0, b"x")
            return bytes(await client.read(0, 2))

    async def main() -> None:
        with IOThread("io") as io:
            async with serve(Memory(4096), iothread=io) as uri:
                session = await open_session(parse_uri(uri), None)
                assert await to_worker(lambda: asyncio.run(soon(use(session)))) == b"x\0"
                dropped = await open_session(parse_uri(uri), None)
                dropped.close()
                dropped.close()

    run(main())
