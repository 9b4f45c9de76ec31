"""What failed is asked again, with longer and longer waits, as often as was said and for these errors only."""

from __future__ import annotations

import asyncio
import errno

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.retry import Retry
from homeloop.block.memory import Memory
from homeloop.errors import BlockError, UsageError
from homeloop.testing.jumping import run_jumping
from tests.block.filters.waiting import Waiting


def asked(failures: int, **options: object) -> tuple[float, int, int]:
    """Write, failing so often: the seconds it took, how often it was asked, the errno or 0."""

    async def main() -> tuple[float, int, int]:
        driver = Waiting(4096)
        driver.errors["write"] = [OSError(errno.EIO, "again")] * failures
        device = Device(Retry(driver, **options))       # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        start, number = loop.time(), 0
        try:
            answer = device.write(0, b"data")
            assert answer is not None
            await answer
        except BlockError as error:
            number = error.errno
        return loop.time() - start, len(driver.begun), number

    return run_jumping(main())


def test_waits_double_up_to_the_longest() -> None:
    assert asked(0) == (0, 1, 0)
    assert asked(1, delay_s=3) == (pytest.approx(3), 2, 0)
    assert asked(5, delay_s=1, delay_max_s=4) == (pytest.approx(1 + 2 + 4 + 4 + 4), 6, 0)


def test_gives_up_after_so_many_times() -> None:
    assert asked(10, times=2, delay_s=1) == (pytest.approx(3), 3, errno.EIO)
    assert asked(1, times=0) == (0, 1, errno.EIO)


def test_other_errors_are_not_for_it() -> None:
    assert asked(1, errnos=["ENOSPC"]) == (0, 1, errno.EIO)
    assert asked(1, errnos=[errno.EIO], delay_s=0) == (pytest.approx(0), 2, 0)


def test_success_is_inline() -> None:
    filtered = Retry(Memory(4096))
    assert Device(filtered).read(0, 1) == b"\0"
    assert filtered.retried == 0


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="times=-1"):
        Retry(Memory(1), times=-1)
    with pytest.raises(UsageError, match="delay_s=nan"):
        Retry(Memory(1), delay_s=float("nan"))
