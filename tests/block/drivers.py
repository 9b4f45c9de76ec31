"""Drivers for the tests of the guard: the least one, one that notes its calls, one of coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from homeloop.errors import BlockError


class Least:
    """The whole driver that a user has to write: blocking, on a worker."""

    size = 1 << 20

    def read(self, offset: int, length: int) -> bytes:
        return bytes((offset + i) & 0xFF for i in range(length))


class Recorder:
    """An inline driver that notes its calls; `answer` is what its methods return, or raise."""

    size = 8 << 20
    thread_model = "inline"

    def __init__(self, answer: Any = None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.answer = answer

    def _note(self, *call: object) -> Any:
        self.calls.append(call)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def read(self, offset: int, length: int) -> Any:
        return self._note("read", offset, length)

    def write(self, offset: int, data: bytes) -> Any:
        return self._note("write", offset, len(data))

    def flush(self) -> Any:
        return self._note("flush")

    def trim(self, offset: int, length: int) -> Any:
        return self._note("trim", offset, length)

    def close(self) -> None:
        self.calls.append(("close",))


class AsyncDriver:
    """Coroutines that wait until they are let go; `order` has what happened."""

    size = 1 << 20

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.order: list[str] = []

    async def _pass(self, what: str) -> None:
        self.order.append(f"{what} begins")
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.order.append(f"{what} cancelled")
            raise
        self.order.append(f"{what} ends")

    async def read(self, offset: int, length: int) -> bytes:
        await self._pass("read")
        return bytes(length)

    async def write(self, offset: int, data: bytes) -> None:
        await self._pass("write")

    async def flush(self) -> None:
        await self._pass("flush")

    async def close(self) -> None:
        self.order.append("close")


def refused(call: Callable[..., Any], *args: Any, **options: Any) -> BlockError:
    with pytest.raises(BlockError) as caught:
        call(*args, **options)
    return caught.value
