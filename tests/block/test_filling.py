"""Drivers that fill a buffer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.errors import BlockError, UsageError
from tests.block.answers import finish, is_inline
from tests.block.drivers import Least


class Filling:
    """Has no read; `answer` is what read_into returns, or raises."""

    size = 1 << 16

    def __init__(self, thread_model: str = "serialised", answer: Any = None) -> None:
        self.thread_model = thread_model
        self.answer = answer

    def read_into(self, offset: int, buffer: memoryview) -> Any:
        buffer[:] = bytes((offset + at) & 0xFF for at in range(len(buffer)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class AsyncFilling(Filling):
    """The same with a coroutine."""

    async def read_into(self, offset: int, buffer: memoryview) -> Any:      # type: ignore[override]
        await asyncio.sleep(0)
        return Filling.read_into(self, offset, buffer)


@pytest.mark.parametrize("kind", [Filling, AsyncFilling])
@pytest.mark.parametrize("model", ["inline", "serialised", "parallel"])
@pytest.mark.parametrize("answer", [None, 16])
def test_reads(kind: Any, model: str, answer: object) -> None:
    async def main() -> None:
        device = Device(kind(model, answer))
        assert await finish(device.read(3, 16)) == bytes(range(3, 19))
        assert is_inline(device.read(3, 16)) == (kind is Filling and model == "inline")

    asyncio.run(main())


@pytest.mark.parametrize("kind", [Filling, AsyncFilling])
@pytest.mark.parametrize("answer", [15, 17, True, b"data", OSError(5, "bad"), ValueError("odd")])
def test_wrong_answers(kind: Any, answer: object) -> None:
    """A short fill is no data."""

    async def main() -> None:
        with pytest.raises(BlockError, match=r"Filling\.read_into"):
            await finish(Device(kind("serialised", answer)).read(0, 16))

    asyncio.run(main())


def test_the_buffer_keeps_its_size() -> None:
    class Greedy(Filling):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = bytes(len(buffer) + 1)

    with pytest.raises(BlockError, match="ValueError"):
        Device(Greedy("inline")).read(0, 16)    # type: ignore[arg-type]


def test_both() -> None:
    """On a worker read_into is used; elsewhere read, whose answer may be a hole or what is there already."""

    class Both(Filling, Least):
        def read(self, offset: int, length: int) -> bytes:
            return b"r" * length

    async def main() -> None:
        assert await finish(Device(Both("serialised")).read(0, 2)) == b"\0\1"
        assert Device(Both("inline")).read(0, 2) == b"rr"

    asyncio.run(main())


def test_neither() -> None:
    class Neither:
        size = 0

    with pytest.raises(UsageError, match="Neither has no read method, nor read_into"):
        Device(Neither())       # type: ignore[arg-type]
