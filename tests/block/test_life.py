"""Requests that are cancelled, devices that drain and close."""

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

# Cancellation


def test_cancelled_async_request() -> None:
    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        task = asyncio.create_task(device.write(0, b"x"))       # type: ignore[arg-type]
        await turns()
        assert device.in_flight == 1
        task.cancel()
        await turns()
        assert task.cancelled()
        assert driver.order == ["write begins", "write cancelled"]
        assert device.in_flight == 0
        assert device.statistics().writes == 0

    asyncio.run(main())


def test_cancelled_worker_request_holds_its_buffer() -> None:
    """in_flight stays until the worker has ended, so drain() and the buffer's owner wait for it."""

    class Slow(Least):
        begun, let_go = threading.Event(), threading.Event()
        seen = b""

        def write(self, offset: int, data: memoryview) -> None:
            self.begun.set()
            assert self.let_go.wait(BOUND_S)
            self.seen = bytes(data)         # ValueError if the view were released

    async def main() -> None:
        driver = Slow()
        device = Device(driver)
        buffer = memoryview(bytearray(b"data"))

        async def connection() -> None:
            try:
                await finish(device.write(0, buffer))
            finally:
                buffer.release()

        task = asyncio.create_task(connection())
        assert await asyncio.to_thread(driver.begun.wait, BOUND_S)
        task.cancel()
        await turns()
        assert device.in_flight == 1
        drain = asyncio.create_task(device.drain())
        await turns()
        assert not drain.done()
        driver.let_go.set()
        await asyncio.wait((task,), timeout=BOUND_S)
        await asyncio.wait_for(drain, BOUND_S)
        assert task.cancelled()
        assert driver.seen == b"data"
        assert device.in_flight == 0

    asyncio.run(main())


def test_request_that_never_ran_holds_nothing_up() -> None:
    async def main() -> None:
        device = Device(AsyncDriver())
        task = asyncio.create_task(device.read(0, 1))           # type: ignore[arg-type]
        task.cancel()                       # before its first step
        await turns()
        assert task.cancelled()
        assert device.in_flight == 0
        await asyncio.wait_for(device.drain(), BOUND_S)

    asyncio.run(main())


# Drain and close


def test_drain_waits_for_all() -> None:
    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        await device.drain()                # nothing in flight: at once
        requests = [asyncio.create_task(device.read(0, 1)) for _ in range(2)]   # type: ignore[arg-type]
        await turns()
        drains = [asyncio.create_task(device.drain()) for _ in range(3)]
        await turns()
        drains[0].cancel()
        await turns()
        assert [drain.done() for drain in drains] == [True, False, False]
        assert device.in_flight == 2        # a cancelled drain cancels nothing
        driver.let_go.set()
        await asyncio.wait_for(asyncio.gather(*drains[1:]), BOUND_S)
        assert all(request.done() for request in requests)

    asyncio.run(main())


def test_drain_cancelled_in_the_step_in_which_the_last_request_ends() -> None:
    """The others are still told.

    1. let_go          the request will run next
    2. drain.cancel()  its future is cancelled, its task has yet to run
    3.                 the request ends, and finds a future that is done already
    """

    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        request = asyncio.create_task(device.read(0, 1))        # type: ignore[arg-type]
        await turns()
        first, second = (asyncio.create_task(device.drain()) for _ in range(2))
        await turns()
        driver.let_go.set()
        first.cancel()
        await asyncio.wait_for(second, BOUND_S)
        assert first.cancelled()
        assert await request == b"\0"

    asyncio.run(main())


def test_close_refuses_drains_flushes_closes() -> None:
    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        request = asyncio.create_task(device.write(0, b"x"))    # type: ignore[arg-type]
        await turns()
        late: Any = device.read(0, 1)       # checked before, begun after
        close = asyncio.create_task(device.close())
        await turns()
        for call, args in ((device.read, (0, 1)), (device.write, (0, b"x")), (device.flush, ())):
            assert refused(call, *args).errno == errno.ESHUTDOWN
        assert refused(device.trim, 0, 1).errno == errno.ESHUTDOWN
        assert refused(device.write_zeroes, 0, 1).errno == errno.ESHUTDOWN
        with pytest.raises(BlockError, match="closing") as caught:
            await late
        assert caught.value.errno == errno.ESHUTDOWN
        assert driver.order == ["write begins"]
        driver.let_go.set()
        await asyncio.wait_for(close, BOUND_S)
        await request                       # what ran was not disturbed
        assert driver.order == ["write begins", "write ends", "flush begins", "flush ends", "close"]
        assert "closed" in repr(device)
        assert refused(device.read, 0, 0).errno == errno.ESHUTDOWN

    asyncio.run(main())


def test_close_twice_and_at_the_same_time() -> None:
    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        driver.let_go.set()
        await asyncio.wait_for(asyncio.gather(device.close(), device.close()), BOUND_S)
        await device.close()
        assert driver.order.count("close") == 1
        assert driver.order.count("flush begins") == 1

    asyncio.run(main())


def test_cancelled_close_can_be_repeated() -> None:
    async def main() -> None:
        driver = AsyncDriver()
        device = Device(driver)
        close = asyncio.create_task(device.close())
        await turns()
        close.cancel()
        await turns()
        assert close.cancelled()
        assert driver.order == ["flush begins", "flush cancelled"]      # not closed: it may not be stable
        assert refused(device.read, 0, 1).errno == errno.ESHUTDOWN
        driver.let_go.set()
        await asyncio.wait_for(device.close(), BOUND_S)
        assert driver.order[2:] == ["flush begins", "flush ends", "close"]

    asyncio.run(main())


def test_close_closes_the_driver_also_when_the_flush_fails() -> None:
    async def main() -> None:
        driver = Recorder(OSError(errno.EIO, "disk gone"))
        device = Device(driver)
        with pytest.raises(BlockError, match="disk gone"):
            await device.close()
        assert driver.calls == [("flush",), ("close",)]
        await device.close()
        assert driver.calls == [("flush",), ("close",)]

    asyncio.run(main())


def test_close_reports_the_drivers_close() -> None:
    class Bad(Least):
        def close(self) -> None:
            raise OSError(errno.EIO, "door stuck")

    async def main() -> None:
        device = Device(Bad())
        with pytest.raises(BlockError, match="door stuck"):
            await device.close()
        await device.close()

    asyncio.run(main())


def test_read_only_close_does_not_flush() -> None:
    driver = Recorder()
    asyncio.run(Device(driver, read_only=True).close())
    assert driver.calls == [("close",)]
