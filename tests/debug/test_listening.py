"""A program answers at its socket, also when its loops hang; the socket is its user's alone."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import homeloop
from homeloop.cli.ps import ask
from homeloop.debug.listening import listen, runtime_folder
from homeloop.errors import UsageError
from homeloop.testing.leaks import leak_check
from tests.cli.running import LIMIT_S, environment


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "homeloop"


def test_it_answers_and_leaves_nothing(own_folder: Path) -> None:
    with leak_check():
        with listen() as listening:
            assert listening.path == own_folder / f"{os.getpid()}.sock"
            assert stat.S_IMODE(listening.path.stat().st_mode) == 0o600
            assert stat.S_IMODE(own_folder.stat().st_mode) == 0o700
            listening.sources["more"] = lambda: {"x": 1}
            for _ in range(3):
                assert ask(listening.path)["more"] == {"x": 1}
        listening.close()
        assert not listening.path.exists()


def test_a_loop_that_hangs_is_shown() -> None:
    """Where nothing of the program's own would answer any more."""
    hanging, go = threading.Event(), threading.Event()

    async def hangs() -> None:
        hanging.set()
        go.wait(LIMIT_S)

    with listen() as listening, homeloop.Runtime(name="app") as rt:
        co = rt.main.spawn(hangs(), name="it hangs")
        assert hanging.wait(LIMIT_S)
        with rt.main.lock:
            (context,) = [one for one in ask(listening.path)["contexts"] if one["name"] == "app-main"]
        assert context["big_lock"]["holder"] == "app-main"
        go.set()
        co.result(LIMIT_S)


def test_a_forked_child_that_ends_leaves_it_alone(own_folder: Path) -> None:
    """Its atexit runs close(): of the parent's socket."""
    code = (
        "import os, sys, homeloop\n"
        "from homeloop.cli.ps import ask\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert ask(sys.argv[1])['pid'] == os.getpid()\n"
    )
    path = str(own_folder) + ".sock"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, path], env=environment(HOMELOOP_DEBUG_SOCKET=path), check=True,
        timeout=LIMIT_S,
    )


def test_a_source_that_fails_costs_only_itself() -> None:
    def broken() -> object:
        raise KeyError("torn")

    with listen() as listening:
        listening.sources["broken"] = broken
        shown = ask(listening.path)
        assert shown["error"] == "KeyError: 'torn'"
        assert shown["pid"] == os.getpid()


def test_who_asks_and_goes_is_no_event() -> None:
    with listen() as listening:
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(listening.path))
        assert ask(listening.path)["pid"] == os.getpid()


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    """A living one is not replaced, a dead one's file is, and what is no socket stays."""
    with listen(tmp_path / "s"):
        with pytest.raises(OSError):
            listen(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with listen(tmp_path / "s") as listening:
        assert ask(listening.path)["pid"] == os.getpid()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        listen(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_others_may_write_to_is_refused(own_folder: Path) -> None:
    own_folder.mkdir(mode=0o777)
    own_folder.chmod(0o777)
    with pytest.raises(UsageError, match="not a folder for this user only"):
        runtime_folder()


def test_the_environment_asks(own_folder: Path) -> None:
    """Whoever imports homeloop then answers; its socket goes with it."""
    code = "import homeloop, sys; print('ready', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(HOMELOOP_DEBUG_SOCKET="1"), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert ask(own_folder / f"{process.pid}.sock")["pid"] == process.pid
        process.communicate(timeout=LIMIT_S)
        assert list(own_folder.iterdir()) == []
    finally:
        process.kill()
        process.communicate()
