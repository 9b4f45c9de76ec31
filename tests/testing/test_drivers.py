"""check_driver: all that comes along passes; drivers with one fault each fail, by the check that is about it."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.faults import Faults
from homeloop.block.file import File
from homeloop.block.filters.cache import Cache
from homeloop.block.filters.cow import Cow
from homeloop.block.filters.delay import Delay
from homeloop.block.filters.error import Error
from homeloop.block.filters.log import Log
from homeloop.block.filters.offset import Offset
from homeloop.block.filters.partition import Partition
from homeloop.block.filters.passing import Filter, Funnel
from homeloop.block.filters.rate import Rate
from homeloop.block.filters.readahead import Readahead
from homeloop.block.filters.readonly import Readonly
from homeloop.block.filters.retry import Retry
from homeloop.block.filters.tables import Found
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from homeloop.testing.drivers import check_driver
from tests.block.filters.waiting import Waiting
from tests.testing.bad_drivers import BAD, SIZE, Bad, WedgedByAnError, _Async, _Memory

MOVES = 60


def _file(folder: Path, numbers: itertools.count[int]) -> File:
    return File(folder / str(next(numbers)), size=SIZE, create=True)


# Each is made over memory, which never waits; over a file, whose workers do; and over coroutines.
FILTERS: dict[str, Callable[[Any], Any]] = {
    "faults": Faults(seed=1).over,
    "faults-volatile": lambda below: Faults(seed=1, volatile=True).over(below),
    "filter": Filter,
    "funnel": Funnel,
    "cache": lambda below: Cache(below, size=16 << 10, block=4096),
    "cache-back": lambda below: Cache(below, size=16 << 10, block=4096, write_back=True),
    "cow": lambda below: Cow(below, cluster=4096),
    "cow-waiting": lambda below: Cow(Memory(SIZE), overlay=below, cluster=4096),
    "delay": lambda below: Delay(below, jitter=1e-6),
    "error": lambda below: Error(below, share=0),
    "log": Log,
    "offset": lambda below: Offset(below, 4096, SIZE - 8192),
    "partition": lambda below: Partition(below, Found(number=1, offset=512, size=SIZE - 512, table="mbr")),
    "rate": lambda below: Rate(below, bytes_per_s=1e10, requests_per_s=1e6),
    "readahead": Readahead,
    "readonly": Readonly,
    "retry": lambda below: Retry(Error(below, share=0.05), times=30, delay_s=0),
    "stack": lambda below: Log(Cache(Cow(Readahead(Offset(below, 512)), cluster=4096), size=65536, write_back=True)),
}


@pytest.mark.parametrize("below", ["memory", "file", "waiting"])
@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_over_drivers_that_wait_and_that_do_not(
    name: str, below: str, tmp_path: Path, seed: int
) -> None:
    numbers = itertools.count()
    make: dict[str, Callable[[], Any]] = {
        "memory": lambda: Memory(SIZE), "file": lambda: _file(tmp_path, numbers), "waiting": lambda: Waiting(SIZE),
    }
    report = check_driver(lambda: FILTERS[name](make[below]()), seed=seed, moves=MOVES)
    assert {"reads", "random_requests", "extents", "close"} <= set(report.passed)


@pytest.mark.parametrize("name", ["memory", "file", "read-only file", "waiting", "large", "blocks", "tiny", "empty"])
def test_every_driver(name: str, tmp_path: Path, seed: int) -> None:
    numbers = itertools.count()
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 1024)

    class Blocks(Memory):
        block_size_min = 4096

        def read(self, offset: int, length: int) -> Any:
            assert (offset | length) % 4096 == 0
            return super().read(offset, length)

    make: dict[str, Callable[[], Any]] = {
        "memory": lambda: Memory(SIZE),
        "file": lambda: _file(tmp_path, numbers),
        "read-only file": lambda: File(image, read_only=True),
        "waiting": lambda: Waiting(SIZE),
        "large": lambda: Memory(1 << 50),
        "blocks": lambda: Blocks(SIZE),
        "tiny": lambda: Memory(1),
        "empty": lambda: Memory(0),
    }
    report = check_driver(make[name], seed=seed, moves=MOVES)
    assert report.seed == seed
    assert "traits" in report.passed
    assert "checks passed with" in str(report)


def short(bad: Bad) -> str:
    return str(bad.make.__name__)


def _wedge(driver: Any) -> None:
    driver.fail = True


@pytest.mark.parametrize("bad", BAD, ids=short)
def test_a_bad_driver_is_found_and_its_fault_named(bad: Bad, seed: int) -> None:
    with pytest.raises(AssertionError) as caught:
        check_driver(bad.make, seed=seed, moves=MOVES, only=bad.check, limit_s=1 if "hangs" in bad.text else 30,
                     fail_next=_wedge if bad.make is WedgedByAnError else None)
    text = str(caught.value)
    assert text.startswith(f"check_driver: {short(bad)}: {bad.check}: ")
    assert bad.text in text
    assert f"seed={seed}" in text


@pytest.mark.parametrize("bad", [bad for bad in BAD if "hangs" not in bad.text], ids=short)
def test_a_bad_driver_fails_the_whole_suite(bad: Bad, seed: int) -> None:
    with pytest.raises(AssertionError, match=f"check_driver: {short(bad)}: "):
        check_driver(bad.make, seed=seed, moves=MOVES, fail_next=_wedge if bad.make is WedgedByAnError else None)


def test_errors_are_checked_where_the_driver_can_be_told_to_fail() -> None:

    class Failing(_Async):
        fails = 0

        async def read(self, offset: int, length: int) -> bytes:
            await asyncio.sleep(0)
            if self.fails:
                self.fails -= 1
                raise OSError(errno.EIO, "as told")
            return await super().read(offset, length)

    def fail_next(driver: Failing) -> None:
        driver.fails = 1

    assert "errors" in check_driver(Failing, moves=5, fail_next=fail_next).passed
    with pytest.raises(AssertionError, match="fail_next was called, and the next read succeeded"):
        check_driver(_Memory, only="errors", fail_next=lambda driver: None)


def test_it_says_what_it_cannot_check() -> None:
    class Constant:
        size = 8192
        thread_model = "inline"

        def read(self, offset: int, length: int) -> bytes:
            return b"c" * length

    report = check_driver(Constant)
    assert report.driver == "Constant"
    assert "writes" in report.skipped
    assert "flush: skipped, the driver has no flush" in str(report)
    with pytest.raises(UsageError, match="there is no check 'flash', only traits, reads"):
        check_driver(Constant, only="flash")


def test_each_check_gets_a_driver_of_its_own_which_is_closed() -> None:
    made: list[Any] = []

    class Closed(Memory):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    def make() -> Closed:
        made.append(Closed(8192))
        return made[-1]

    check_driver(make, moves=5)
    assert len(made) > 10
    assert all(driver.closed == 1 for driver in made)


def test_the_device_is_closed_when_a_check_fails() -> None:
    closed: list[int] = []

    class Failing(Memory):
        def read(self, offset: int, length: int) -> Any:
            raise OSError(errno.EIO, "no")

        def close(self) -> None:
            closed.append(1)

    with pytest.raises(AssertionError, match="read of 1 bytes at 0 failed: EIO"):
        check_driver(lambda: Failing(8192), only="traits")
    assert closed == [1]
