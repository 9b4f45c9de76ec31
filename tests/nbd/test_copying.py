"""Copies: every byte and every hole, what is skipped, who is named in errors, cancelling; and comparisons."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.file import File
from homeloop.block.memory import Memory
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.errors import BlockError, UsageError
from homeloop.nbd import copying
from homeloop.nbd.copy_ends import End, open_source, open_target
from homeloop.nbd.copying import CopyPlan, Moved, check_ends, compare, copy
from homeloop.nbd.serving import serve
from tests.block.images import allocated_bytes, need_holes
from tests.nbd.talking import Gated, soon, until
from tests.nbd.test_interop import image, tell

LIMIT_S = 20.0
SIZE = 16 << 20                 # of image()
SMALL = CopyPlan(lanes=3, requests=4, request_bytes=64 << 10)


@asynccontextmanager
async def ends(source: str, target: str) -> AsyncIterator[tuple[End, End]]:
    ours = await open_source(source)
    try:
        theirs = await open_target(target, ours.size)
        try:
            yield ours, theirs
        finally:
            await theirs.close()
    finally:
        await ours.close()


@asynccontextmanager
async def places(folder: Path, source: Path) -> AsyncIterator[dict[str, str]]:
    """Where the same image is, in three kinds; and empty ones to copy to."""
    async with serve(File(source, read_only=True)) as uri, serve(Memory(SIZE)) as empty:
        yield {"file": str(source), "nbd": uri, "new file": str(folder / "new"), "empty nbd": empty}


@pytest.mark.parametrize("source", ["file", "nbd"])
@pytest.mark.parametrize("target", ["new file", "empty nbd"])
@pytest.mark.parametrize("plan", [SMALL, CopyPlan(), CopyPlan(lanes=1, requests=1, request_bytes=1 << 20),
                                  CopyPlan(sparse=False, flush=False), CopyPlan(detect_zeroes=True)])
def test_every_byte(source: str, target: str, plan: CopyPlan, tmp_path: Path, seed: int) -> None:
    original = image(tmp_path / "source", seed)

    async def main() -> None:
        async with places(tmp_path, original) as at:
            moved: list[Moved] = []
            async with ends(at[source], at[target]) as (ours, theirs):
                result = await copy(ours, theirs, plan, moved)
                assert result.data + result.zeroes + result.skipped == SIZE
                assert sum(one.data for one in moved) == result.data
                assert result.data == SIZE if not plan.sparse else 0 < result.data < SIZE
            async with ends(at["file"], at[target]) as (ours, theirs):
                await compare(ours, theirs, plan)

    run(main())


@pytest.mark.foreign("nbdinfo", "qemu-img")
def test_every_hole(tmp_path: Path, seed: int) -> None:
    """As qemu-img and nbdinfo see them: through a file, an export and a file again."""
    need_holes(tmp_path)
    original, last = image(tmp_path / "source", seed), tmp_path / "last"

    async def main() -> None:
        async with serve(Memory(SIZE)) as uri:
            async with ends(str(original), uri) as pair:
                await copy(*pair, SMALL)
            assert "identical" in await tell("qemu-img", "compare", "-f", "raw", "-F", "raw", original, uri)
            async with ends(uri, str(last)) as pair:
                await copy(*pair, SMALL)
            assert "identical" in await tell("qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", uri, last)
            mapped = await tell("nbdinfo", "--map", uri)
            async with serve(Memory(SIZE)) as again:
                async with ends(str(last), again) as pair:
                    await copy(*pair, CopyPlan())
                assert await tell("nbdinfo", "--map", again) == mapped

    run(main())
    assert last.read_bytes() == original.read_bytes()
    assert allocated_bytes(last) < SIZE // 2


def test_zeroes_over_old_data(tmp_path: Path) -> None:
    """A hole of the source becomes one of a target that had data there; and no request where it had none."""
    asked: list[tuple[int, int]] = []

    class Recording(Memory):
        def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
            asked.append((offset, length))
            super().write_zeroes(offset, length, may_trim=may_trim)

    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(4 << 20)
    target = Recording(4 << 20)
    target.write(1 << 20, b"old" * 1000)

    async def main() -> None:
        async with serve(target) as uri, ends(str(source), uri) as (ours, theirs):
            result = await copy(ours, theirs, CopyPlan(lanes=1))
            assert (result.data, result.zeroes) == (0, 65536)
            assert target.allocated_bytes == 0

    run(main())
    assert asked == [(1 << 20, 65536)]


def test_detect_zeroes(tmp_path: Path) -> None:
    """What the source calls data, in grains of 64 KiB; the last may be shorter."""
    source, target = tmp_path / "source", tmp_path / "target"
    grain = 64 << 10
    data = b"x" * grain + bytes(2 * grain) + b"y" + bytes(grain - 1) + bytes(1000)
    source.write_bytes(data)

    async def main() -> None:
        async with ends(str(source), str(target)) as pair:
            result = await copy(*pair, CopyPlan(detect_zeroes=True))
            assert (result.data, result.zeroes, result.skipped) == (2 * grain, 0, 2 * grain + 1000)

    run(main())
    assert target.read_bytes() == data


class Blocks(Memory):
    """Memory in blocks of 64 KiB: larger than those of any file system's holes."""

    block_size_min = 65536
    block_size_preferred = 65536


