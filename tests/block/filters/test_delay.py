"""Requests wait as long as they are told, side by side, the same again with the same seed."""

from __future__ import annotations

import asyncio

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.delay import Delay
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from homeloop.testing.jumping import run_jumping
from tests.block.answers import finish


def took(device: Device, *requests: str) -> float:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        start = loop.time()
        ask = {"read": lambda: device.read(0, 10), "write": lambda: device.write(0, b"x"), "flush": device.flush,
               "extents": lambda: device.extents(0, 512)}
        await asyncio.gather(*(answer for answer in [ask[name]() for name in requests] if asyncio.iscoroutine(answer)))
        return loop.time() - start

    return run_jumping(main())


def test_by_kind_and_side_by_side() -> None:
    device = Device(Delay(Memory(4096), read=100, write=7, fixed=1))
    assert took(device, "read") == pytest.approx(101)
    assert took(device, "extents") == pytest.approx(101)
    assert took(device, "write") == pytest.approx(8)
    assert took(device, "flush") == pytest.approx(8)
    assert took(device, *["read"] * 50, "write") == pytest.approx(101)


def test_what_does_not_wait_is_inline() -> None:
    device = Device(Delay(Memory(4096), write=5))
    assert device.read(0, 1) == b"\0"


def test_jitter_is_the_seeds() -> None:
    def waits(seed: int) -> list[float]:
        device = Device(Delay(Memory(4096), jitter=1000, seed=seed))
        return [took(device, "read") for _ in range(5)]

    first = waits(1)
    assert waits(1) == pytest.approx(first)
    assert waits(2) != pytest.approx(first)
    assert all(0 <= wait <= 1000 for wait in first)
    assert len(set(first)) == 5


def test_cancelled_is_not_passed_on() -> None:
    async def main() -> None:
        memory = Memory(4096)
        device = Device(Delay(memory, write=1000))
        task = asyncio.ensure_future(finish(device.write(0, b"data")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert memory.allocated_bytes == 0

    run_jumping(main())


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan")])
def test_times_that_are_none(seconds: float) -> None:
    with pytest.raises(UsageError, match=r"jitter=.* is not a time"):
        Delay(Memory(1), jitter=seconds)
