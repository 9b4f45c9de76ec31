"""Reads and writes that go to workers without a coroutine."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import homeloop
from homeloop.block.device import Device
from homeloop.block.queueing import Queued
from homeloop.errors import BlockError
from tests.block.answers import BOUND_S, finish
from tests.block.drivers import Least

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.run, homeloop.run], ids=["asyncio", "homeloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param    # type: ignore[no-any-return]



class Blocking(Least):
    """Writes and fails as told."""

    fails: Exception | None = None

    def __init__(self) -> None:
        self.data = bytearray(self.size)

    def read(self, offset: int, length: int) -> bytes:
        if self.fails is not None:
            raise self.fails
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> Any:
        if self.fails is not None:
            raise self.fails
        self.data[offset : offset + len(data)] = data
        return len(data) if offset else 1       # at 0: a lie


async def ended(device: Device, method: str, *args: Any) -> Queued:
    future: asyncio.Future[Queued] = asyncio.get_running_loop().create_future()
    queued = getattr(device, method)(*args, caller=future.set_result)
    assert type(queued) is Queued
    assert device.in_flight == 1
    assert await asyncio.wait_for(future, BOUND_S) is queued
    assert device.in_flight == 0
    return queued


def test_queued_requests(run: Run) -> None:
    async def main() -> None:
        driver = Blocking()
        device = Device(driver)
        written = await ended(device, "write", 5, b"data")
        assert (written.error, driver.data[5:9]) == (None, b"data")
        assert (await ended(device, "read", 5, 4)).answer == b"data"
        lie = await ended(device, "write", 0, b"data")
        assert isinstance(lie.error, BlockError)
        assert "returned 1 for 4 bytes" in lie.error.text
        driver.fails = OSError(errno.ENOSPC, "full")
        for queued in (await ended(device, "write", 5, b"data"), await ended(device, "read", 5, 4)):
            assert isinstance(queued.error, BlockError)
            assert queued.error.errno == errno.ENOSPC
            assert queued.error.__cause__ is driver.fails
        s = device.statistics()
        assert (s.reads, s.writes, s.errors, s.waited) == (1, 1, 3, 5)
        await device.close()

    run(main())


def test_drain_waits_for_queued_requests(run: Run) -> None:
    begun, let_go = threading.Event(), threading.Event()

    class Slow(Least):
        def read(self, offset: int, length: int) -> bytes:
            begun.set()
            assert let_go.wait(BOUND_S)
            return bytes(length)

    async def main() -> None:
        device, told = Device(Slow()), []
        device.read(0, 1, told.append)
        drain = asyncio.create_task(device.drain())
        assert await asyncio.to_thread(begun.wait, BOUND_S)
        assert not drain.done()
        let_go.set()
        await asyncio.wait_for(drain, BOUND_S)
        await asyncio.sleep(0)
        assert len(told) == 1

    run(main())


def test_without_a_caller_it_is_a_coroutine(run: Run) -> None:
    async def main() -> None:
        device = Device(Blocking())
        assert await finish(device.read(0, 3)) == b"\0\0\0"
        assert await finish(device.write(5, b"abc")) is None

    run(main())
