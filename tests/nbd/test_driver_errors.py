"""Whatever a driver raises, in each thread model: the request is answered with an error, and the next one served."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.errors import BlockError, ContextClosed, PeerError, WouldDeadlock
from homeloop.nbd.client import Client, connect
from homeloop.nbd.server import Server
from tests.nbd.talking import soon

SIZE = 1 << 20


class Mute(Exception):
    """It cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class OwnKind(BaseException):
    """Neither an Exception nor one of Python's."""


KINDS: list[Callable[[], BaseException]] = [
    lambda: SystemExit(3), KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, StopIteration, StopAsyncIteration,
    RecursionError, MemoryError, lambda: ContextClosed("another one has ended"), lambda: PeerError("of another peer"),
    lambda: WouldDeadlock("somewhere"), Mute, OwnKind, lambda: OSError("without a number"),
    lambda: OSError(-5, "negative"), lambda: ExceptionGroup("several", [ValueError(), OSError()]),
    lambda: BaseExceptionGroup("several", [SystemExit()]), AssertionError, asyncio.InvalidStateError,
]
METHODS = ("read", "write", "flush", "trim", "write_zeroes", "cache", "extents")


class Raises:
    """A driver over memory whose methods raise what the test says, once."""

    size = SIZE

    def __init__(self, model: str) -> None:
        self.thread_model = "serialised" if model == "async" else model
        self.fails: BaseException | None = None
        self.memory = Memory(SIZE)
        for name in METHODS:
            setattr(self, name, self.method(model, getattr(self.memory, name, None)))

    def method(self, model: str, found: Callable[..., Any] | None) -> Callable[..., Any]:
        def plain(*args: Any, **options: Any) -> Any:
            fails, self.fails = self.fails, None
            if fails is not None:
                raise fails
            return None if found is None else found(*args, **options)

        async def later(*args: Any, **options: Any) -> Any:
            await asyncio.sleep(0)
            return plain(*args, **options)

        def direct(*args: Any, **options: Any) -> Any:
            return later(*args, **options)

        return {"async": later, "direct": direct}.get(model, plain)

    def read(self, offset: int, length: int) -> Any:
        raise AssertionError("the instance has its own")


def asks(client: Client) -> list[Callable[[], Any]]:
    return [
        lambda: client.read(0, 512), lambda: client.write(0, bytes(512)), client.flush, lambda: client.trim(0, 512),
        lambda: client.write_zeroes(0, 512), lambda: client.cache(0, 512), lambda: client.extents(0, 512),
        lambda: client.write(0, bytes(512), fua=True),
    ]


@pytest.mark.parametrize("model", ["inline", "direct", "serialised", "parallel", "async"])
def test_what_a_driver_raises_is_the_answer_to_its_request(model: str, tmp_path: Path) -> None:
    """In an IOThread, where a SystemExit or a KeyboardInterrupt that got out would end the loop."""
    async def main() -> None:
        driver = Raises(model)
        with IOThread("io") as io:
            server = Server(AioContext.of())
            await server.add_export("disk", Device(driver), io.context)
            await server.listen(tmp_path / "s")
            async with connect(server.uri("disk")) as client:
                for make in KINDS:
                    for ask in asks(client):
                        driver.fails = make()
                        with pytest.raises(BlockError) as caught:
                            await soon(ask())
                        assert caught.value.errno == errno.EIO, (driver.fails, caught.value)
                        assert driver.fails is None
                        await soon(ask())
                        assert await soon(client.read(512, 512)) == bytes(512)
                (export,) = server.statistics().exports
                assert export.errors == len(KINDS) * len(asks(client))
                assert export.clients == 1
            await server.close()
            assert server.statistics().failed == 0

    run(main())


def test_the_error_text_names_what_was_raised(tmp_path: Path) -> None:
    async def main() -> None:
        driver = Raises("inline")
        with IOThread("io") as io:
            server = Server(AioContext.of())
            await server.add_export("disk", Device(driver), io.context)
            await server.listen(tmp_path / "s")
            async with connect(server.uri("disk")) as client:
                for raised, text in [(SystemExit(3), "SystemExit: 3"), (Mute(), "Mute: (its text cannot be shown)")]:
                    driver.fails = raised
                    with pytest.raises(BlockError, match="aise") as caught:
                        await soon(client.read(0, 512))
                    assert text in caught.value.text
            await server.close()

    run(main())


def test_an_answer_that_raises_when_it_is_looked_at(tmp_path: Path) -> None:
    class Odd:
        def __len__(self) -> int:
            raise SystemExit(1)

        def __buffer__(self, flags: int) -> memoryview:
            raise RuntimeError("no buffer today")

    class Answers(Memory):
        def read(self, offset: int, length: int) -> Any:
            return Odd() if offset == 0 else super().read(offset, length)

    async def main() -> None:
        with IOThread("io") as io:
            server = Server(AioContext.of())
            await server.add_export("disk", Device(Answers(SIZE)), io.context)
            await server.listen(tmp_path / "s")
            async with connect(server.uri("disk")) as client:
                with pytest.raises(BlockError) as caught:
                    await soon(client.read(0, 512))
                assert caught.value.errno == errno.EIO
                assert await soon(client.read(512, 512)) == bytes(512)
            await server.close()

    run(main())
