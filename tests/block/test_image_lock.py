"""One writer alone or any number of readers: in this process, in another, and against QEMU's tools."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from homeloop.block.file import File
from homeloop.block.opening import open_device
from homeloop.errors import BlockError

OTHER_PROCESS = """
import sys
from homeloop.block.file import File
from homeloop.errors import BlockError
try:
    File(sys.argv[1], read_only=sys.argv[2] == "reader")
except BlockError as error:
    print(error)
    sys.exit(error.errno)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("writer", "writer", "a second writer would destroy it"),
        ("writer", "reader", "another program may write to it"),
        ("reader", "writer", "the image is in use"),
        ("reader", "reader", None),
    ],
)
@pytest.mark.parametrize("where", ["same process", "other process"])
def test_who_excludes_whom(image: Path, where: str, first: str, second: str, refused: str | None) -> None:
    holder = File(image, read_only=first == "reader")
    try:
        if where == "same process":
            if refused is None:
                File(image, read_only=second == "reader").close()
                return
            with pytest.raises(BlockError) as caught:
                File(image, read_only=second == "reader")
            number, said = caught.value.errno, str(caught.value)
        else:
            done = subprocess.run(
                [sys.executable, "-c", OTHER_PROCESS, str(image), second],
                capture_output=True, text=True, timeout=30, check=False, env={"PYTHONPATH": ":".join(sys.path)},
            )
            number, said = done.returncode, done.stdout
            if refused is None:
                assert number == 0, done.stderr
                return
        assert number == errno.EBUSY
        assert str(image) in said
        assert refused in said
    finally:
        holder.close()


def test_closing_unlocks(image: Path) -> None:
    for _ in range(2):
        File(image).close()


def test_refused_open_leaves_the_holder_locked(image: Path) -> None:
    """Process-wide POSIX locks would be lost here: closing any descriptor of the file drops them all."""
    holder = File(image)
    for _ in range(2):
        with pytest.raises(BlockError, match="in use"):
            File(image)
    holder.close()


def test_device_close_unlocks(image: Path) -> None:
    device = open_device(str(image))
    with pytest.raises(BlockError, match="in use"):
        open_device(str(image))
    asyncio.run(device.close())
    asyncio.run(open_device(str(image)).close())


@pytest.mark.foreign("qemu-io")
@pytest.mark.skipif(sys.platform != "linux", reason="QEMU locks with open file description locks on Linux only")
@pytest.mark.parametrize(("ours", "refused"), [("writer", True), ("reader", True), (None, False)])
def test_qemu_is_refused_our_image(image: Path, ours: str | None, refused: bool) -> None:
    holder = None if ours is None else File(image, read_only=ours == "reader")
    command = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if holder is not None:
        holder.close()
    assert ("lock" in done.stderr) is refused, done.stderr
    assert (done.returncode != 0) is refused


@pytest.mark.foreign("qemu-io")
@pytest.mark.skipif(sys.platform != "linux", reason="QEMU locks with open file description locks on Linux only")
@pytest.mark.parametrize("read_only", [False, True])
def test_we_are_refused_qemus_image(image: Path, read_only: bool) -> None:
    command = ["qemu-io", "-f", "raw", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write("length\n")
        qemu.stdin.flush()
        while "1 MiB" not in (line := qemu.stdout.readline()):      # its answer: the image is open
            assert line, "qemu-io ended"
        with pytest.raises(BlockError, match="in use"):
            File(image, read_only=read_only)
        qemu.stdin.write("quit\n")
        qemu.stdin.flush()
        assert qemu.wait(30) == 0
    File(image, read_only=read_only).close()
