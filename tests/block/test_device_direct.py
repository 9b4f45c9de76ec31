"""A direct driver: its plain methods return the answer or a coroutine object, and the device passes on which."""

from __future__ import annotations

import asyncio
import errno
import gc
import warnings
from collections.abc import Coroutine
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.errors import BlockError
from tests.block.answers import finish, is_inline, turns
from tests.block.drivers import refused

MIB = 1 << 20


class Moody:
    """Answers even blocks at once and waits for odd ones; notes what began and what was run."""

    thread_model = "direct"
    size = MIB

    def __init__(self) -> None:
        self.memory = Memory(MIB)
        self.log: list[str] = []
        self.error: Exception | None = None
        self.waits_to_flush = False

    def _answer(self, what: str, offset: int, answer: Any, waits: bool | None = None) -> Any:
        self.log.append(f"{what} asked")
        if offset // 4096 % 2 if waits is None else waits:
            return self._later(what, answer)
        return answer

    async def _later(self, what: str, answer: Any) -> Any:
        self.log.append(f"{what} begins")
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.log.append(f"{what} ends")
        return answer

    def read(self, offset: int, length: int) -> Any:
        return self._answer("read", offset, self.memory.read(offset, length))

    def write(self, offset: int, data: bytes) -> Any:
        self.memory.write(offset, data)
        return self._answer("write", offset, None)

    def flush(self) -> Any:
        return self._answer("flush", 0, None, self.waits_to_flush)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> Any:
        self.memory.write_zeroes(offset, length, may_trim=may_trim)
        return self._answer("write_zeroes", offset, None)

    def extents(self, offset: int, length: int) -> Any:
        return self._answer("extents", offset, [(length, False, False)])

    def close(self) -> Any:
        return self._answer("close", 0, None, True)


def test_answers_of_either_kind() -> None:
    async def main() -> None:
        driver = Moody()
        device = Device(driver)
        assert device.write(0, b"even") is None
        assert not is_inline(device.write(4096, b"odd!"))
        assert await finish(device.write(4096, b"odd!")) is None
        assert device.read(0, 4) == b"even"
        assert await finish(device.read(4096, 4)) == b"odd!"
        assert device.write_zeroes(0, 4) is None
        assert await finish(device.write_zeroes(4096, 4)) is None
        assert device.extents(0, 512) == [(512, False, False)]
        assert await finish(device.extents(4096, 512)) == [(512, False, False)]
        found = device.statistics()
        assert (found.reads, found.writes, found.write_zeroes) == (2, 2, 2)
        assert (found.waited, found.in_flight, found.errors) == (4, 0, 0)
        await device.close()
        assert driver.log[-1] == "close ends"

    asyncio.run(main())


@pytest.mark.parametrize(("offset", "waits_to_flush"), [(0, False), (0, True), (4096, False), (4096, True)])
def test_fua_is_flushed_behind_whichever_waits(offset: int, waits_to_flush: bool) -> None:
    async def main() -> None:
        driver = Moody()
        driver.waits_to_flush = waits_to_flush
        device = Device(driver)
        answer = device.write(offset, b"x", fua=True)
        assert (answer is None) is (offset == 0 and not waits_to_flush)
        await finish(answer)
        assert driver.log[0] == "write asked"
        assert driver.log.index("flush asked") > max(i for i, text in enumerate(driver.log) if "write" in text)
        assert ("flush ends" in driver.log) is waits_to_flush
        assert device.statistics().writes == 1

    asyncio.run(main())


@pytest.mark.parametrize("request_of", [
    lambda device: device.read(4096, 4),
    lambda device: device.write(4096, b"data"),
    lambda device: device.write_zeroes(4096, 4),
    lambda device: device.extents(4096, 512),
], ids=["read", "write", "write_zeroes", "extents"])
def test_what_is_never_run_is_forgotten_quietly(request_of: Any) -> None:
    """The coroutine of the device and the one of the driver in it: neither leaves a "never awaited" warning."""
    driver = Moody()
    device = Device(driver)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = request_of(device)
        answer.close()
        del answer
        gc.collect()
    assert not [str(warning.message) for warning in caught]
    assert driver.log == [driver.log[0]]
    assert driver.log[0].endswith("asked")
    assert device.in_flight == 0


@pytest.mark.parametrize(("error", "number"), [
    (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
    (BlockError(errno.EPERM, "no"), errno.EPERM),
    (ValueError("what"), errno.EIO),
])
def test_errors_of_what_waits(error: Exception, number: int) -> None:
    async def main() -> None:
        driver = Moody()
        device = Device(driver)
        driver.error = error
        for ask in (device.read, device.extents, device.write_zeroes):
            with pytest.raises(BlockError) as caught:
                await finish(ask(4096, 512))
            assert caught.value.errno == number
        assert device.statistics().errors == 3
        assert device.in_flight == 0

    asyncio.run(main())


def test_drain_waits_for_it_and_close_refuses_what_had_not_begun() -> None:
    async def main() -> None:
        device = Device(Moody())
        running: Coroutine[Any, Any, Any] = device.read(4096, 4)                    # type: ignore[assignment]
        not_begun: Coroutine[Any, Any, Any] = device.read(4096, 4)                  # type: ignore[assignment]
        task = asyncio.create_task(running)
        await turns(1)
        assert device.in_flight == 1
        await device.close()
        assert task.done()
        with pytest.raises(BlockError) as caught:
            await not_begun
        assert caught.value.errno == errno.ESHUTDOWN

    asyncio.run(main())


def test_other_awaitables_and_short_answers_are_errors() -> None:
    class Wrong(Moody):
        def read(self, offset: int, length: int) -> Any:
            if offset:
                return self._later("read", b"short")
            return asyncio.get_running_loop().create_future()

    async def main() -> None:
        device = Device(Wrong())
        assert "returned a Future" in refused(device.read, 0, 10).text
        with pytest.raises(BlockError, match="returned 5 of 10 bytes at 1"):
            await finish(device.read(1, 10))

    asyncio.run(main())


def test_without_the_declaration_a_coroutine_is_an_error() -> None:
    class Undeclared(Moody):
        thread_model = "inline"

    device = Device(Undeclared())
    assert "write `async def`" in refused(device.read, 4096, 4).text
    assert "write `async def`" in refused(device.write, 4096, b"data").text
