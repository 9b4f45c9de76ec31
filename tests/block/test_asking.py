"""Questions about extents where blocks are hidden, or the driver answers for so many bytes only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from homeloop.block.device import Device
from homeloop.block.extents import Extent
from tests.block.answers import finish
from tests.block.drivers import Least


class Striped(Least):
    """Every other block of 4 KiB is a hole."""

    block_size_min = 4096
    request_bytes_max = 16384

    def __init__(self, model: str) -> None:
        self.thread_model = model
        self.asked: list[tuple[int, int]] = []

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self.asked.append((offset, length))
        for block in range(offset // 4096, (offset + length) // 4096):
            yield 4096, bool(block & 1), bool(block & 1)


@pytest.mark.parametrize("model", ["inline", "serialised"])
def test_blocks_are_hidden(model: str) -> None:
    async def main() -> None:
        driver = Striped(model)
        device = Device(driver, emulate_alignment=True)
        assert await finish(device.extents(100, 50)) == [(50, False, False)]
        assert await finish(device.extents(4000, 5000)) == [(96, False, False), (4096, True, True), (808, False, False)]
        assert driver.asked == [(0, 4096), (0, 12288)]
        assert device.statistics().extents_bytes == 5050

    asyncio.run(main())


def test_no_more_than_the_driver_takes() -> None:
    """What it says ends early; the client asks again."""
    driver = Striped("inline")
    found = Device(driver).extents(4096, 65536)
    assert driver.asked == [(4096, 16384)]
    assert found == [(4096, True, True), (4096, False, False), (4096, True, True), (4096, False, False)]
