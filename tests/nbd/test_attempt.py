"""Sessions made by a thread that blocks: what they bring, what is refused, and how they are given up."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from pathlib import Path

import pytest

from homeloop.block.memory import Memory
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.errors import BlockError, ConnectionLost, PeerError
from homeloop.nbd.attempt import Attempt
from homeloop.nbd.client import Client
from homeloop.nbd.serving import serve
from homeloop.nbd.session import open_session
from homeloop.nbd.uri import NbdUri, parse_uri
from tests.nbd.talking import soon


def test_a_session_goes_on_as_a_client() -> None:
    async def main() -> None:
        for options in ({}, {"listen": ("127.0.0.1", 0)}):
            async with serve(Memory(4096), **options) as uri:  # type: ignore[arg-type]
                session = await to_worker(Attempt(parse_uri(uri)).run)
                client = Client(session.sock, session.info, session.leftover)
                await soon(client.write(0, b"x"))
                assert await soon(client.read(0, 2)) == b"x\0"
                assert client.info.structured
                await client.close()

    run(main())


def test_refused_and_nobody_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(Memory(4096), name="a") as uri:
            with pytest.raises(BlockError) as caught:
                await to_worker(Attempt(parse_uri(uri.replace("/a?", "/b?"))).run)
            assert caught.value.errno == errno.ENOENT

    run(main())
    with pytest.raises(FileNotFoundError):
        Attempt(NbdUri(socket=str(tmp_path / "none"))).run()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            Attempt(NbdUri(host="127.0.0.1", port=bound.getsockname()[1])).run()


def test_short_of_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are none for the loop, those of the connection are free again; who keeps the error keeps none."""
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        listening.settimeout(10)
        monkeypatch.setattr(asyncio, "SelectorEventLoop", refuse)
        with pytest.raises(OSError, match="Too many open files") as caught:
            Attempt(NbdUri(socket=str(tmp_path / "s"))).run()
        theirs, _ = listening.accept()
        with theirs:
            theirs.settimeout(10)
            assert theirs.recv(1) == b""
        assert caught.value.errno == errno.EMFILE


@pytest.mark.parametrize(("says", "error"), [
    (b"", ConnectionLost), (b"NBDMAGIC", ConnectionLost), (b"220 mail ready\r\n" * 2, PeerError),
])
def test_a_broken_server(says: bytes, error: type[Exception], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()

        def answer() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(error):
            Attempt(NbdUri(socket=str(tmp_path / "s")), limit_s=10).run()
        thread.join(10)


@pytest.fixture
def mute(tmp_path: Path) -> object:
    """A server that is there and never says anything: its kernel accepts."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        yield NbdUri(socket=str(tmp_path / "s"))


def test_a_limit(mute: NbdUri) -> None:
    with pytest.raises(TimeoutError):
        Attempt(mute, limit_s=0.01).run()


@pytest.mark.parametrize("before", [True, False])
def test_given_up(mute: NbdUri, before: bool) -> None:
    """From another thread, before it begins or while it waits for the greeting."""
    attempt = Attempt(mute)
    listening = threading.Event()

    class Watched(socket.socket):
        def recv(self, *args: int) -> bytes:  # type: ignore[override]
            listening.set()
            return super().recv(*args)

    def give_up() -> None:
        assert before or listening.wait(10)
        attempt.give_up()

    giving_up = threading.Thread(target=give_up)
    giving_up.start()
    if before:
        giving_up.join(10)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConnectionAbortedError, match="given up"):
        patch.setattr("homeloop.nbd.attempt.socket.socket", Watched)
        attempt.run()
    giving_up.join(10)
    attempt.give_up()


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".invalid"])
def test_a_host_that_is_none(host: str) -> None:
    """Named in the error, with an errno that is one; the same on a loop."""
    with pytest.raises(OSError, match=f"cannot find the host '{host}'") as caught:
        Attempt(NbdUri(host=host)).run()
    assert caught.value.errno == errno.EADDRNOTAVAIL
    with pytest.raises(OSError, match=f"cannot find the host '{host}'") as caught:
        asyncio.run(soon(open_session(NbdUri(host=host), None)))
    assert caught.value.errno == errno.EADDRNOTAVAIL
