"""A kernel's file system on our devices: nbdfuse makes a file of an export, a loop device a disk of it, then ext4.

Needs root, /dev/fuse and loop devices: skipped, by the name of what is missing, where these are not. The programs must
be there in CI.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.faults import Faults
from homeloop.testing.nbd_serving import NbdServing, ServedDevice

LIMIT_S = 40.0
SIZE = 32 << 20
MARK = b"the bytes that are looked for.." * 200


def openable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


MISSING = [path for path in ("/dev/fuse", "/dev/loop-control") if not openable(path)]
pytestmark = [
    pytest.mark.foreign("nbdfuse", "fusermount3", "mke2fs", "e2fsck", "losetup", "mount", "fstrim"),
    pytest.mark.skipif(bool(MISSING), reason=f"cannot be opened here: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount"),
]


def tell(*command: str | Path, status: tuple[int, ...] = (0,)) -> str:
    """Run a program; return what it printed, fail with that if it ended otherwise."""
    args = [str(part) for part in command]
    done = subprocess.run(args, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode in status, f"{args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def disk_of(uri: str, folder: Path) -> Iterator[str]:
    """A loop device over the export. At its end nothing of it is cached anywhere."""
    folder.mkdir(exist_ok=True)
    fuse = subprocess.Popen(["nbdfuse", str(folder / "disk"), uri])
    with contextlib.ExitStack() as stack:
        stack.callback(fuse.wait, LIMIT_S)
        stack.callback(subprocess.run, ["fusermount3", "-u", "-z", str(folder)], check=False, timeout=LIMIT_S)
        again = threading.Event()
        for _ in range(int(LIMIT_S / 0.02)):
            if (folder / "disk").exists():
                break
            assert fuse.poll() is None, "nbdfuse has ended"
            again.wait(0.02)
        loop = tell("losetup", "--find", "--show", folder / "disk").strip()
        stack.callback(tell, "losetup", "--detach", loop)
        yield loop


@contextlib.contextmanager
def mounted(loop: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    tell("mount", "-t", "ext4", "-o", "errors=continue", loop, folder)
    try:
        yield folder
    finally:
        tell("umount", folder)


def fill(folder: Path, seed: int) -> dict[str, bytes]:
    """Files of many sizes, some removed and some made longer; what must be there then."""
    dice = random.Random(seed)
    wanted: dict[str, bytes] = {}
    for number in range(60):
        path = folder / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        data = dice.randbytes(dice.choice([0, 1, 4096, 50_000, 300_000]))
        path.write_bytes(data)
        wanted[str(path.relative_to(folder))] = data
    for name in dice.sample(sorted(wanted), 20):
        (folder / name).unlink()
        del wanted[name]
    for name in dice.sample(sorted(wanted), 10):
        with (folder / name).open("ab") as file:
            file.write(b"more")
        wanted[name] += b"more"
    return wanted


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
        if path.is_file() and "lost+found" not in path.parts
    }


class Plain:
    """What a user writes in ten lines: on workers, without flush or trim, and in blocks of 512 bytes."""

    size = SIZE
    block_size_min = 512

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: Any) -> None:
        self.data[offset : offset + len(data)] = data


@pytest.mark.parametrize("kind", ["memory", "python class"])
def test_files_on_ext4(kind: str, tmp_path: Path, seed: int) -> None:
    with NbdServing() as serving:
        device = serving.device(Plain() if kind == "python class" else SIZE)
        with disk_of(device.uri, tmp_path / "fuse") as loop:
            tell("mke2fs", "-q", "-t", "ext4", loop)
            with mounted(loop, tmp_path / "mnt") as folder:
                wanted = fill(folder, seed)
            tell("e2fsck", "-fn", loop)
        with disk_of(device.uri, tmp_path / "fuse") as loop, mounted(loop, tmp_path / "mnt") as folder:
            assert files_in(folder) == wanted
            if kind == "memory":
                assert "trimmed" in tell("fstrim", "-v", folder)
        device.save(tmp_path / "image")
        tell("e2fsck", "-fn", tmp_path / "image")
        assert device.faults.count("write") > 20


@contextlib.contextmanager
def formatted(folder: Path) -> Iterator[ServedDevice]:
    """A device with ext4, made where no fault could be."""
    tell("mke2fs", "-q", "-t", "ext4", folder / "made", str(SIZE >> 10))
    with NbdServing() as serving:
        device = serving.device(SIZE)
        device.load(folder / "made")
        yield device


def offset_of(device: ServedDevice, data: bytes) -> int:
    return device.read(0, SIZE).index(data)


def test_ext4_reports_writes_that_fail(tmp_path: Path) -> None:
    """fsync says so; what was there before is there, and the file system is sound but for what failed."""
    with formatted(tmp_path) as device:
        with disk_of(device.uri, tmp_path / "fuse") as loop, mounted(loop, tmp_path / "mnt") as folder:
            (folder / "before").write_bytes(MARK)
            os.sync()
            rule = device.faults.on("write", when=lambda request: MARK[::-1][:512] in bytes(request.data)).error("EIO")
            with (folder / "after").open("wb") as file:
                file.write(MARK[::-1])
                with pytest.raises(OSError, match="error") as caught:
                    os.fsync(file)
            assert caught.value.errno == errno.EIO
            assert device.faults.count(rule) > 0
            rule.remove()
            (folder / "later").write_bytes(MARK)
        device.save(tmp_path / "image")
        tell("e2fsck", "-fy", tmp_path / "image", status=(0, 1))
        with disk_of(device.uri, tmp_path / "fuse") as loop, mounted(loop, tmp_path / "mnt") as folder:
            assert files_in(folder)["before"] == files_in(folder)["later"] == MARK


def test_ext4_reports_reads_that_fail(tmp_path: Path) -> None:
    with formatted(tmp_path) as device:
        with disk_of(device.uri, tmp_path / "fuse") as loop, mounted(loop, tmp_path / "mnt") as folder:
            (folder / "bad").write_bytes(MARK)
            (folder / "good").write_bytes(MARK[::-1])
        at = offset_of(device, MARK[:512])
        rule = device.faults.on("read", at=(at, at + 512)).error("EIO")
        with disk_of(device.uri, tmp_path / "fuse") as loop, mounted(loop, tmp_path / "mnt") as folder:
            with pytest.raises(OSError, match="error") as caught:
                (folder / "bad").read_bytes()
            assert caught.value.errno == errno.EIO
            assert device.faults.count(rule) > 0
            rule.remove()
            assert (folder / "good").read_bytes() == MARK[::-1]
            assert (folder / "bad").read_bytes() == MARK         # the error was not kept anywhere


def test_a_power_cut_under_a_mounted_ext4(tmp_path: Path) -> None:
    """With a volatile cache: what fsync confirmed is there after the crash, and the journal is enough to recover."""
    tell("mke2fs", "-q", "-t", "ext4", tmp_path / "made", str(SIZE >> 10))
    with NbdServing() as serving:
        faults = Faults(seed=1, volatile=True)
        device = serving.device(SIZE, faults=faults)
        device.load(tmp_path / "made")
        with disk_of(device.uri, tmp_path / "fuse") as loop, mounted(loop, tmp_path / "mnt") as folder:
            with (folder / "kept").open("wb") as file:
                file.write(MARK)
                os.fsync(file)
            with (folder / "lost").open("wb") as file:
                file.write(MARK)                        # nobody asked for it to be stable
            faults.crash()
            with (folder / "late").open("wb") as file:
                file.write(MARK)
                with pytest.raises(OSError, match=r"error|Read-only"):
                    os.fsync(file)
        faults.recover()
        device.save(tmp_path / "image")
        assert "recovering journal" in tell("e2fsck", "-fy", tmp_path / "image", status=(0, 1))
        tell("e2fsck", "-fn", tmp_path / "image")
        device.load(tmp_path / "image")
        with disk_of(device.uri, tmp_path / "fuse") as loop, mounted(loop, tmp_path / "mnt") as folder:
            found = files_in(folder)
            assert found["kept"] == MARK
            assert "late" not in found
