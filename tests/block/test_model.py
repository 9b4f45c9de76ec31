"""Random requests against a bytearray: every device must be one, whatever its driver can and cannot do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.block.file import File
from homeloop.block.memory import Memory
from tests.block.answers import finish

SIZE = 3 * (1 << 20) + 12288
MOVES = 400
LENGTH_MAX = 300_000


class Plain(Memory):
    """Memory with the least that can be written, on workers."""

    thread_model = "serialised"
    flush = None            # type: ignore[assignment]
    trim = None             # type: ignore[assignment]
    write_zeroes = None     # type: ignore[assignment]


class Asynchronous:
    """Memory whose every method is a coroutine that lets others run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = Memory(size)

    async def read(self, offset: int, length: int) -> bytes:
        await asyncio.sleep(0)
        return bytes(self._memory.read(offset, length))

    async def write(self, offset: int, data: bytes) -> None:
        await asyncio.sleep(0)
        self._memory.write(offset, data)

    async def flush(self) -> None:
        await asyncio.sleep(0)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        await asyncio.sleep(0)
        self._memory.write_zeroes(offset, length, may_trim=may_trim)


MAKE: dict[str, Callable[[Path], Device]] = {
    "memory": lambda folder: Device(Memory(SIZE)),
    "file": lambda folder: Device(File(folder / "image", size=SIZE, create=True)),
    "plain": lambda folder: Device(Plain(SIZE)),
    "asynchronous": lambda folder: Device(Asynchronous(SIZE)),
}


class Stripe:
    """One actor's part of the device and of the model: nobody else touches it, so its answers are certain."""

    def __init__(self, device: Device, model: bytearray, chance: random.Random, start: int, end: int) -> None:
        self.device = device
        self.model = model
        self.chance = chance
        self.start = start
        self.end = end

    def _range(self) -> tuple[int, int]:
        offset = self.chance.randrange(self.start, self.end)
        length = min(self.chance.choice((1, 512, 4096, 65536, LENGTH_MAX)), self.end - offset)
        if self.chance.random() < 0.5:
            length = self.chance.randint(0, length)
        return offset, length

    async def move(self) -> None:
        offset, length = self._range()
        stop = offset + length
        kind = self.chance.choice(("read", "read", "write", "write", "write_zeroes", "trim", "flush"))
        fua = self.device.can_fua and self.chance.random() < 0.1
        if kind == "read":
            data = await finish(self.device.read(offset, length))
            assert bytes(data) == self.model[offset:stop], f"read of {length} bytes at {offset}"
        elif kind == "write":
            data = self.chance.randbytes(length)
            await finish(self.device.write(offset, memoryview(data), fua=fua))
            self.model[offset:stop] = data
        elif kind == "write_zeroes":
            may_trim = self.chance.random() < 0.5
            await finish(self.device.write_zeroes(offset, length, fua=fua, may_trim=may_trim))
            self.model[offset:stop] = bytes(length)
        elif kind == "trim" and self.device.can_trim:
            await finish(self.device.trim(offset, length, fua=fua))
            # What it reads as is open: take what is there for true from now on.
            self.model[offset:stop] = bytes(await finish(self.device.read(offset, length)))
        elif kind == "flush" and self.device.can_flush:
            await finish(self.device.flush())


@pytest.mark.parametrize("actors", [1, 4])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_device_is_a_bytearray(
    tmp_path: Path, seed: int, make: Callable[[Path], Device], actors: int
) -> None:
    async def main() -> None:
        device = make(tmp_path)
        model = bytearray(SIZE)
        width = SIZE // actors

        async def act(number: int) -> None:
            chance = random.Random(seed + number)
            stripe = Stripe(device, model, chance, number * width, (number + 1) * width)
            for _ in range(MOVES // actors):
                await stripe.move()

        await asyncio.gather(*(act(number) for number in range(actors)))
        assert device.in_flight == 0
        assert bytes(await finish(device.read(0, SIZE))) == model
        assert device.statistics().errors == 0
        await device.close()

    asyncio.run(main())


def test_image_holds_what_was_written(tmp_path: Path, seed: int) -> None:
    """After close() the file itself, read by nobody's driver, is the model."""

    async def main() -> bytearray:
        device = MAKE["file"](tmp_path)
        model = bytearray(SIZE)
        stripe = Stripe(device, model, random.Random(seed), 0, SIZE)
        for _ in range(100):
            await stripe.move()
        await device.close()
        return model

    model = asyncio.run(main())
    assert (tmp_path / "image").read_bytes() == model
