"""Requests of some kinds fail with an errno, and are not passed on."""

from __future__ import annotations

import errno

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.error import Error
from homeloop.block.memory import Memory
from homeloop.errors import BlockError, UsageError
from tests.block.drivers import Recorder, refused


def test_kinds_errno_and_range() -> None:
    driver = Recorder()
    device = Device(Error(driver, "ENOSPC", kinds=("write", "trim"), at=(4096, 8192)))
    assert refused(device.write, 8191, b"ab").errno == errno.ENOSPC
    assert refused(device.trim, 0, 4097).errno == errno.ENOSPC
    assert driver.calls == []
    device.write(8192, b"ab")
    device.write(0, b"a" * 4096)
    device.flush()
    assert [call[0] for call in driver.calls] == ["write", "write", "flush"]
    assert "write of 2 bytes at 8191: injected" in refused(device.write, 8191, b"ab").text


def test_share_is_the_seeds() -> None:
    def pattern(seed: int) -> list[bool]:
        device = Device(Error(Memory(4096), share=0.5, seed=seed))
        found = []
        for _ in range(50):
            try:
                device.read(0, 1)
                found.append(True)
            except BlockError as error:
                found.append(error.errno != errno.EIO)
        return found

    assert pattern(3) == pattern(3) != pattern(4)
    assert 10 < sum(pattern(3)) < 40


@pytest.mark.parametrize(("options", "text"), [
    ({"errno": "EBANANA"}, "'EBANANA' is no errno"), ({"errno": 0}, "0 is no errno"),
    ({"errno": True}, "True is no errno"),
    ({"errno": "errorcode"}, "is no errno"), ({"kinds": "reed"}, "there are no 'reed' requests"),
    ({"kinds": ()}, "no kind"), ({"share": 2}, "share=2"),
])
def test_options_that_make_no_sense(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Error(Memory(1), **options)     # type: ignore[arg-type]
