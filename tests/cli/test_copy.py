"""`homeloop copy`: what it says, its exit status, Ctrl-C, the bar."""

from __future__ import annotations

import argparse
import importlib
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from homeloop.cli import copy as copy_module
from homeloop.cli.copy import Bar, plan_of
from homeloop.cli.main import main
from homeloop.errors import UsageError
from homeloop.nbd.copying import CopyPlan, Moved
from tests.cli.running import LIMIT_S, Running, environment

Start = Callable[..., Running]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    with path.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(3 << 20)
    return path


def test_copy_and_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert main(["copy", str(source), str(target), "--verify"]) == 0
    said, complained = capsys.readouterr()
    first, second = said.splitlines()
    assert first.startswith("copied 3.0 MiB in ")
    assert first.endswith(", 1.0 MiB of data and 2.0 MiB of zeroes")
    assert second.startswith("identical: 3.0 MiB in ")
    assert complained == ""                         # stderr is no terminal: no bar
    assert target.read_bytes() == source.read_bytes()
    assert main(["copy", str(source), str(target), "--compare-only", "--connections", "1"]) == 0


class AtHome:
    """A device with coroutines that insist on one home."""

    size = 3 << 20
    data = bytearray(3 << 20)
    homes: ClassVar[set[str]] = set()

    async def read(self, offset: int, length: int) -> bytes:
        self.homes.add(threading.current_thread().name)
        return bytes(self.data[offset:offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        self.homes.add(threading.current_thread().name)
        self.data[offset:offset + len(data)] = data

    async def close(self) -> None:
        self.homes.add(threading.current_thread().name)


def test_a_device_has_one_home(source: Path) -> None:
    """Written, read to verify, and closed there."""
    assert main(["copy", str(source), f"python:{__name__}:AtHome", "--verify"]) == 0
    device = importlib.import_module(__name__).AtHome
    assert bytes(device.data) == source.read_bytes()
    assert len(device.homes) == 1
    assert main(["copy", str(source), "memory:3M", "--verify"]) == 0


def test_they_differ(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.write_bytes(source.read_bytes() + b"more")
    assert main(["copy", str(source), str(target)]) == 0
    assert "the last 4 B of the target are as they were" in capsys.readouterr().out
    with target.open("r+b") as file:
        file.seek(12345)
        byte = file.read(1)[0]
        file.seek(12345)
        file.write(bytes([byte ^ 1]))
    assert main(["copy", str(source), str(target), "--compare-only"]) == 1
    assert capsys.readouterr().err == f"homeloop copy: {source} and {target} differ at byte 12345\n"


@pytest.mark.parametrize(("arguments", "status", "said"), [
    ("a", 2, "the following arguments are required: TARGET"),
    ("memory:1M memory:512k", 2, "the target memory:512k has 524288 bytes, the source memory:1M 1048576"),
    ("memory:1M memory:1M --connections 0", 2, "--connections 0: it must be from 1 to 16"),
    ("memory:1M memory:1M --requests 9999", 2, "--requests 9999: it must be from 1 to 1024"),
    ("memory:1M memory:1M --request-size 1000", 2, "--request-size 1000: a multiple of 512"),
    ("memory:1M memory:1M --verify --compare-only", 2, "--compare-only: not allowed with argument --verify"),
    ("/nonexistent/x memory:1M", 1, "cannot open /nonexistent/x: No such file or directory"),
    ("memory:1M /nonexistent/x", 1, "cannot open /nonexistent/x: No such file or directory"),
    ("nbd+unix:///?socket=/nonexistent/s memory:1M", 1,
     "cannot connect to nbd+unix:///?socket=/nonexistent/s: No such file or directory"),
    ("memory:1M nbd+unix:///", 2, "NBD URI 'nbd+unix:///'"),
])
def test_refused(arguments: str, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        ended = main(["copy", *arguments.split()])
    except SystemExit as end:
        ended = int(end.code or 0)
    out, errors = capsys.readouterr()
    assert (ended, out) == (status, "")
    assert errors.startswith(f"homeloop copy: {said}"), errors


def test_plan() -> None:
    options = argparse.Namespace(
        connections=3, requests=5, request_size=4096, no_sparse=True, detect_zeroes=True, no_flush=True)
    assert plan_of(options) == CopyPlan(
        lanes=3, requests=5, request_bytes=4096, sparse=False, detect_zeroes=True, flush=False)
    options.request_size = 1 << 30
    with pytest.raises(UsageError):
        plan_of(options)


def test_between_exports(running_server: Callable[..., tuple[Running, str]], source: Path, tmp_path: Path,
                         start: Start) -> None:
    """The command as a process, from one server to another and back to a file."""
    _, first = running_server(str(source))
    _, second = running_server("memory:3M")
    assert start("copy", first, second, "--verify").status() == 0
    back = start("copy", second, str(tmp_path / "back"))
    assert back.status() == 0, back
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


class Endless:
    """A source that never ends, and says when it has begun."""

    size = 1 << 60
    thread_model = "inline"
    said = False

    def read(self, _offset: int, length: int) -> bytes:
        if not self.said:
            self.said = True
            print("reading", flush=True)
        return bytes(length)


def test_serve_an_export_again(running_server: Callable[..., tuple[Running, str]], source: Path,
                               tmp_path: Path) -> None:
    """`homeloop serve nbd+unix://...`: named as the export is, and copied through both."""
    _, far = running_server(str(source))
    proxy, near = running_server(far)
    assert "/source?socket=" in near
    assert main(["copy", near, str(tmp_path / "copied")]) == 0
    assert (tmp_path / "copied").read_bytes() == source.read_bytes()
    assert proxy.end() == 0


def test_ctrl_c(start: Start) -> None:
    """In order: what is in flight ends, exit status 130, and a sentence."""
    copying = start("copy", f"python:{__name__}:Endless", f"null:{1 << 60}")
    copying.wait_for("reading")
    copying.send(signal.SIGINT)
    assert copying.status() == 130
    assert copying.complained == [
        "homeloop copy: ending what is in flight; Ctrl-C again gives up on that",
        "homeloop copy: interrupted; the target is not complete",
    ]


def test_the_bar_on_a_terminal(source: Path, tmp_path: Path) -> None:
    """On stderr, and taken away at the end; stdout has the summary."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "homeloop", "copy", str(source), str(tmp_path / "target")],
            stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL, timeout=LIMIT_S,
            env=environment(TERM="xterm"), check=True,
        )
        os.close(theirs)
        theirs = -1
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:                         # Linux: the other end is closed
                break
            if not part:
                break
            shown += part
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    assert b"copying [" in shown
    assert shown.endswith(b"\r\x1b[K")
    assert done.stdout.startswith(b"copied 3.0 MiB")


def test_the_bars_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module.time, "monotonic", lambda: 2.0)
    bar = Bar("copying", 4 << 20)
    bar.moved += [Moved(data=1 << 20), Moved(zeroes=1 << 19, skipped=1 << 19)]
    assert bar.line(100) == f"copying [{'#' * 20}{' ' * 20}]  50 %  2.0 MiB of 4.0 MiB  1.0 MiB/s"
    assert len(bar.line(30)) == 29
    assert "100 %" in Bar("copying", 0).line(80)
