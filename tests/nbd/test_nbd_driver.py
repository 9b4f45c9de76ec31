"""An export as a device: what is passed on, what is missing, what is split; and proxied to real clients."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.block.opening import default_name, open_device
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.errors import BlockError, ConnectionDropped, UsageError
from homeloop.nbd.client import connect
from homeloop.nbd.limits import ConnectionLimits
from homeloop.nbd.nbd_driver import open_nbd
from homeloop.nbd.protocol import TransmissionFlag
from homeloop.nbd.server import ServerLimits
from homeloop.nbd.serving import serve
from tests.nbd.scripted import Scripted
from tests.nbd.talking import Gated, soon, turns, until
from tests.nbd.test_interop import image, tell

SIZE = 4 << 20


@asynccontextmanager
async def proxied(driver: Any, **options: Any) -> AsyncIterator[Device]:
    """A device over an export of `driver`."""
    async with serve(driver, **options) as uri:
        device = Device(await to_worker(open_nbd, uri))
        try:
            yield device
        finally:
            await soon(device.close())


async def answer(asked: Any) -> Any:
    return await soon(asked) if isinstance(asked, Awaitable) else asked


def test_everything_is_passed_on() -> None:
    class Recording(Memory):
        block_size_min = 512
        block_size_preferred = 65536

        def __init__(self) -> None:
            super().__init__(SIZE)
            self.told: list[Any] = []

        def write_fua(self, offset: int, data: Any) -> None:
            self.told.append(("write_fua", offset, bytes(data)))

        def flush(self) -> None:
            self.told.append("flush")

        def trim(self, offset: int, length: int) -> None:
            self.told.append(("trim", offset, length))

        def cache(self, offset: int, length: int) -> None:
            self.told.append(("cache", offset, length))

        def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
            self.told.append(("write_zeroes", offset, length, may_trim, fast))

    async def main() -> None:
        driver = Recording()
        async with proxied(driver) as device:
            assert (device.size, device.block_size.minimum, device.block_size.preferred) == (SIZE, 512, 65536)
            assert device.can_multi_conn
            assert device.can_fast_zero
            assert not device.read_only
            await answer(device.write(512, b"x" * 512))
            assert await answer(device.read(0, 1024)) == bytes(512) + b"x" * 512
            for asked in (
                device.write(0, b"f" * 512, fua=True), device.flush(), device.trim(0, 1024), device.cache(512, 512),
                device.write_zeroes(0, SIZE, may_trim=False), device.write_zeroes(0, 512, fast=True),
            ):
                await answer(asked)
            assert driver.told == [
                ("write_fua", 0, b"f" * 512), "flush", ("trim", 0, 1024), ("cache", 512, 512),
                ("write_zeroes", 0, SIZE, False, False), ("write_zeroes", 0, 512, True, True),
            ]
            assert await answer(device.extents(0, SIZE)) == [(65536, False, False), (SIZE - 65536, True, True)]

    run(main())


class LateChanges(Gated):
    async def trim(self, offset: int, length: int) -> None:     # type: ignore[override]
        await self.gate(offset)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:      # type: ignore[override]
        await self.gate(offset)


def test_a_cancelled_change_ends_when_the_server_has_answered() -> None:
    """Else it could be done after what the caller does next. Cancelled twice, it ends; a read, at once."""
    async def main() -> None:
        driver = LateChanges()
        async with proxied(driver, iothread=False) as device:
            for change in (device.write(0, b"x" * 4096), device.write_zeroes(0, 4096), device.trim(0, 4096)):
                writing = asyncio.ensure_future(change)                     # type: ignore[arg-type]
                await until(lambda: driver.waiting)
                writing.cancel()
                await turns()
                assert not writing.done()
                driver.release()
                with pytest.raises(asyncio.CancelledError):
                    await soon(writing)
                assert not driver.waiting
            reading = asyncio.ensure_future(device.read(0, 4096))           # type: ignore[arg-type]
            await until(lambda: driver.waiting)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(reading)
            writing = asyncio.ensure_future(device.write(4096, b"y" * 4096))    # type: ignore[arg-type]
            await until(lambda: len(driver.waiting) == 2)
            writing.cancel()
            await turns()
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(writing)
            driver.release()

    run(main())


def test_a_cancelled_change_ends_with_its_connection() -> None:
    async def main() -> None:
        driver = Gated()
        async with proxied(driver, iothread=False) as device:
            writing = asyncio.ensure_future(device.write(0, b"x" * 4096))   # type: ignore[arg-type]
            await until(lambda: driver.waiting)
            writing.cancel()
            await turns()
            driver.fail(0, ConnectionDropped("as told"))
            with pytest.raises(asyncio.CancelledError):
                await soon(writing)

    run(main())


def test_what_the_server_has_not() -> None:
    class Plain:
        size = SIZE
        thread_model = "inline"

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, offset: int, data: Any) -> None:
            pass

    async def main() -> None:
        async with proxied(Plain()) as device:
            offered = [device.can_flush, device.can_fua, device.can_trim, device.can_cache, device.can_fast_zero]
            assert not any(offered)
            assert not device.can_multi_conn
            await answer(device.write_zeroes(0, SIZE))
            assert await answer(device.extents(0, SIZE)) == [(SIZE, False, False)]
        async with proxied(Memory(SIZE), read_only=True) as device:
            assert device.read_only

    run(main())


def test_larger_than_the_server_takes(seed: int) -> None:
    """Reads and writes are cut; the server would refuse them else."""
    async def main() -> None:
        limits = ServerLimits(connection=ConnectionLimits(payload_bytes_max=1 << 20))
        data = random.Random(seed).randbytes((3 << 20) + 512)
        async with proxied(Memory(SIZE), limits=limits) as device:
            await answer(device.write(512, data))
            await answer(device.write(0, data[:512], fua=True))
            assert await answer(device.read(512, len(data))) == data

    run(main())


def test_the_servers_errors() -> None:
    class Failing(Memory):
        def read(self, offset: int, length: int) -> bytes:
            raise OSError(errno.ENOSPC, "odd")

        def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
            raise OSError(errno.ENOTSUP, "slow")

    async def main() -> None:
        async with proxied(Failing(SIZE)) as device:
            for asked, number in ((device.read(0, 512), errno.ENOSPC),
                                  (device.write_zeroes(0, 512, fast=True), errno.ENOTSUP)):
                with pytest.raises(BlockError) as caught:
                    await answer(asked)
                assert caught.value.errno == number

    run(main())


def test_read_only_and_not_used(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path / "s") as server:
            driver = await to_worker(lambda: open_nbd(server.uri, read_only=True))
            assert Device(driver).read_only
            assert "NbdDriver" in repr(driver)
            driver.abandon()
            assert await (await server.peer()).ended() == b""
            driver = await to_worker(open_nbd, server.uri)
            await soon(driver.close())              # no request has made a home for it
            assert await (await server.peer()).ended() == b""

    run(main())


@pytest.mark.foreign("nbdcopy", "nbdinfo", "qemu-img")
def test_a_proxy_of_a_proxy(tmp_path: Path, seed: int) -> None:
    """Real clients do not notice: what they copy in, its holes, what they copy out."""
    source, target = image(tmp_path / "source", seed), tmp_path / "target"

    async def main() -> None:
        async with serve(Memory(source.stat().st_size)) as far:
            near = await to_worker(open_nbd, far)
            async with serve(near) as uri:
                await tell("nbdcopy", "--flush", source, uri)
                assert await tell("nbdinfo", "--map", uri) == await tell("nbdinfo", "--map", far)
                assert "identical" in await tell("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
                await tell("nbdcopy", uri, target)
                async with connect(uri) as client:
                    assert client.can(TransmissionFlag.CAN_MULTI_CONN)

    run(main())
    assert source.read_bytes() == target.read_bytes()


def test_as_a_kind_of_device(tmp_path: Path) -> None:
    """open_device() knows it by its URI; what is wrong with that is one sentence."""
    async def main() -> None:
        async with serve(Memory(SIZE), name="disk") as uri:
            device = await to_worker(lambda: open_device(uri, read_only=True))
            assert (device.name, device.size, device.read_only) == ("disk", SIZE, True)
            assert await answer(device.read(0, 512)) == bytes(512)
            await soon(device.close())
            with pytest.raises(BlockError, match="ERR_UNKNOWN"):
                await to_worker(open_device, uri.replace("disk", "other", 1))

    run(main())
    assert default_name("nbd://host") == "nbd"
    for spec, error in (("nbd+unix:///x", UsageError), ("nbd://[", UsageError)):
        with pytest.raises(error, match="NBD URI"):
            open_device(spec)
    with pytest.raises(UsageError, match="a size and creating are for files"):
        open_device(f"nbd+unix:///?socket={tmp_path}/s", size=4096)
    with pytest.raises(BlockError, match="No such file") as caught:
        open_device(f"nbd+unix:///?socket={tmp_path}/s")
    assert caught.value.errno == errno.ENOENT
