"""homeloop.block.file_systems: files that are memory, and what is not known to be."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from homeloop.block import file as block_file
from homeloop.block.device import Device
from homeloop.block.file import File
from homeloop.block.file_systems import is_in_memory
from tests.block.images import need_nowait_reads

SIZE = 1 << 20


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder of a file system that is memory."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def mounts_of(tmp_path: Path, *lines: str) -> str:
    mounts = tmp_path / "mounts"
    mounts.write_text("".join(f"{line}\n" for line in lines))
    return str(mounts)


def test_what_the_mounts_say(tmp_path: Path) -> None:
    with open(os.devnull, "rb") as file:
        device = os.fstat(file.fileno()).st_dev
        ours = f"{os.major(device)}:{os.minor(device)}"
        for kind, expected in (("tmpfs", True), ("ramfs", True), ("ext4", False), ("", False)):
            line = f"25 24 {ours} / /x rw,relatime shared:2 - {kind} source rw"
            mounts = mounts_of(tmp_path, f"24 1 9{ours} / / rw - tmpfs none rw", "", "nonsense", line)
            assert is_in_memory(file.fileno(), mounts) is expected
        assert not is_in_memory(file.fileno(), mounts_of(tmp_path, "1 2 9:9 / / rw - tmpfs none rw"))
        assert not is_in_memory(file.fileno(), str(tmp_path / "missing"))


def test_a_file_in_memory_is_read_and_written_inline(in_memory: Path) -> None:
    image = in_memory / "image"
    image.write_bytes(bytes(SIZE))

    async def main() -> None:
        device = Device(File(image))
        assert device.write(5, b"data") is None
        assert device.write(SIZE - 70_000, b"x" * 70_000) is None
        assert device.read(0, 16) == b"\0" * 5 + b"data" + b"\0" * 7
        os.truncate(image, 4096)
        answer = device.read(0, 8192)       # shorter than it was: a worker finds out what is wrong
        assert asyncio.iscoroutine(answer)
        with pytest.raises(Exception, match="ends at 4096"):
            await answer
        await device.close()

    with image.open("rb") as file:
        if not is_in_memory(file.fileno()):
            pytest.skip("/dev/shm is not known to be memory")
    asyncio.run(main())


def test_a_file_on_a_disk_keeps_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a quick path would wait for the disk."""
    need_nowait_reads(tmp_path)
    monkeypatch.setattr(block_file, "is_in_memory", lambda _fd: False)
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    flags: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[bytearray], offset: int, flag: int) -> int:
        flags.append(flag)
        return real(fd, buffers, offset, flag)

    monkeypatch.setattr(os, "preadv", preadv)
    file = File(image)
    file.read_nowait(0, 4096)
    file.close()
    assert flags == [os.RWF_NOWAIT]
