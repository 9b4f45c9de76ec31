"""A socket at which a running program answers with its picture: `homeloop ps` asks there.

    connect -> one JSON object, one line -> closed

A plain thread answers: it needs no loop, no big lock, and so answers also for a program that hangs. The socket is for
its user only: it has mode 0600, in a folder of mode 0700.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from homeloop.debug.picture import picture
from homeloop.errors import UsageError

__all__ = ["ENVIRONMENT", "Listening", "listen", "listen_if_asked", "runtime_folder"]

ENVIRONMENT: Final = "HOMELOOP_DEBUG_SOCKET"        # a path, or 1 for the usual place
_SEND_S: Final = 5.0                                # for who asks to take the answer
_BACKLOG: Final = 8


def runtime_folder() -> Path:
    """Return the folder of all such sockets of this user, made if it is missing.

    UsageError if somebody else owns it or could write there.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        folder = Path(runtime, "homeloop")
    else:
        folder = Path(tempfile.gettempdir(), f"homeloop-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError(f"{folder} is not a folder for this user only")
    return folder


def listen(path: str | os.PathLike[str] | None = None) -> Listening:
    """Answer at this path, or in the usual place, until close(). Any thread.

    OSError if nobody can listen there, UsageError for a place that others could write to.
    """
    if path is None:
        return Listening(runtime_folder() / f"{os.getpid()}.sock")
    return Listening(Path(path))


def listen_if_asked() -> Listening | None:
    """What HOMELOOP_DEBUG_SOCKET asks for; None if nothing, or if it cannot be: a program runs without, too."""
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return None
    try:
        found = listen(None if wanted == "1" else wanted)
    except (OSError, UsageError):
        return None
    atexit.register(found.close)
    return found


class Listening:
    """The open socket. `with` it, or close() it: any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sources: dict[str, Callable[[], object]] = {}      # more for the picture: called in our thread
        self._sock = socket.socket(socket.AF_UNIX)
        try:
            # A process that died may have left its file; one that lives has another number.
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
                    os.unlink(path)
            self._sock.bind(str(path))
            os.chmod(path, 0o600)
            self._sock.listen(_BACKLOG)
        except BaseException:
            self._sock.close()
            raise
        self._pid = os.getpid()
        self._closing = threading.Event()                       # set by close(), before it wakes the thread
        self._thread = threading.Thread(target=self._serve, name="homeloop-debug", daemon=True)
        self._thread.start()

    def __enter__(self) -> Listening:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer no more, remove the socket's file, join the thread. Any thread; twice is fine.

        In a forked child: the socket is the parent's still, and answers there.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if os.getpid() != self._pid:
            self._sock.close()
            return
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)               # ends accept()
        self._thread.join()
        self._sock.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._sock.accept()
            except OSError:
                self._closing.wait(0.1)                         # short of descriptors: not in a tight loop
                continue
            with client, contextlib.suppress(OSError):
                client.settimeout(_SEND_S)
                client.sendall(self._answer())

    def _answer(self) -> bytes:
        shown: dict[str, Any] = {}
        try:
            shown = picture()
            for name, source in list(self.sources.items()):
                shown[name] = source()
        except Exception as error:                              # it is torn while it moves: say so, and go on
            shown["error"] = f"{type(error).__name__}: {error}"
        return json.dumps(shown, default=repr).encode() + b"\n"


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True
