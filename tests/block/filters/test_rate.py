"""No more than so much in so long, first come, first served."""

from __future__ import annotations

import asyncio

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.rate import Rate
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from homeloop.testing.jumping import run_jumping
from tests.block.answers import finish, is_inline, turns

MIB = 1 << 20


async def ended(device: Device, lengths: list[int]) -> list[tuple[float, int]]:
    """Ask for all at once; return (when, which) in the order in which they ended."""
    loop = asyncio.get_running_loop()
    start, order = loop.time(), []

    async def one(number: int, length: int) -> None:
        await finish_long(device.read(0, length))
        order.append((loop.time() - start, number))

    await asyncio.gather(*(one(number, length) for number, length in enumerate(lengths)))
    return order


async def finish_long(answer: object) -> object:
    return await answer if asyncio.iscoroutine(answer) else answer


def test_bytes_a_second() -> None:
    device = Device(Rate(Memory(MIB), bytes_per_s=1000, burst_s=0))
    order = run_jumping(ended(device, [1000] * 10))
    assert order[-1][0] == pytest.approx(9)         # the first goes at once, and pays for those behind it
    assert [number for _, number in order] == list(range(10))


def test_nobody_overtakes() -> None:
    """A small request behind a large one waits for its turn."""
    device = Device(Rate(Memory(MIB), bytes_per_s=1000, burst_s=0))
    assert run_jumping(ended(device, [100_000, 1, 50_000, 1])) == [
        (pytest.approx(0), 0), (pytest.approx(100), 1), (pytest.approx(100.001), 2), (pytest.approx(150.001), 3),
    ]


def test_requests_a_second_and_flushes_free() -> None:
    device = Device(Rate(Memory(MIB), requests_per_s=2, burst_s=0))
    assert run_jumping(ended(device, [1] * 7))[-1][0] == pytest.approx(3)
    assert device.flush() is None


def test_burst_is_what_was_not_used() -> None:
    async def main() -> None:
        device = Device(Rate(Memory(MIB), bytes_per_s=1000, burst_s=2))
        assert [is_inline(device.read(0, 1000)) for _ in range(4)] == [True, True, True, False]
        await asyncio.sleep(100)            # tidy: allow sleep: the clock jumps
        assert [is_inline(device.read(0, 1000)) for _ in range(4)] == [True, True, True, False]

    run_jumping(main())


def test_cancelled_gives_back_what_it_booked() -> None:
    async def main() -> None:
        device = Device(Rate(Memory(MIB), bytes_per_s=1000, burst_s=0))
        await finish(device.read(0, 1000))
        task = asyncio.ensure_future(finish_long(device.read(0, 500_000)))
        await turns()
        task.cancel()
        await asyncio.wait((task,))
        assert (await ended(device, [1]))[0][0] == pytest.approx(1)

    run_jumping(main())


@pytest.mark.parametrize("options", [{"bytes_per_s": 0}, {"requests_per_s": -1}, {"burst_s": float("nan")}])
def test_limits_that_are_none(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"rate: {next(iter(options))}="):
        Rate(Memory(1), **options)
