"""Listening sockets that the service manager has opened for us: LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES.

Source: sd_listen_fds(3). A socket named "control" is the control socket; NBD clients come to all others.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

from homeloop.errors import UsageError

__all__ = ["FIRST_FD", "inherited_sockets"]

FIRST_FD = 3
_FDS_MAX = 1024
_NAMES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def inherited_sockets(environ: MutableMapping[str, str], pid: int, *, first_fd: int = FIRST_FD) -> list[
    tuple[str, socket.socket]
]:
    """Take the sockets over, each with its name; none if they are for another process, or there are none.

    The variables are removed: a child of ours must not take them for its own. UsageError, naming the descriptor, for
    one that is no listening stream socket: all are closed then.
    """
    named = {name: environ.pop(name, "") for name in _NAMES}
    if named["LISTEN_PID"] != str(pid):
        return []
    count = named["LISTEN_FDS"]
    if not count.isascii() or not count.isdigit() or not 1 <= int(count[:5]) <= _FDS_MAX:
        raise UsageError(f"LISTEN_FDS is {count!r}, not a number of sockets")
    fds = range(first_fd, first_fd + int(count))
    names = named["LISTEN_FDNAMES"].split(":") if named["LISTEN_FDNAMES"] else []
    found: list[tuple[str, socket.socket]] = []
    try:
        for index, fd in enumerate(fds):
            name = names[index] if index < len(names) else "unknown"
            found.append((name, _listening(fd, name)))
    except UsageError:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        for _name, sock in found:
            sock.detach()
        raise
    return found


def _listening(fd: int, name: str) -> socket.socket:
    what = f"descriptor {fd} (LISTEN_FDNAMES: {name}), inherited from the service manager,"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"{what} is no socket: {error.strerror}") from error
    try:
        if sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            raise UsageError(f"{what} is neither a unix nor a TCP socket")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise UsageError(f"{what} does not listen")
        sock.setblocking(False)
    except BaseException:
        sock.detach()               # who opened it closes it
        raise
    return sock
