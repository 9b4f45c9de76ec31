"""Requests that a driver may decline: cache, and zeroes that must be fast."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from homeloop.block import file as file_module
from homeloop.block.device import Device
from homeloop.block.file import File
from homeloop.block.memory import Memory
from homeloop.errors import BlockError
from tests.block.answers import finish
from tests.block.drivers import Least, Recorder, refused
from tests.block.images import need_holes

MIB = 1 << 20


class Zeroing(Recorder):
    """Has fast zeroes, and says no if told to."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Any:
        return self._note("write_zeroes", offset, length, may_trim, fast)

    def cache(self, offset: int, length: int) -> Any:
        return self._note("cache", offset, length)


class Slow(Recorder):
    """Has write_zeroes, of the kind that knows nothing of fast."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> Any:
        return self._note("write_zeroes", offset, length, may_trim)


class Anything(Recorder):
    """Takes whatever comes, which does not say that it means it."""

    def write_zeroes(self, offset: int, length: int, **options: bool) -> Any:
        return self._note("write_zeroes", offset, length, options)


def test_wz2_fast_reaches_a_driver_that_knows_it() -> None:
    driver = Zeroing()
    device = Device(driver)
    assert device.can_fast_zero
    device.write_zeroes(0, 512, fast=True)
    device.write_zeroes(512, 512, may_trim=False)
    assert driver.calls == [("write_zeroes", 0, 512, True, True), ("write_zeroes", 512, 512, False, False)]


@pytest.mark.parametrize("make", [Recorder, Slow, Anything])
def test_wz2_fast_is_refused_for_others(make: Any) -> None:
    driver = make()
    device = Device(driver)
    assert not device.can_fast_zero
    error = refused(device.write_zeroes, 0, 512, fast=True)
    assert (error.errno, driver.calls) == (errno.EINVAL, [])
    assert "has none" in error.text
    device.write_zeroes(0, 512)
    assert len(driver.calls) == 1


def test_wz2_enotsup_passes() -> None:
    device = Device(Zeroing(OSError(errno.ENOTSUP, "slow")))
    assert refused(device.write_zeroes, 0, 512, fast=True).errno == errno.ENOTSUP


def test_a_read_only_device_has_no_fast_zeroes() -> None:
    device = Device(Memory(MIB), read_only=True)
    assert not device.can_fast_zero
    assert refused(device.write_zeroes, 0, 512, fast=True).errno == errno.EPERM


def test_ca1_cache() -> None:
    driver = Zeroing()
    device = Device(driver)
    assert device.can_cache
    device.cache(0, 512)
    device.cache(512, 0)
    assert driver.calls == [("cache", 0, 512)]
    assert refused(device.cache, 0, driver.size + 1).errno == errno.EINVAL
    assert Device(driver, read_only=True).cache(0, 512) is None


def test_ca1_a_driver_without_cache() -> None:
    device = Device(Least())
    assert not device.can_cache
    assert "has no cache" in refused(device.cache, 0, 512).text


def test_memory_has_both() -> None:
    memory = Memory(MIB)
    device = Device(memory)
    device.write(0, b"x" * MIB)
    assert device.cache(0, MIB) is None
    assert device.write_zeroes(0, MIB, fast=True, may_trim=False) is None
    assert memory.allocated_bytes == 0


def test_file_has_both(tmp_path: Path) -> None:
    need_holes(tmp_path)
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))

    async def main() -> None:
        device = Device(File(path))
        assert await finish(device.cache(0, MIB)) is None
        await finish(device.write_zeroes(0, 65536, fast=True))
        assert await finish(device.read(0, 65536)) == bytes(65536)
        await device.close()

    asyncio.run(main())


@pytest.mark.parametrize("may_trim", [True, False])
def test_wz2_a_file_system_that_can_only_write_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_trim: bool
) -> None:
    """ENOTSUP, and the contents are as they were; without fast it writes."""
    monkeypatch.setattr(file_module, "punch_hole", lambda *_: False)
    monkeypatch.setattr(file_module, "zero_range", lambda *_: False)
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4096)

    async def main() -> None:
        device = Device(File(path))
        with pytest.raises(BlockError, match="by writing it only") as caught:
            await finish(device.write_zeroes(0, 4096, may_trim=may_trim, fast=True))
        assert caught.value.errno == errno.ENOTSUP
        assert path.read_bytes() == b"x" * 4096
        await finish(device.write_zeroes(0, 4096, may_trim=may_trim))
        assert path.read_bytes() == bytes(4096)
        await device.close()

    asyncio.run(main())
