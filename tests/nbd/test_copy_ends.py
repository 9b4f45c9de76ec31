"""The ends of a copy: what is told of each kind, and what each side does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from homeloop.block.memory import Memory
from homeloop.core.runtime import run
from homeloop.errors import BlockError
from homeloop.nbd.copy_ends import DeviceEnd, FileEnd, NbdEnd, open_source, open_target
from homeloop.nbd.serving import serve

SIZE = 1 << 20


class Plain:
    """Reads and writes, no more."""

    size = 8 << 20
    thread_model = "inline"
    block_size_min = 512

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write(self, offset: int, data: Any) -> None:
        assert bytes(data) == bytes(len(data))
        self.written.append((offset, len(data)))


def test_kinds(tmp_path: Path) -> None:
    async def main() -> None:
        source = await open_source("memory:1M")
        assert isinstance(source, DeviceEnd)
        assert (source.size, source.read_only, source.lanes_max) == (SIZE, True, 1)
        await source.close()
        target = await open_target(str(tmp_path / "new"), SIZE)
        assert isinstance(target, FileEnd)
        assert (target.size, target.is_zero) == (SIZE, True)
        await target.close()
        target = await open_target(f"file:{tmp_path / 'new'}", SIZE)
        assert not target.is_zero
        await target.close()
        async with serve(Memory(SIZE)) as uri:
            target = await open_target(uri, SIZE)
            assert isinstance(target, NbdEnd)
            assert target.lanes_max > 1
            await target.close()                    # no lane has used its connection
        with pytest.raises(BlockError):
            await open_source(str(tmp_path / "missing"))

    run(main())


def test_x8_one_connection_where_more_are_not_allowed() -> None:
    async def main() -> None:
        async with serve(Plain()) as uri:
            end = await open_target(uri, SIZE)
            assert (end.lanes_max, end.granule) == (1, 512)
            await end.close()

    run(main())


def test_zeroes_where_the_server_has_none(tmp_path: Path) -> None:
    """They are written, a MiB at a time; a device emulates it itself."""
    async def main() -> None:
        driver = Plain()
        async with serve(driver) as uri:
            end = await open_target(uri, driver.size)
            side = await end.side()
            side._client.info = type(side._client.info)(        # type: ignore[attr-defined]
                name="", size=driver.size, flags=side._client.info.flags & ~0x40, allocation_id=None)  # type: ignore[attr-defined]
            await side.zero(512, (2 << 20) + 512)
            await side.flush()
            await side.close()
            await end.close()
        assert driver.written == [(512, 1 << 20), (512 + (1 << 20), 1 << 20), (512 + (2 << 20), 512)]

    run(main())


def test_an_export_that_changes_between_two_connections() -> None:
    async def main() -> None:
        async with serve(Memory(SIZE)) as uri:
            end = await open_source(uri)
            first = await end.side()
            end.size *= 2
            with pytest.raises(BlockError, match="has 1048576 bytes now"):
                await end.side()
            await first.close()
            await end.close()

    run(main())


def test_sides(tmp_path: Path) -> None:
    """The same on each: what is written is read, zeroes are zeroes, extents tell."""
    async def main() -> None:
        async with serve(Memory(SIZE)) as uri:
            for spec in ("memory:1M", str(tmp_path / "file"), uri):
                end = await open_target(spec, SIZE)
                side = await end.side()
                await side.write(0, b"x" * 131072)
                await side.zero(65536, 65536)
                await side.flush()
                assert bytes(await side.read(0, 131072)) == b"x" * 65536 + bytes(65536)
                assert sum(run for run, _, zero in await side.extents(0, SIZE) if not zero) == 65536
                await side.close()
                await end.close()

    run(main())