def test_blocks_of_the_target(tmp_path: Path) -> None:
    """Holes that are not whole blocks there are data; a source that does not end with a block is refused."""
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 18)
        file.write(b"x")
    target = Blocks(1 << 20)

    async def main() -> None:
        async with serve(target) as uri:
            async with ends(str(source), uri) as pair:
                await copy(*pair, SMALL)
            assert target.read(1 << 18, 1) == b"x"
            assert target.read(0, 1 << 18) == bytes(1 << 18)
            with source.open("ab") as file:
                file.truncate((1 << 20) - 1)
            async with ends(str(source), uri) as pair:
                with pytest.raises(UsageError, match="takes blocks of 65536"):
                    await copy(*pair, SMALL)

    run(main())


def test_sizes_are_checked_first(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"old")

    async def main() -> None:
        async with ends("memory:1M", str(small)) as pair:
            with pytest.raises(UsageError, match=r"small has 3 bytes, the source memory:1M 1048576: it is too small"):
                await copy(*pair, CopyPlan())
        async with serve(Memory(4096), read_only=True) as uri, ends("memory:4k", uri) as pair:
            with pytest.raises(UsageError, match="is read-only"):
                await copy(*pair, CopyPlan())
            check_ends(*pair, writes=False)
        with pytest.raises(UsageError, match="URI"):
            await open_source("nbd+unix:///x")

    run(main())
    assert small.read_bytes() == b"old"


def test_a_larger_target_keeps_its_end(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"o" * 8192)

    async def main() -> None:
        async with ends("memory:4k", str(target)) as pair:
            await copy(*pair, CopyPlan())

    run(main())
    assert target.read_bytes() == bytes(4096) + b"o" * 4096


def test_an_empty_source(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends("memory:0", str(tmp_path / "target")) as pair:
            assert (await copy(*pair, CopyPlan())).data == 0

    run(main())
    assert (tmp_path / "target").read_bytes() == b""


@pytest.mark.parametrize("which", ["source", "target"])
def test_errors_name_the_end_and_the_offset(which: str) -> None:
    class Broken(Memory):
        def read(self, offset: int, length: int) -> Any:
            if which == "source" and offset <= 1 << 20 < offset + length:
                raise OSError(errno.EIO, "a scratch")
            return b"x" * length

        def write(self, offset: int, data: Any) -> None:
            if which == "target" and offset <= 1 << 20 < offset + len(data):
                raise OSError(errno.ENOSPC, "full")

        def extents(self, offset: int, length: int) -> Any:
            return [(length, False, False)]

    kind, number = ("read", errno.EIO) if which == "source" else ("write", errno.ENOSPC)

    async def main() -> None:
        async with serve(Broken(4 << 20)) as source, serve(Broken(4 << 20)) as target, ends(source, target) as pair:
            with pytest.raises(BlockError, match=rf"{which} nbd\+unix.*: {kind} of 65536 bytes at 1048576: ") as caught:
                await copy(*pair, SMALL)
            assert caught.value.errno == number

    run(main())


def test_compare_tells_the_first_difference_that_it_met() -> None:
    ours, theirs = Memory(4 << 20), Memory(8 << 20)
    ours.write(0, b"x" * (1 << 20))
    theirs.write(0, b"x" * (1 << 20))
    theirs.write((2 << 20) + 17, b"y")              # where the source has a hole

    async def main() -> None:
        async with serve(ours) as source, serve(theirs) as target:
            for at in (2 << 20) + 17, 4711:
                async with ends(source, target) as pair:
                    with pytest.raises(BlockError, match=f"differ at byte {at}$"):
                        await compare(*pair, CopyPlan(lanes=1, requests=1))
                theirs.write(4711, b"z")

    run(main())


def test_cancelled() -> None:
    """With requests in flight: they end, and nothing is left behind."""
    async def main() -> None:
        driver = Gated(4 << 20)
        async with serve(driver, iothread=False) as uri, ends(uri, "memory:4M") as pair:
            copying = asyncio.ensure_future(copy(*pair, CopyPlan(sparse=False)))
            await until(lambda: len(driver.waiting) == 16)
            copying.cancel()
            await asyncio.sleep(0)
            driver.release()
            with pytest.raises(asyncio.CancelledError):
                await soon(copying)

    run(main())


def test_cancelled_while_a_lane_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start goes on in its worker: the thread is ended again."""
    starting, go = threading.Event(), threading.Event()

    class Slow(IOThread):
        def start(self) -> IOThread:
            starting.set()
            assert go.wait(LIMIT_S)
            return super().start()

    monkeypatch.setattr(copying, "IOThread", Slow)

    async def main() -> None:
        async with copying.Lanes() as lanes:
            taking = asyncio.ensure_future(lanes.take(2))
            assert await to_worker(starting.wait, LIMIT_S)
            taking.cancel()
            await asyncio.sleep(0)
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await taking

    run(soon(main()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("copy-")]


def test_files_only_can_be_cancelled(tmp_path: Path) -> None:
    """Two files never wait for anything: the copy gives way all the same."""
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(1 << 40)

    async def main() -> None:
        async with ends(str(source), str(tmp_path / "target")) as pair:
            moved: list[Moved] = []
            copying = asyncio.ensure_future(copy(*pair, CopyPlan(sparse=False, request_bytes=4096), moved))
            await until(lambda: moved and moved[0].skipped + moved[0].data > 0)
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(copying)

    run(main())
