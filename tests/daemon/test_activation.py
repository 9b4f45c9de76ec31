"""Sockets of the service manager: taken over with their names, or refused by number."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from homeloop.daemon.activation import inherited_sockets
from homeloop.errors import UsageError

PID = 1234


def environ(count: int | str, names: str = "", pid: int = PID) -> dict[str, str]:
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "OTHER": "stays"}


def at_fds(*socks: socket.socket, first: int = 200) -> int:
    """Put them at descriptors that follow each other, as the manager does; the first one's number."""
    for index, sock in enumerate(socks):
        os.dup2(sock.fileno(), first + index)
        sock.close()
    return first


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_taken_over_with_their_names(tmp_path: Path) -> None:
    tcp = socket.create_server(("127.0.0.1", 0))
    first = at_fds(listening(tmp_path / "a"), tcp)
    variables = environ(2, "control")
    found = inherited_sockets(variables, PID, first_fd=first)
    assert [name for name, _sock in found] == ["control", "unknown"]
    assert [sock.family for _name, sock in found] == [socket.AF_UNIX, socket.AF_INET]
    assert not any(os.get_inheritable(sock.fileno()) or sock.getblocking() for _name, sock in found)
    assert variables == {"OTHER": "stays"}
    for _name, sock in found:
        sock.close()


@pytest.mark.parametrize("variables", [{}, environ(1, pid=PID + 1)])
def test_none_for_us(variables: dict[str, str]) -> None:
    assert inherited_sockets(variables, PID) == []


@pytest.mark.parametrize("count", ["", "x", "0", "-1", "99999"])
def test_a_count_that_is_none(count: str) -> None:
    with pytest.raises(UsageError, match="LISTEN_FDS is"):
        inherited_sockets(environ(count), PID)


def test_what_is_no_listening_socket_is_named_and_all_are_closed(tmp_path: Path) -> None:
    plain = os.open(tmp_path, os.O_RDONLY)
    os.dup2(plain, 201)
    os.close(plain)
    pairs = [
        (socket.socket(socket.AF_UNIX), "does not listen"),
        (socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "neither a unix nor a TCP socket"),
    ]
    for bad, says in pairs:
        first = at_fds(bad)
        with pytest.raises(UsageError, match=rf"descriptor {first} \(LISTEN_FDNAMES: n\), .* {says}"):
            inherited_sockets(environ(1, "n"), PID, first_fd=first)
        with pytest.raises(OSError):
            os.fstat(first)
    good = at_fds(listening(tmp_path / "a"))
    with pytest.raises(UsageError, match=r"descriptor 201 .* is no socket"):
        inherited_sockets(environ(2), PID, first_fd=good)
    for fd in (200, 201):
        with pytest.raises(OSError):
            os.fstat(fd)
