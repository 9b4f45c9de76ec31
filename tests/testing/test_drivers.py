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
from homeloop.block.null import Null
from homeloop.block.opening import open_driver
from homeloop.errors import UsageError
from homeloop.nbd.nbd_driver import open_nbd
from homeloop.testing.drivers import check_driver
from homeloop.testing.nbd_serving import NbdServing
from tests.block.filters.waiting import Waiting
from tests.block.test_http import Site, serving
from tests.testing.bad_drivers import BAD, SIZE, Bad, WedgedByAnError, _Async, _Memory

MOVES = 60


def _file(folder: Path, numbers: itertools.count[int]) -> File:
    return File(folder / str(next(numbers)), size=SIZE, create=True)


# Not flush: the last one is the closing device's own, below Retry, and is not asked again.
FAILING = ("read", "write", "write_zeroes", "trim", "cache", "extents")

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
    "retry": lambda below: Retry(Error(below, share=0.05, kinds=FAILING), times=30, delay_s=0),
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


CHAINS: dict[str, Callable[[Any], Any]] = {
    "cow-cache-delay": lambda below: Cow(Cache(Delay(below, jitter=1e-6), size=16 << 10, block=4096), cluster=4096),
    "cache-back-cow-delay": lambda below: Cache(
        Cow(Delay(below, jitter=1e-6), cluster=4096), size=16 << 10, block=4096, write_back=True
    ),
    "cache-back-delay": lambda below: Cache(Delay(below, jitter=1e-6), size=16 << 10, block=4096, write_back=True),
    "faults-cow-readahead": lambda below: Faults(seed=1, volatile=True).over(Cow(Readahead(below), cluster=4096)),
    "faults-readahead-rate": lambda below: Faults(seed=1, volatile=True).over(Readahead(Rate(below, bytes_per_s=1e10))),
    "retry-error-cache": lambda below: Retry(
        Error(Cache(below, size=65536), share=0.05, kinds=FAILING), times=30, delay_s=0
    ),
}
# What a user writes in a file, for python:FILE:CLASS?options.
CLASSES = """
import asyncio

class Plain:
    size = 300 << 10

    def __init__(self, block: int = 1, longest: int = 1 << 30):
        self.block_size_min, self.request_bytes_max = block, longest
        self.data = bytearray(self.size)

    def read(self, offset, length):
        assert (offset | length) % self.block_size_min == 0 and length <= self.request_bytes_max
        return bytes(self.data[offset:offset + length])

    def write(self, offset, data):
        assert (offset | len(data)) % self.block_size_min == 0 and len(data) <= self.request_bytes_max
        self.data[offset:offset + len(data)] = data

    def resize(self, size):
        self.data = self.data[:size].ljust(size, b"\\0")
        self.size = size

class Parallel(Plain):
    thread_model = "parallel"
    resize = None

class Into(Plain):
    def read_into(self, offset, buffer):
        buffer[:] = self.read(offset, len(buffer))

class Later(Plain):
    async def read(self, offset, length):
        await asyncio.sleep(0)
        return super().read(offset, length)

    async def write(self, offset, data):
        await asyncio.sleep(0)
        super().write(offset, data)
"""
USUAL = {"reads", "writes", "zeroes", "random_requests", "concurrent_requests", "extents", "close"}


@pytest.mark.parametrize("below", ["memory", "waiting"])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_filters(name: str, below: str, seed: int) -> None:
    make: dict[str, Callable[[], Any]] = {"memory": lambda: Memory(SIZE), "waiting": lambda: Waiting(SIZE)}
    report = check_driver(lambda: CHAINS[name](make[below]()), seed=seed, moves=MOVES)
    assert set(report.passed) >= USUAL
    assert ("resize" in report.passed) != ("cow" in name)


@pytest.mark.parametrize(("what", "more"), [
    ("Plain", {"resize"}),
    ("Plain?block=512", {"emulated_alignment", "resize"}),
    ("Plain?block=4096&longest=16384", {"emulated_alignment", "request_bytes_max"}),
    ("Parallel?longest=10000", {"request_bytes_max"}),
    ("Into", {"read_into"}),
    ("Into?block=512&longest=16384", {"read_into", "emulated_alignment", "request_bytes_max"}),
    ("Later?longest=4097", {"request_bytes_max"}),
])
def test_python_classes(what: str, more: set[str], tmp_path: Path, seed: int) -> None:
    file = tmp_path / "classes.py"
    file.write_text(CLASSES)
    report = check_driver(lambda: open_driver(f"python:{file}:{what}"), seed=seed, moves=MOVES)
    assert set(report.passed) >= USUAL | more


def test_null(seed: int) -> None:
    """It forgets what is written, so only a read-only one is a device like others."""
    report = check_driver(lambda: Readonly(open_driver("null:300k")), seed=seed, moves=MOVES)
    assert {"reads", "random_requests", "concurrent_requests", "extents"} <= set(report.passed)
    for only in ("traits", "reads", "extents", "cache", "close"):
        assert check_driver(Null, seed=seed, moves=MOVES, only=only).passed == (only,)


def test_http(seed: int) -> None:
    with serving(Site()) as site:
        report = check_driver(lambda: open_driver(site.url), seed=seed, moves=MOVES // 4)
    assert {"reads", "read_answers_are_kept", "random_requests", "concurrent_requests"} <= set(report.passed)
    assert "writes" in report.skipped


@pytest.mark.parametrize("served", ["memory", "waiting", "blocks"])
def test_nbd(served: str, seed: int) -> None:
    """A driver that is the client of an export: each check has a server's export of its own."""
    class Blocks(Memory):
        block_size_min = 4096

    names = itertools.count()
    make = {"memory": Memory, "waiting": Waiting, "blocks": Blocks}[served]
    with NbdServing() as serving_nbd:
        report = check_driver(
            lambda: open_nbd(serving_nbd(make(SIZE), name=str(next(names)))), seed=seed, moves=MOVES
        )
    assert set(report.passed) >= USUAL | {"flush", "trim", "cancelled_requests"}
    assert ("emulated_alignment" in report.passed) == (served == "blocks")


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
