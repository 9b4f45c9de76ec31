"""Raw images: opening, the page cache inline, holes, durability, and what may be wrong with a file."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from homeloop.block import file as file_module
from homeloop.block.device import Device
from homeloop.block.file import File
from homeloop.errors import BlockError, UsageError
from tests.block.answers import finish, is_inline
from tests.block.images import allocated_bytes, need_holes, need_nowait_reads

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def drop_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


# Opening


def test_open_and_close(image: Path) -> None:
    file = File(image)
    assert (file.size, file.read_only) == (4 * MIB, False)
    assert repr(file) == f"<File {image} writable size={4 * MIB}>"
    file.close()
    file.close()
    assert "closed" in repr(file)


def test_forgotten_file_warns(image: Path) -> None:
    file: File | None = File(image)
    assert file is not None
    with pytest.warns(ResourceWarning, match="unclosed file"):
        del file
    File(image).close()         # and it is not locked any more


def test_create(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    file = File(path, size=64 * MIB, create=True)
    assert file.size == 64 * MIB
    assert allocated_bytes(path) == 0
    file.close()
    File(path, size=64 * MIB, create=True).close()      # it is there, and of that size
    with pytest.raises(UsageError, match=rf"has {64 * MIB} bytes, not {32 * MIB}"):
        File(path, size=32 * MIB, create=True)
    assert path.stat().st_size == 64 * MIB              # never cut


def test_create_needs_a_size(tmp_path: Path) -> None:
    with pytest.raises(BlockError) as caught:
        File(tmp_path / "new.img", create=True)
    assert caught.value.errno == errno.ENOENT


def test_create_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncate(fd: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", truncate)
    path = tmp_path / "huge.img"
    with pytest.raises(BlockError, match="cannot make") as caught:
        File(path, size=(1 << 63) - 1, create=True)
    assert caught.value.errno == errno.EFBIG
    assert not path.exists()


def test_size_of_what_is_there_must_be_right(image: Path) -> None:
    File(image, size=4 * MIB).close()
    with pytest.raises(UsageError, match=f"has {4 * MIB} bytes, not 5"):
        File(image, size=5)
    File(image).close()         # not left locked


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_impossible_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"a size of {size} bytes"):
        File(tmp_path / "x", size=size, create=True)


def test_create_read_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="read-only"):
        File(tmp_path / "x", size=5, create=True, read_only=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_image(tmp_path: Path, read_only: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null")):              # opening the FIFO must not wait for its other end
        with pytest.raises(UsageError, match="neither a regular file nor a block device"):
            File(path, read_only=read_only)
    with pytest.raises(UsageError if read_only else BlockError, match=str(tmp_path)):
        File(tmp_path, read_only=read_only)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(BlockError, match=r"cannot open .*missing: No such file") as caught:
        File(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(BlockError) as caught:
        File(tmp_path / "missing" / "disk", size=5, create=True)
    assert caught.value.errno == errno.ENOENT


# Reads


def test_cached_read_is_inline(image: Path) -> None:
    need_nowait_reads(image.parent)

    data = image.read_bytes()

    async def main() -> None:
        device = Device(File(image))
        for offset, length in ((0, 4096), (1, 1), (4095, 8194), (MIB, 256 * 1024), (0, 4 * MIB)):
            await finish(device.read(offset, length))           # warms
            answer = device.read(offset, length)
            assert is_inline(answer)
            assert bytes(answer) == data[offset : offset + length]      # type: ignore[arg-type]
        await device.close()

    asyncio.run(main())


def test_uncached_read_goes_to_a_worker(image: Path) -> None:
    need_nowait_reads(image.parent)

    data = image.read_bytes()

    async def main() -> None:
        drop_cache(image)
        device = Device(File(image))
        answer = device.read(MIB, 4096)
        if is_inline(answer):
            pytest.skip("the file system keeps what it was told to drop")
        assert await finish(device.read(MIB, 4096)) == data[MIB : MIB + 4096]
        drop_cache(image)
        assert bytes(await finish(device.read(0, 4 * MIB))) == data
        await device.close()

    asyncio.run(main())


class Fake:
    """Stands for os.preadv or os.pwritev: gives the answers it was told, then does the real thing."""

    def __init__(self, real: Any, answers: list[Any]) -> None:
        self.real = real
        self.answers = answers
        self.calls = 0

    def __call__(self, fd: int, buffers: Any, offset: int, flags: int) -> int:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, OSError):
            raise answer
        if answer is not None:
            return self.real(fd, [memoryview(buffers[0])[:answer]], offset)     # type: ignore[no-any-return]
        return self.real(fd, buffers, offset)                                   # type: ignore[no-any-return]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this platform has no RWF_NOWAIT")
def test_short_quick_read_is_read_again(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", Fake(os.preadv, [100, BlockingIOError()]))
    file = File(image)
    assert file.read_nowait(0, 4096) is None
    assert file.read_nowait(0, 4096) is None
    assert file.read_nowait(0, 4096) == image.read_bytes()[:4096]
    file.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this platform has no RWF_NOWAIT")
def test_quick_read_not_supported_is_asked_once(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(os.preadv, [OSError(errno.EOPNOTSUPP, "no")])
    monkeypatch.setattr(os, "preadv", fake)
    file = File(image)
    assert [file.read_nowait(0, 10) for _ in range(3)] == [None] * 3
    assert fake.calls == 1
    file.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this platform has no RWF_NOWAIT")
def test_failing_quick_read_is_left_to_the_worker(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", Fake(os.preadv, [OSError(errno.EIO, "bad sector")]))
    file = File(image)
    assert file.read_nowait(0, 10) is None
    assert file.read_nowait(0, 10) is not None
    file.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this platform has no RWF_NOWAIT")
def test_misses_in_a_row_stop_the_asking(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(os.preadv, [BlockingIOError() for _ in range(9)])
    monkeypatch.setattr(os, "preadv", fake)
    file = File(image)
    file._reading = 1               # as if a worker stood in read()
    for _ in range(8):
        assert file.read_nowait(0, 10) is None
    assert fake.calls == 8
    for _ in range(16):
        assert file.read_nowait(0, 10) is None
    assert fake.calls == 8
    assert file.read_nowait(0, 10) is None      # the ninth miss: still none of it cached
    assert fake.calls == 9
    for _ in range(16):
        file.read_nowait(0, 10)
    assert file.read_nowait(0, 10) is not None
    assert fake.calls == 10
    assert file.read_nowait(0, 10) is not None  # a hit: asked each time again
    file.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this platform has no RWF_NOWAIT")
def test_one_read_at_a_time_always_asks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(os.preadv, [BlockingIOError() for _ in range(50)])
    monkeypatch.setattr(os, "preadv", fake)
    file = File(image)
    for _ in range(50):
        assert file.read_nowait(0, 10) is None
        assert len(file.read(0, 10)) == 10
    assert fake.calls == 50
    file.close()


def test_short_reads_are_completed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 1000), offset))
    file = File(image)
    assert file.read(10, 4096) == image.read_bytes()[10:4106]
    file.close()


def test_image_that_was_cut(image: Path) -> None:
    async def main() -> None:
        device = Device(File(image))
        os.truncate(image, 5000)
        with pytest.raises(BlockError, match=rf"ends at 5000: it had {4 * MIB} bytes") as caught:
            await finish(device.read(4096, 4096))
        assert caught.value.errno == errno.EIO
        await device.close()

    asyncio.run(main())


# Writes


def test_writes_arrive(image: Path) -> None:
    async def main() -> None:
        device = Device(File(image))
        await finish(device.write(4095, memoryview(b"one")))
        await finish(device.write(MIB, b"two", fua=True))
        assert bytes(await finish(device.read(4094, 5)))[1:4] == b"one"
        await finish(device.flush())
        await device.close()

    asyncio.run(main())
    data = image.read_bytes()
    assert data[4095:4098] == b"one"
    assert data[MIB : MIB + 3] == b"two"
    assert len(data) == 4 * MIB


def test_short_writes_are_completed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    data = os.urandom(5000)
    file = File(image)
    file.write(3, data)
    file.close()
    assert image.read_bytes()[3:5003] == data


@pytest.mark.skipif(not hasattr(os, "RWF_DSYNC"), reason="this platform has no RWF_DSYNC")
def test_short_fua_writes_are_completed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(os.pwritev, [1000, 1])
    monkeypatch.setattr(os, "pwritev", fake)
    data = os.urandom(5000)
    file = File(image)
    file.write_fua(3, data)
    file.close()
    assert fake.calls == 3
    assert image.read_bytes()[3:5003] == data


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this platform has no RWF_NOWAIT")
@pytest.mark.parametrize(
    ("answers", "taken"),
    [([None], True), ([2], False), ([BlockingIOError()], False), ([OSError(errno.EIO, "bad")], False)],
)
def test_quick_writes(
    image: Path, monkeypatch: pytest.MonkeyPatch, answers: list[Any], taken: bool
) -> None:
    monkeypatch.setattr(os, "pwritev", Fake(os.pwritev, answers))
    file = File(image)
    assert file.write_nowait(7, b"data") is taken
    assert file.write_nowait(7, b"data") is True        # none of these ends the asking
    file.close()
    assert image.read_bytes()[7:11] == b"data"


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this platform has no RWF_NOWAIT")
def test_quick_write_not_supported_is_asked_once(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(os.pwritev, [OSError(errno.EOPNOTSUPP, "no")])
    monkeypatch.setattr(os, "pwritev", fake)
    file = File(image)
    assert [file.write_nowait(0, b"x") for _ in range(3)] == [False] * 3
    assert fake.calls == 1
    file.close()


def test_read_only_file_refuses(image: Path) -> None:
    async def main() -> None:
        device = Device(File(image, read_only=True))
        assert device.read_only
        assert device.can_multi_conn
        with pytest.raises(BlockError) as caught:
            device.write(0, b"x")
        assert caught.value.errno == errno.EPERM
        await device.close()

    asyncio.run(main())


# Durability


def test_failed_flush_is_never_forgotten(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells of a lost page once; a second fdatasync would succeed, and promise what is gone."""
    failures = [OSError(errno.EIO, "lost page")]

    def sync(fd: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(file_module, "_sync", sync)
    file = File(image)
    with pytest.raises(OSError, match="lost page"):
        file.flush()
    for again in (file.flush, lambda: file.write_fua(0, b"x")):
        with pytest.raises(OSError, match=r"an earlier flush failed.*lost page") as caught:
            again()
        assert caught.value.errno == errno.EIO
    file.close()


def test_flush_that_failed_for_another_reason_may_be_repeated(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError(errno.EINTR, "signal")]

    def sync(fd: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(file_module, "_sync", sync)
    file = File(image)
    with pytest.raises(OSError, match="signal"):
        file.flush()
    file.flush()
    file.close()


def test_fua_without_the_kernels_flag(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(file_module, "_DSYNC", 0)
    monkeypatch.setattr(file_module, "_sync", synced.append)
    file = File(image)
    file.write_fua(0, b"data")
    file.close()
    assert len(synced) == 1
    assert image.read_bytes()[:4] == b"data"


# Holes


def test_trim_and_zeroes_make_holes(image: Path) -> None:
    need_holes(image.parent)

    async def main() -> None:
        device = Device(File(image))
        await finish(device.trim(0, MIB))
        await finish(device.write_zeroes(MIB, 2 * MIB, fua=True))
        assert allocated_bytes(image) <= MIB + 65536
        assert bytes(await finish(device.read(0, 3 * MIB))) == bytes(3 * MIB)
        await device.close()

    asyncio.run(main())
    assert image.stat().st_size == 4 * MIB


def test_zeroes_without_trim_keep_the_space(image: Path) -> None:
    async def main() -> None:
        device = Device(File(image))
        await finish(device.write_zeroes(0, 4 * MIB, may_trim=False, fua=True))
        await device.close()

    asyncio.run(main())
    assert allocated_bytes(image) >= 4 * MIB
    assert image.read_bytes() == bytes(4 * MIB)


@pytest.mark.parametrize("may_trim", [False, True])
def test_zeroes_are_written_where_nothing_else_works(
    image: Path, monkeypatch: pytest.MonkeyPatch, may_trim: bool
) -> None:
    monkeypatch.setattr(file_module, "punch_hole", lambda *args: False)
    monkeypatch.setattr(file_module, "zero_range", lambda *args: False)
    before = image.read_bytes()
    file = File(image)
    file.write_zeroes(5, 3 * MIB, may_trim=may_trim)
    file.trim(0, MIB)                               # a hint: nothing happens, nothing fails
    file.close()
    assert image.read_bytes() == before[:5] + bytes(3 * MIB) + before[5 + 3 * MIB :]


def test_sparse_image_stays_sparse_when_read_and_written(tmp_path: Path) -> None:
    need_holes(tmp_path)
    path = tmp_path / "sparse.img"

    async def main() -> None:
        device = Device(File(path, size=64 * MIB, create=True))
        await finish(device.write(32 * MIB, b"x" * 65536, fua=True))
        for offset in range(0, 64 * MIB, MIB):
            data = bytes(await finish(device.read(offset, MIB)))
            assert data == (b"x" * 65536 + bytes(MIB - 65536) if offset == 32 * MIB else bytes(MIB))
        await device.close()

    asyncio.run(main())
    assert allocated_bytes(path) <= 256 * 1024


def test_large_holes_leave_the_page_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only image they are answered inline, and nothing is read."""
    need_holes(tmp_path)
    path = tmp_path / "sparse.img"
    File(path, size=64 * MIB, create=True).close()
    need_nowait_reads(tmp_path)

    def read(*args: object) -> int:
        pytest.fail("a hole was read")

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "pread", read)

    async def main() -> None:
        device = Device(File(path, read_only=True))
        for offset in range(0, 64 * MIB, MIB):
            answer = device.read(offset, MIB)
            assert is_inline(answer)
            assert bytes(answer) == bytes(MIB)      # type: ignore[arg-type]
        await device.close()

    asyncio.run(main())


# Resizing


def test_resize(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 8192)
    file = File(path)
    try:
        file.resize(4096)
        assert (file.size, path.stat().st_size) == (4096, 4096)
        file.resize(12288)
        assert path.read_bytes() == b"x" * 4096 + bytes(8192)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            file.resize((1 << 63) - 1)
        assert file.size == 12288
    finally:
        file.close()


# Block devices


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device over a file; root only."""
    backing = tmp_path / "backing.img"
    backing.write_bytes(b"x" * (1 << 20))
    try:
        done = subprocess.run(
            ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, timeout=20, check=False
        )
    except FileNotFoundError:
        pytest.skip("losetup is not installed")
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], timeout=20, check=True)


@pytest.mark.parametrize("kernel_can", [True, False])
def test_block_device(loop_device: Path, kernel_can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroes and discards at any byte; without fallocate by the ioctls of block devices."""
    if not kernel_can:
        for name in ("punch_hole", "zero_range"):
            monkeypatch.setattr(file_module, name, lambda *range_: False)
    asked: list[tuple[int, int]] = []
    zero_out = file_module.zero_out
    monkeypatch.setattr(file_module, "zero_out", lambda fd, *range_: asked.append(range_) or zero_out(fd, *range_))
    file = File(loop_device)
    try:
        assert file.size == 1 << 20
        file.write_zeroes(100, 10_000, may_trim=False)
        assert bytes(file.read(0, 12_288)) == b"x" * 100 + bytes(10_000) + b"x" * 2188
        assert kernel_can or asked == [(512, 9216)]
        file.trim(65_536, 65_536)
        file.flush()
        assert bytes(file.read(131_072, 4)) == b"xxxx"
        file.resize(1 << 20)
        with pytest.raises(OSError, match="is a block device of 1048576 bytes"):
            file.resize(512)
    finally:
        file.close()
