"""Devices that become larger and smaller while requests run."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.errors import BlockError
from tests.block.answers import BOUND_S, finish, turns
from tests.block.drivers import AsyncDriver, Least, Recorder, refused


class Elastic(Recorder):
    """Can be resized; `answer` is what its methods return, or raise."""

    block_size_min = 512

    def resize(self, size: int) -> Any:
        self._note("resize", size)
        self.size = size


class Slow(AsyncDriver):
    """The same with coroutines that wait until they are let go."""

    async def resize(self, size: int) -> None:
        self.order.append(f"resize {size}")
        self.size = size


def test_resize() -> None:
    async def main() -> None:
        device = Device(Elastic())
        told: list[int] = []
        device.on_resize.append(told.append)
        await device.resize(4096)
        assert device.size == 4096
        assert refused(device.write, 4096, bytes(512)).errno == errno.ENOSPC
        await device.resize(8192)
        assert device.write(4096, bytes(512)) is None
        await device.resize(8192)               # nothing to do: nobody is told
        assert told == [4096, 8192]

    asyncio.run(main())


@pytest.mark.parametrize("size", [-512, 100, 1 << 63])
def test_sizes_that_cannot_be(size: int) -> None:
    async def main() -> None:
        driver = Elastic()
        with pytest.raises(BlockError) as caught:
            await Device(driver).resize(size)
        assert caught.value.errno == errno.EINVAL
        assert driver.calls == []

    asyncio.run(main())


def test_who_cannot() -> None:
    async def main() -> None:
        for device, number in ((Device(Least()), errno.ENOTSUP), (Device(Elastic(), read_only=True), errno.EPERM)):
            with pytest.raises(BlockError) as caught:
                await device.resize(512)
            assert caught.value.errno == number
        device = Device(Elastic())
        await device.close()
        with pytest.raises(BlockError) as caught:
            await device.resize(512)
        assert caught.value.errno == errno.ESHUTDOWN

    asyncio.run(main())


def test_shrinking_waits_for_what_is_in_flight_and_not_for_what_comes() -> None:
    async def main() -> None:
        driver = Slow()
        device = Device(driver)
        before = asyncio.create_task(finish(device.write(1 << 19, b"x")))
        unborn = device.write(1 << 19, b"y")        # was allowed, has not begun
        await turns()
        shrink = asyncio.create_task(device.resize(4096))
        await turns()
        assert refused(device.read, 4096, 1).errno == errno.EINVAL      # from now on
        with pytest.raises(BlockError, match="has become 4096 bytes"):
            await finish(unborn)
        driver.order.clear()
        later = asyncio.create_task(finish(device.write(0, b"z")))
        await turns()
        assert driver.order == ["write begins"]
        assert not shrink.done()
        driver.let_go.set()
        await asyncio.wait_for(asyncio.gather(before, shrink, later), BOUND_S)
        assert driver.order.index("write ends") < driver.order.index("resize 4096")
        assert device.size == driver.size == 4096

    asyncio.run(main())


def test_shrinking_ends_while_requests_keep_coming() -> None:
    """It must not wait for a moment when nothing is in flight: there may never be one."""

    async def main() -> None:
        driver = Slow()
        device = Device(driver)
        first = asyncio.create_task(finish(device.read(0, 1)))
        await turns()
        shrink = asyncio.create_task(device.resize(4096))
        await turns()
        driver.let_go.set()
        await first
        driver.let_go.clear()
        held = asyncio.create_task(finish(device.read(0, 1)))       # begins before the shrinking ends
        await asyncio.wait_for(shrink, BOUND_S)
        assert not held.done()
        driver.let_go.set()
        await held

    asyncio.run(main())


def test_cancelled_while_it_waits_it_changes_nothing() -> None:
    """And the next one waits for the same requests."""

    async def main() -> None:
        driver = Slow()
        device = Device(driver)
        size = device.size
        request = asyncio.create_task(finish(device.write(1 << 19, b"x")))
        await turns()
        shrink = asyncio.create_task(device.resize(4096))
        await turns()
        shrink.cancel()
        await turns()
        assert shrink.cancelled()
        assert device.size == size
        again = asyncio.create_task(device.resize(8192))
        await turns()
        assert not again.done()
        driver.let_go.set()
        await asyncio.wait_for(asyncio.gather(request, again), BOUND_S)
        assert driver.order == ["write begins", "write ends", "resize 8192"]

    asyncio.run(main())


def test_a_driver_that_fails_says_its_size() -> None:
    async def main() -> None:
        driver = Elastic()
        device = Device(driver)
        before = driver.size
        driver.answer = OSError(errno.ENOSPC, "full")
        for size in (before * 2, 512):
            with pytest.raises(BlockError) as caught:
                await device.resize(size)
            assert caught.value.errno == errno.ENOSPC
            assert device.size == before
        driver.size = "nonsense"                # type: ignore[assignment]
        with pytest.raises(BlockError):
            await device.resize(512)
        assert device.size == before

    asyncio.run(main())


def test_one_after_the_other_and_closing_waits() -> None:
    class Gated(Least):
        begun, let_go = threading.Event(), threading.Event()

        def write(self, offset: int, data: bytes) -> None: ...

        def resize(self, size: int) -> None:
            self.begun.set()
            assert self.let_go.wait(BOUND_S)
            self.size = size

    async def main() -> None:
        driver = Gated()
        device = Device(driver)
        first, second = (asyncio.create_task(device.resize(size)) for size in (2 << 20, 3 << 20))
        assert await asyncio.to_thread(driver.begun.wait, BOUND_S)
        closing = asyncio.create_task(device.close())
        await turns()
        assert not closing.done()
        driver.let_go.set()
        await asyncio.wait_for(asyncio.gather(first, closing), BOUND_S)
        with pytest.raises(BlockError, match=r"closing|closed"):
            await second
        assert driver.size == 2 << 20

    asyncio.run(main())
