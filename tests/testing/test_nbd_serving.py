"""Devices served to synchronous tests: their faults, what is below them, and their end whatever stalls."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any

import pytest

import homeloop
from homeloop.block.device import Device
from homeloop.block.faults import Faults
from homeloop.block.memory import Memory
from homeloop.core.iothread import IOThread
from homeloop.errors import BlockError, ConnectionLost, UsageError
from homeloop.nbd.client import connect
from homeloop.testing.nbd_serving import NbdServing

LIMIT_S = 20.0


async def ask(uri: str, method: str, *args: Any) -> Any:
    async with connect(uri) as client:
        return await getattr(client, method)(*args)


def request(uri: str, method: str, *args: Any) -> Any:
    return homeloop.run(ask(uri, method, *args))


def test_devices_and_drivers_under_names() -> None:
    with NbdServing() as serving:
        first = serving(Memory(4096))
        second = serving(Device(Memory(8192)), read_only=True)
        third = serving(Memory(512), name="mine")
        assert "///?" in first
        assert "///device-2?" in second
        assert "///mine?" in third
        request(first, "write", 5, b"data")
        assert bytes(request(first, "read", 4, 6)) == b"\0data\0"
        with pytest.raises(BlockError, match="EPERM"):
            request(second, "write", 0, b"x")
        with pytest.raises(UsageError, match="'mine' is served already"):
            serving(Memory(512), name="mine")


def test_faults_of_a_device_and_what_is_below_them(tmp_path: Path) -> None:
    with NbdServing() as serving:
        device = serving.device("3M", volatile=True, seed=5)
        image = tmp_path / "image"
        image.write_bytes(b"\0" * 2_000_000 + b"end")
        device.load(image)
        assert device.read(1_999_999, 5) == b"\0end\0"
        rule = device.faults.on("write", nth=2).error("ENOSPC")
        request(device.uri, "write", 0, b"first")
        with pytest.raises(BlockError) as caught:
            request(device.uri, "write", 0, b"second")
        assert caught.value.errno == errno.ENOSPC
        assert (rule.fired, device.read(0, 5)) == (1, b"\0" * 5)    # not flushed: not on the medium
        request(device.uri, "flush")
        device.save(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes()[:6] == b"first\0"
        assert (tmp_path / "copy").stat().st_size == device.size == 3 << 20


def test_its_end_lets_go_what_stalls_and_recovers() -> None:
    with NbdServing() as serving, IOThread() as iothread:
        faults = Faults()
        uri = serving(faults.over(Memory(4096)))
        stall = faults.on("read").stall()
        crashed = serving.device(4096)
        crashed.faults.crash()
        running = iothread.spawn(ask(uri, "read", 0, 1))
        stall.wait_reached(LIMIT_S)
        serving.close()
        with contextlib.suppress(ConnectionLost):                # answered, or cut off
            running.result(LIMIT_S)


def test_a_driver_that_does_not_close_well_fails_the_test() -> None:
    class Bad(Memory):
        def close(self) -> None:
            raise OSError(errno.EIO, "broken")

    serving = NbdServing()
    serving(Bad(4096))
    with pytest.raises(AssertionError, match=r"did not close well: EIO: Bad.close"):
        serving.close()
    serving.close()


def test_nothing_is_started_for_nothing() -> None:
    with NbdServing() as serving:
        assert serving._runtime is None
