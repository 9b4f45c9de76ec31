"""serve(): one device, one line, from any context."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.current import current_context
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.nbd.client import connect
from homeloop.nbd.serving import serve
from homeloop.nbd.uri import parse_uri

SIZE = 1 << 20


class Recording(Memory):
    """Says where it was called."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.contexts: set[AioContext | None] = set()
        self.closed = 0

    def flush(self) -> None:
        self.contexts.add(current_context())

    def close(self) -> None:
        self.closed += 1


async def use(uri: str) -> None:
    async with connect(uri) as client:
        await client.write(100, b"data")
        assert await client.read(100, 4) == b"data"
        await client.flush()


async def serve_and_use(**options: object) -> tuple[Recording, str]:
    driver = Recording()
    async with serve(driver, **options) as uri:  # type: ignore[arg-type]
        await use(uri)
        assert driver.closed == 0
    assert driver.closed == 1
    return driver, uri


def test_private_directory() -> None:
    async def main() -> None:
        async with serve(Memory(SIZE)) as uri:
            await use(uri)
            folders.append(Path(parse_uri(uri).socket or "").parent)
            assert folders[0].stat().st_mode & 0o777 == 0o700

    folders: list[Path] = []
    run(main())
    assert not folders[0].exists()


def test_an_iothread_of_its_own() -> None:
    async def main() -> None:
        driver, _ = await serve_and_use(name="x")
        (home,) = driver.contexts
        assert home is not None
        assert home is not AioContext.of()
        assert home.closed

    run(main())


def test_a_given_iothread_and_none() -> None:
    async def main() -> None:
        with IOThread("io") as io:
            driver, _ = await serve_and_use(iothread=io)
            assert driver.contexts == {io.context}
        driver, _ = await serve_and_use(iothread=False)
        assert driver.contexts == {AioContext.of()}

    run(main())


def test_from_an_iothread() -> None:
    async def main() -> None:
        with IOThread("io") as io:
            driver, _ = await io.run(serve_and_use())
            assert io.context not in driver.contexts

    run(main())


def test_from_plain_asyncio() -> None:
    asyncio.run(serve_and_use())


def test_addresses(tmp_path: Path) -> None:
    async def main() -> None:
        _, uri = await serve_and_use(socket=tmp_path / "s", name="n")
        assert uri == f"nbd+unix:///n?socket={tmp_path}/s"
        _, uri = await serve_and_use(listen=("127.0.0.1", 0))
        assert uri.startswith("nbd://127.0.0.1:")
        with pytest.raises(ValueError, match="not both"):
            await serve_and_use(socket=tmp_path / "s", listen=("127.0.0.1", 0))

    run(main())


def test_a_device_stays_the_callers() -> None:
    async def main() -> None:
        driver = Recording()
        device = Device(driver)
        async with serve(device, iothread=False, read_only=True, description="text") as uri:
            async with connect(uri) as client:
                assert client.read_only
                assert client.info.description == "text"
        assert driver.closed == 0
        await device.close()
        assert driver.closed == 1

    run(main())


def test_an_error_in_the_block_closes_it_all() -> None:
    driver = Recording()

    async def main() -> None:
        async with serve(driver) as uri, connect(uri):
            raise KeyError(uri)

    with pytest.raises(KeyError):
        run(main())
    assert driver.closed == 1
