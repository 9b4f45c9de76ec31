"""`homeloop demo`: right hashes are 0, any wrong one is 1; images of any size; other clients present or not."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.driver import BytesLike
from homeloop.block.opening import open_device
from homeloop.cli import clients
from homeloop.cli import demo as demonstration
from homeloop.cli.main import main
from homeloop.daemon import exporting
from tests.cli.running import Running, environment

MIB = 1 << 20
Output = pytest.CaptureFixture[str]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client of others is installed."""
    monkeypatch.setenv("PATH", "/nonexistent")


def image_of(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


@pytest.mark.usefixtures("alone")
def test_the_whole_of_it(capsys: Output) -> None:
    """Without an image one is made; the report is right, complete, and fits a page of 100 columns."""
    assert main(["demo"]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    assert max(map(len, out.splitlines())) <= 100
    assert "made an image of 64.0 MiB, half of it holes" in out
    assert re.search(r"^  nbd\+unix:///demo\?socket=\S+$", out, re.MULTILINE)
    assert re.search(r"^sha256 of the image  [0-9a-f]{64}$", out, re.MULTILINE)
    assert re.findall(r"^  same   (.*)$", out, re.MULTILINE)[:2] == [
        "client of this process", "coroutine in iothread-0"
    ]
    blocks = re.search(r"^  same   (\d+) blocks read by 3 plain threads$", out, re.MULTILINE)
    assert blocks is not None
    assert int(blocks[1]) >= 3 * demonstration.BLOCKS_MIN
    assert "WRONG" not in out
    assert "  nbdcopy left out: not installed (Debian: libnbd-bin)\n" in out
    assert "  qemu-img left out: not installed (Debian: qemu-utils)\n" in out
    counts = dict(re.findall(r"^  (\S.*?) {2,}(\d+)$", out, re.MULTILINE))
    # The counting of each block at least; a call that waits for one may be driven to its end, too.
    assert int(counts["call() that ended in the calling thread"]) >= int(blocks[1])
    assert int(counts["thread switches saved"]) > 2 * int(blocks[1])
    assert int(counts["entered directly, on the waking thread"]) > 0
    assert re.search(r"^  client of this process +[\d.]+ [MG]iB/s$", out, re.MULTILINE)


@pytest.mark.foreign("nbdcopy", "qemu-img")
def test_with_the_clients_of_others(capsys: Output, tmp_path: Path) -> None:
    """Their copies have the same hash, and are gone afterwards."""
    image = image_of(tmp_path / "disk.img", 2 * MIB)
    assert main(["demo", str(image)]) == 0
    out = capsys.readouterr().out
    assert hashlib.sha256(image.read_bytes()).hexdigest() in out
    assert re.findall(r"^  same   (\S+)$", out, re.MULTILINE) == ["nbdcopy", "qemu-img"]
    assert len(re.findall(r"^  (?:nbdcopy|qemu-img) +[\d.]+ [KMG]iB/s$", out, re.MULTILINE)) == 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("size", [0, 1, 511, 4095, 4096, 4097, 5000, MIB + 1])
def test_images_of_any_size(capsys: Output, tmp_path: Path, size: int) -> None:
    """Empty, smaller than a block, with a piece at the end; the image is not touched."""
    image = image_of(tmp_path / "disk.img", size)
    image.chmod(0o444)
    before = image.read_bytes(), image.stat().st_mtime_ns
    assert main(["demo", str(image)]) == 0
    out = capsys.readouterr().out
    assert f"serving {size} byte{'' if size == 1 else 's'}, at home in iothread-0" in out
    assert hashlib.sha256(before[0]).hexdigest() in out
    assert f"{'300' if size else '0'} blocks read by 3 plain threads" in out or size > 4096
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


@pytest.mark.foreign("qemu-img")
def test_an_end_that_qemu_fills_up(capsys: Output, tmp_path: Path) -> None:
    """Not a multiple of 512 bytes: qemu-img copies it, its padding is no difference."""
    image = image_of(tmp_path / "disk.img", 5000)
    assert main(["demo", str(image)]) == 0
    out = capsys.readouterr().out
    assert "qemu-img left out" not in out
    assert "same   qemu-img" in out


def test_no_room_for_a_copy(
    capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is larger than what is free in the temporary folder: streamed through, and not copied there."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: types.SimpleNamespace(free=1))
    image = image_of(tmp_path / "disk.img", 4096)
    assert main(["demo", str(image)]) == 0
    out = capsys.readouterr().out
    assert "nbdcopy left out: the temporary folder has 1 B free, and it would copy 4.0 KiB" in out
    assert "qemu-img left out: the temporary folder has 1 B free" in out


@pytest.mark.usefixtures("alone")
def test_a_large_image_is_streamed(capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a few pieces are in memory: no read is larger, nor are more of them in flight."""
    seen: list[int] = []
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(96 * MIB)

    class Watched(Device):
        def read(self, offset: int, length: int, caller: Any = None) -> Any:
            seen.append(length)
            return super().read(offset, length, caller)

    def opened(_spec: str, **options: Any) -> Device:
        device = open_device(f"file:{image}", **options)
        device.__class__ = Watched
        return device

    monkeypatch.setattr(exporting, "open_device", opened)
    assert main(["demo", str(image)]) == 0
    assert sum(seen) >= 2 * 96 * MIB        # the copy, and the coroutine at home
    assert max(seen) == demonstration.PIECE_BYTES
    assert demonstration.PIECE_BYTES * demonstration.IN_FLIGHT <= 8 * MIB


class Corrupt:
    """Zeroes, but for one byte in the middle, as long as reads come in one of the given lengths."""

    def __init__(self, size: int, lengths: set[int]) -> None:
        self.size = size
        self._lengths = lengths
        self.thread_model = "inline"

    def read(self, offset: int, length: int) -> BytesLike:
        data = bytearray(length)
        at = self.size // 2
        if length in self._lengths and offset <= at < offset + length:
            data[at - offset] = 1
        return data


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("lengths", "wrong"),
    [
        ({demonstration.PIECE_BYTES}, ["client of this process", "coroutine in iothread-0"]),
        ({demonstration.BLOCK_BYTES}, ["blocks read by 3 plain threads"]),
    ],
    ids=["the copies", "the plain threads"],
)
def test_a_wrong_byte_is_found(
    capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: set[int], wrong: list[str]
) -> None:
    """A device that corrupts: exit 1, and WRONG beside each that saw it."""
    size = demonstration.PIECE_BYTES        # 64 blocks: a hundred reads by each thread hit the one
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(size))
    monkeypatch.setattr(
        exporting, "open_device", lambda _spec, **_options: Device(Corrupt(size, lengths), read_only=True)
    )
    assert main(["demo", str(image)]) == 1
    out = capsys.readouterr().out
    assert [re.sub(r"^\d+ ", "", line) for line in re.findall(r"^  WRONG  (.*)$", out, re.MULTILINE)] == wrong


@pytest.mark.usefixtures("alone")
def test_a_device_that_fails(capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error ends it with a sentence and 1; the plain threads that met it first do not hang it."""
    image = image_of(tmp_path / "disk.img", MIB)

    class Broken:
        size = MIB

        def read(self, offset: int, length: int) -> BytesLike:
            raise OSError(5, "bad sector")

    monkeypatch.setattr(exporting, "open_device", lambda _spec, **_options: Device(Broken()))
    assert main(["demo", str(image)]) == 1
    out, errors = capsys.readouterr()
    assert "sha256" not in out
    assert re.fullmatch(r"homeloop demo: READ of \d+ bytes at \d+: the server says .*\n", errors)


def fake_client(folder: Path, name: str, script: str) -> Path:
    """A program of that name that is first on the PATH."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo 'no such export' >&2; exit 3", "nbdcopy failed: no such export"),
        ("exit 3", "nbdcopy failed: exit status 3"),
        ("printf wrong > $2", None),
    ],
)
def test_a_client_that_fails(
    capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, note: str | None
) -> None:
    """Exit 1: what it said is in the report; also when its copy is wrong and it says nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_client(tmp_path, "nbdcopy", script)
    image = image_of(tmp_path / "disk.img", 4096)
    assert main(["demo", str(image)]) == 1
    out = capsys.readouterr().out
    assert "  WRONG  nbdcopy\n" in out
    assert note is None or f"  {note}\n" in out


def test_a_client_that_hangs_is_given_up(
    capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No progress for a while: killed, and the report says where it stood."""
    monkeypatch.setattr(demonstration, "STALLED_S", 0.3)
    fake_client(tmp_path, "nbdcopy", "exec sleep 1000")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(demonstration, "FOREIGN", [clients.FOREIGN[0]])
    image = image_of(tmp_path / "disk.img", 4096)
    assert main(["demo", str(image)]) == 1
    assert "  nbdcopy failed: nothing read for 0 s, at 0 of 4096 bytes\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ended_while_a_client_copies(
    start: Callable[..., Running], tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    """Ctrl-C or SIGTERM: the other program is killed, nothing is left in the temporary folder."""
    temporary, programs, fifo = tmp_path / "tmp", tmp_path / "bin", tmp_path / "fifo"
    temporary.mkdir()
    programs.mkdir()
    os.mkfifo(fifo)
    # The reader of the FIFO sees the program's end: it has the other end open, and nobody else.
    fake_client(programs, "nbdcopy", f"exec >{fifo}; echo here; exec sleep 1000")
    image = image_of(tmp_path / "disk.img", 4096)
    path = f"{programs}:{os.environ['PATH']}"
    demo = start("demo", str(image), env=environment(PATH=path, TMPDIR=str(temporary)))
    with open(fifo) as client:
        assert client.readline() == "here\n"
        demo.send(number)
        assert client.read() == ""
    assert demo.status() == status
    assert demo.complained == [f"homeloop demo: {word}"]
    assert list(temporary.iterdir()) == []
