"""Blocks stay in memory, the least recently used go first; nothing written is lost, nothing read is stale."""

from __future__ import annotations

import asyncio
import errno

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.cache import Cache
from homeloop.block.memory import Memory
from homeloop.errors import BlockError, UsageError
from tests.block.answers import finish, is_inline, turns
from tests.block.drivers import Least
from tests.block.filters.waiting import Waiting

SIZE = 16 * 512 + 100       # the last block is a short one


def made(blocks: int = 4, write_back: bool = False) -> tuple[Waiting, Cache, Device]:
    driver = Waiting(SIZE)
    driver.memory.write(0, bytes(i // 512 + 1 for i in range(SIZE)))
    cache = Cache(driver, size=blocks * 512, block=512, write_back=write_back)
    return driver, cache, Device(cache)


def kinds(driver: Waiting) -> list[tuple[str, int]]:
    """What was asked of the driver, with the number of the block."""
    return [(kind, offset // 512) for kind, offset, _ in driver.begun]


def test_the_least_recently_used_makes_room() -> None:
    async def main() -> None:
        driver, cache, device = made(blocks=2)
        for block in (0, 1, 0, 2, 0, 1):
            assert bytes(await finish(device.read(block * 512 + 5, 10))) == bytes([block + 1]) * 10
        assert kinds(driver) == [("read", 0), ("read", 1), ("read", 2), ("read", 1)]
        assert (cache.hits, cache.misses) == (2, 4)
        assert is_inline(device.read(512, 512))

    asyncio.run(main())


def test_reads_over_blocks_and_to_the_short_end() -> None:
    async def main() -> None:
        driver, _, device = made()
        found = bytes(await finish(device.read(0, SIZE)))
        assert found == bytes(driver.memory.read(0, SIZE))
        assert bytes(await finish(device.read(SIZE - 100, 100))) == bytes([17]) * 100

    asyncio.run(main())


def test_reads_of_one_block_ask_for_it_once() -> None:
    async def main() -> None:
        driver, _, device = made()
        await asyncio.gather(*(finish(device.read(n, 10)) for n in range(10)))
        assert kinds(driver) == [("read", 0)]

    asyncio.run(main())


@pytest.mark.parametrize("write_back", [False, True])
def test_a_read_does_not_bring_in_what_is_older_than_a_write(write_back: bool) -> None:
    """The race of a miss with a write.

    reader                               writer
    1 asks below, which has old bytes
                                         2 writes the block
    3 puts the block into the cache
    4 reads again: must see the write
    """

    async def main() -> None:
        driver, _, device = made(write_back=write_back)
        driver.held.add("read")
        reader = asyncio.ensure_future(finish(device.read(0, 10)))
        await turns()
        writer = asyncio.ensure_future(finish(device.write(2, b"!!")))
        await turns()
        await driver.hold_no_more()
        await asyncio.gather(reader, writer)
        assert bytes(await finish(device.read(0, 5))) == b"\x01\x01!!\x01"

    asyncio.run(main())


def test_write_through_is_below_when_it_is_answered_and_follows_here() -> None:
    async def main() -> None:
        driver, _, device = made()
        await finish(device.read(0, 512))
        await finish(device.write(510, b"abcd", fua=True))
        assert bytes(driver.memory.read(510, 4)) == b"abcd"
        assert bytes(await finish(device.read(510, 2))) == b"ab"
        assert is_inline(device.read(510, 2))
        driver.errors["write"] = [OSError(errno.EIO, "half done")]
        with pytest.raises(BlockError):
            await finish(device.write(0, b"x"))
        assert not is_inline(device.read(0, 1))         # what is below is open now

    asyncio.run(main())


def test_write_back_comes_down_with_the_flush_and_only_what_is_dirty() -> None:
    async def main() -> None:
        driver, _, device = made(write_back=True)
        await finish(device.read(1024, 512))
        await finish(device.write(5, b"part"))          # reads the rest of its block
        await finish(device.write(512, b"w" * 512))     # a whole block: nothing to read
        assert kinds(driver) == [("read", 2), ("read", 0)]
        assert bytes(await finish(device.read(0, 10))) == b"\x01" * 5 + b"part\x01"
        await finish(device.flush())
        assert kinds(driver)[2:] == [("write", 0), ("write", 1), ("flush", 0)]
        assert bytes(driver.memory.read(0, 10)) == b"\x01" * 5 + b"part\x01"
        await finish(device.flush())
        assert kinds(driver)[5:] == [("flush", 0)]

    asyncio.run(main())


def test_write_back_fua_is_below_when_it_is_answered() -> None:
    async def main() -> None:
        driver, _, device = made(write_back=True)
        await finish(device.write(0, b"x" * 512, fua=True))
        assert kinds(driver) == [("write", 0), ("flush", 0)]

    asyncio.run(main())


def test_write_back_what_cannot_be_written_stays_and_fails_the_flush() -> None:
    async def main() -> None:
        driver, _, device = made(write_back=True)
        await finish(device.write(0, b"a" * 512))
        await finish(device.write(512, b"b" * 512))
        driver.errors["write"] = [OSError(errno.ENOSPC, "full")]
        with pytest.raises(BlockError) as caught:
            await finish(device.flush())
        assert caught.value.errno == errno.ENOSPC
        assert bytes(driver.memory.read(512, 1)) == b"b"            # the others were tried, too
        assert bytes(await finish(device.read(0, 1))) == b"a"
        await finish(device.flush())
        assert bytes(driver.memory.read(0, 1)) == b"a"

    asyncio.run(main())


def test_write_back_dirty_blocks_that_make_room_are_written() -> None:
    async def main() -> None:
        driver, _, device = made(blocks=2, write_back=True)
        for block in range(16):
            await finish(device.write(block * 512, bytes([100 + block]) * 512))
        assert kinds(driver) == [("write", block) for block in range(14)]
        driver.errors["write"] = [OSError(errno.EIO, "no")] * 2
        with pytest.raises(BlockError):
            await finish(device.write(0, b"z" * 512))               # nobody makes room for it
        assert bytes(await finish(device.read(0, 1))) == b"d"       # read all the same, and not kept
        await device.close()
        assert [driver.memory.read(block * 512, 1)[0] for block in range(16)] == [100 + block for block in range(16)]

    asyncio.run(main())


@pytest.mark.parametrize("change", ["trim", "write_zeroes"])
def test_write_back_zeroes_over_dirty_blocks(change: str) -> None:
    async def main() -> None:
        driver, _, device = made(write_back=True)
        await finish(device.write(0, b"x" * 2048))
        await finish(getattr(device, change)(256, 1024))
        found = bytes(await finish(device.read(0, 2048)))
        assert found == b"x" * 256 + bytes(1024) + b"x" * 768
        await finish(device.flush())
        assert bytes(driver.memory.read(0, 2048)) == found
        driver.errors[change] = [OSError(errno.EIO, "no")]
        await finish(device.write(0, b"y" * 2048))
        with pytest.raises(BlockError):
            await finish(getattr(device, change)(0, 2048))
        assert bytes(await finish(device.read(0, 2048))) == b"y" * 2048

    asyncio.run(main())


def test_write_back_extents_know_of_dirty_blocks() -> None:
    async def main() -> None:
        device = Device(Cache(Memory(1 << 20), write_back=True))
        device.write(0, b"x" * 65536)
        assert device.extents(0, 1 << 20) == [(65536, False, False), ((1 << 20) - 65536, True, True)]

    asyncio.run(main())


def test_without_flush_below_what_is_dirty_goes_down_at_the_end() -> None:
    class Sink(Least):
        def __init__(self) -> None:
            self.written: list[int] = []

        def write(self, offset: int, data: bytes) -> None:
            self.written.append(offset)

    async def main() -> None:
        sink = Sink()
        device = Device(Cache(sink, block=512, write_back=True))
        assert not device.can_flush
        assert not device.can_fua
        await finish(device.write(512, b"x" * 512))
        assert sink.written == []
        await device.close()
        assert sink.written == [512]

    asyncio.run(main())


@pytest.mark.parametrize("options", [{"block": 1000}, {"block": 0}, {"size": 100}, {"block": 1 << 30}])
def test_sizes_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="cache: "):
        Cache(Memory(1 << 20), **options)       # type: ignore[arg-type]
