"""What a driver may do to its device: wrong answers, short writes, exceptions of every kind."""

from __future__ import annotations

import array
import asyncio
import errno
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.errors import BlockError
from tests.block.answers import BOUND_S, finish
from tests.block.drivers import Least, Recorder, refused


@pytest.mark.parametrize("model", ["inline", "serialised"])
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "returned 0 of 4 bytes at 8"),
        (b"abc", "returned 3 of 4 bytes at 8"),
        (bytearray(5), "returned 5 of 4 bytes at 8"),
        (memoryview(b"ab"), "returned 2 of 4 bytes at 8"),
        (array.array("I", [1, 2, 3, 4]), "returned 16 of 4 bytes at 8"),
        (None, "returned NoneType for 4 bytes at 8"),
        ("text", "returned str for 4 bytes at 8"),
        (4, "returned int for 4 bytes at 8"),
        ([1, 2, 3, 4], "returned list for 4 bytes at 8"),
    ],
)
def test_wrong_answer_to_a_read(model: str, answer: object, says: str) -> None:
    async def main() -> None:
        driver = Recorder(answer)
        driver.thread_model = model
        device = Device(driver)
        with pytest.raises(BlockError) as caught:
            await finish(device.read(8, 4))
        assert caught.value.errno == errno.EIO
        assert caught.value.text == f"Recorder.read {says}"
        assert device.statistics().errors == 1
        assert device.statistics().reads == 0
        assert device.in_flight == 0

    asyncio.run(main())


def test_inline_driver_cannot_put_off_its_answer() -> None:
    """None means "it would block" from a quick path only."""
    assert "returned NoneType" in refused(Device(Recorder(None)).read, 0, 4).text


@pytest.mark.parametrize(
    "answer",
    [
        b"abcd",
        bytearray(b"abcd"),
        memoryview(b"abcd"),
        memoryview(b"a.b.c.d.")[::2],
        memoryview(b"abcd").cast("I"),
        memoryview(b"abcd").cast("B", (2, 2)),
        array.array("b", b"abcd"),
        type("Own", (bytes,), {})(b"abcd"),
    ],
)
def test_any_buffer_is_bytes(answer: object) -> None:
    data = Device(Recorder(answer)).read(0, 4)
    assert isinstance(data, bytes | bytearray | memoryview)
    assert len(data) == 4
    assert data[0] == ord("a")
    assert bytes(data) == b"abcd"


@pytest.mark.parametrize("done", [0, 3, True, "4", b""])
@pytest.mark.parametrize("model", ["inline", "serialised"])
@pytest.mark.parametrize("fua", [False, True])
def test_short_write_is_an_error(done: object, model: str, fua: bool) -> None:
    async def main() -> None:
        driver = Recorder(done)
        driver.thread_model = model
        device = Device(driver)
        with pytest.raises(BlockError) as caught:
            await finish(device.write(8, b"data", fua=fua))
        assert caught.value.errno == errno.EIO
        assert caught.value.text == f"Recorder.write returned {done!r} for 4 bytes at 8"
        assert device.statistics().errors == 1

    asyncio.run(main())


def test_full_count_of_a_write_is_fine() -> None:
    assert Device(Recorder(4)).write(0, b"data") is None


@pytest.mark.parametrize("model", ["inline", "serialised", "parallel"])
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EFBIG, "big"), errno.ENOSPC),
        (ZeroDivisionError("oops"), errno.EIO),
        (StopIteration(), errno.EIO),
        (BlockError(errno.EPERM, "no"), errno.EPERM),
    ],
)
@pytest.mark.parametrize("kind", ["read", "write", "flush", "trim", "write_zeroes"])
def test_what_a_driver_raises(model: str, error: Exception, number: int, kind: str) -> None:
    async def main() -> None:
        driver = Recorder(error)
        driver.thread_model = model
        device = Device(driver)
        args = {"flush": (), "write": (0, b"data")}.get(kind, (0, 4))
        with pytest.raises(BlockError) as caught:
            await asyncio.wait_for(finish(getattr(device, kind)(*args)), BOUND_S)
        assert caught.value.errno == number
        assert device.in_flight == 0
        assert device.statistics().errors == 1

    asyncio.run(main())


def test_async_driver_that_raises() -> None:
    class Bad(Least):
        async def read(self, offset: int, length: int) -> bytes:    # type: ignore[override]
            raise OSError(errno.ENXIO, "gone")

    async def main() -> None:
        device = Device(Bad())
        with pytest.raises(BlockError, match=r"Bad\.read: OSError: .*gone") as caught:
            await finish(device.read(0, 4))
        assert caught.value.errno == errno.ENXIO
        assert isinstance(caught.value.__cause__, OSError)

    asyncio.run(main())


def test_plain_methods_that_return_coroutines() -> None:
    async def later() -> None: ...

    class Bad(Recorder):
        def _note(self, *call: object) -> Any:
            return later()

    device = Device(Bad())
    for call, args in ((device.read, (0, 4)), (device.write, (0, b"x")), (device.trim, (0, 1))):
        error = refused(call, *args)
        assert error.errno == errno.EIO
        assert "returned a coroutine" in error.text


@pytest.mark.parametrize(("quick", "says"), [(None, "None"), (4, "4"), (b"", "b''")])
def test_wrong_answer_of_write_nowait(quick: object, says: str) -> None:
    class Bad(Recorder):
        def write_nowait(self, offset: int, data: bytes) -> Any:
            return quick

    bad = Bad()
    bad.thread_model = "parallel"
    assert f"write_nowait returned {says}, not True or False" in refused(Device(bad).write, 0, b"data").text


def test_quick_paths_that_raise() -> None:
    class Bad(Recorder):
        thread_model = "parallel"

        def read_nowait(self, offset: int, length: int) -> Any:
            raise OSError(errno.EIO, "cable")

        write_nowait = read_nowait

    device = Device(Bad())
    assert "cable" in refused(device.read, 0, 1).text
    assert "cable" in refused(device.write, 0, b"x").text
    assert device.statistics().errors == 2


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_passes(ending: type[BaseException]) -> None:
    device = Device(Recorder(ending()))
    with pytest.raises(ending):
        device.read(0, 1)
