"""Listening sockets and the files that they leave."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from homeloop.nbd.listening import listen_tcp, listen_unix, peer_name


def test_the_file_goes_with_the_listener(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen_unix(path, 5)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listener.close()
    listener.close()
    assert not os.path.exists(path)


def test_a_stale_file_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen(1)
    listener = listen_unix(path, 5)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listener.close()


@pytest.mark.parametrize("backlog", [5, 0])
def test_a_living_server_is_not_replaced(tmp_path: Path, backlog: int) -> None:
    """Not even if its queue is full."""
    path = str(tmp_path / "s")
    listener = listen_unix(path, backlog)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    try:
        for client in clients:
            client.setblocking(False)
            try:
                client.connect(path)
            except BlockingIOError:
                pass
        with pytest.raises(OSError, match="another server listens") as caught:
            listen_unix(path, 5)
        assert caught.value.errno == errno.EADDRINUSE
        assert caught.value.filename == path
        assert os.path.exists(path)
    finally:
        for client in clients:
            client.close()
        listener.close()


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        listen_unix(str(path), 5)
    assert path.read_text() == "precious"


def test_somebody_elses_file_stays(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    ours = listen_unix(path, 5)
    os.unlink(path)
    theirs = listen_unix(path, 5)
    ours.close()
    assert os.path.exists(path)
    theirs.close()


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long") as caught:
        listen_unix(str(tmp_path / ("x" * 200)), 5)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/s"):
        listen_unix(str(tmp_path / "no" / "s"), 5)


def test_tcp_takes_one_port_on_all_addresses() -> None:
    address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))
    second = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.2", 0))
    foreign = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0))
    listeners = listen_tcp("localhost", [foreign, address, second], 5)
    try:
        assert len({listener.uri.port for listener in listeners}) == 1
        assert [listener.sock.getsockname()[0] for listener in listeners] == ["127.0.0.1", "127.0.0.2"]
        port = listeners[0].uri.port
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}") as caught:
            listen_tcp("localhost", [(*address[:4], ("127.0.0.1", port))], 5)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="no address of it is ours"):
            listen_tcp("example", [foreign], 5)
    finally:
        for listener in listeners:
            listener.close()


def test_peer_names() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_name(ours, 7).startswith("client 7")
        if hasattr(socket, "SO_PEERCRED"):
            assert f"pid {os.getpid()}" in peer_name(ours, 7)
    with socket.socket() as unconnected:
        assert peer_name(unconnected, 8) == "client 8"
