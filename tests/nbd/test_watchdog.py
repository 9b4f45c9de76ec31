"""A home that does not come round is named in the log, with what it is at; one that sleeps, or is busy, is not.

Who stands does so until the log has said it: nothing here is timed but by the limits of the waits. Where something
must not be said, the test looks itself, at times that it makes up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.registry import big_lock
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.nbd.client import connect
from homeloop.nbd.export import Export
from homeloop.nbd.server import Server, ServerLimits
from homeloop.nbd.watchdog import Watchdog
from tests.nbd.talking import Gated, soon, until

SIZE = 1 << 20
LIMIT_S = 30.0
SOON_S = 0.1


class Said(logging.Handler):
    """What the watchdog has said; anybody can wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.blocked = threading.Event()
        self.over = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        # On a machine that is busy elsewhere a home may really not come round for SOON_S: that is said, too.
        if "in stand_" in self.lines[-1]:
            self.blocked.set()
        elif self.blocked.is_set():
            self.over.set()

    def blocks(self) -> list[str]:
        return [line for line in self.lines if "in stand_" in line]


@pytest.fixture
def said() -> Iterator[Said]:
    logger, handler = logging.getLogger("homeloop.nbd.watchdog"), Said()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


class Stands(Memory):
    """A driver whose first read blocks the thread that it runs on, until the watchdog has spoken."""

    def __init__(self, said: Said) -> None:
        super().__init__(SIZE)
        self.said = said
        self.reads = 0

    def read(self, offset: int, length: int) -> Any:
        self.reads += 1
        if self.reads == 1:
            self.stand_here()
        return super().read(offset, length)

    def stand_here(self) -> None:
        assert self.said.blocked.wait(LIMIT_S), "the watchdog says nothing"


class StandsInCoroutine(Stands):
    async def read(self, offset: int, length: int) -> Any:  # type: ignore[override]
        return super().read(offset, length)


@asynccontextmanager
async def serving(path: Path, homes: dict[str, tuple[Any, AioContext | None]]) -> AsyncIterator[Server]:
    server = Server(AioContext.of(), limits=ServerLimits(blocked_s=SOON_S), name="test")
    try:
        for name, (driver, home) in homes.items():
            await server.add_export(name, Device(driver), home)
        await server.listen(path / "s")
        yield server
    finally:
        await soon(server.close())


@pytest.mark.parametrize("kind", [Stands, StandsInCoroutine])
def test_a_driver_that_blocks_its_home_is_named_once_with_its_stack(
    kind: type[Stands], tmp_path: Path, said: Said
) -> None:
    async def main() -> None:
        with IOThread("io-a") as a, IOThread("io-b") as b:
            homes: dict[str, Any] = {"slow": (kind(said), a.context), "beside": (Memory(SIZE), a.context)}
            homes["far"] = Memory(SIZE), b.context
            async with serving(tmp_path, homes) as server:
                async with connect(server.uri("slow")) as client:
                    assert await client.read(0, 512) == bytes(512)
                    assert await to_worker(said.over.wait, LIMIT_S)
                    assert await client.read(0, 512) == bytes(512)

    run(main())
    blocked = said.blocks()
    assert len(blocked) == 1, said.lines
    assert "test: io-a has not come round for" in blocked[0]
    assert f"blocked by export 'slow' ({kind.__name__})" in blocked[0]
    assert "beside" not in blocked[0]
    assert "in stand_here" in blocked[0]
    assert "thread_model" in blocked[0]
    assert "IOThread of its own" in blocked[0]
    assert any(line.startswith("test: io-a comes round again, after ") for line in said.lines)


def test_a_loop_of_another_make(tmp_path: Path, said: Said) -> None:
    async def main() -> None:
        with IOThread("io-a", loop_factory=asyncio.SelectorEventLoop) as a:
            async with serving(tmp_path, {"slow": (Stands(said), a.context)}) as server:
                async with connect(server.uri("slow")) as client:
                    # Which thread it is only a probe tells, that has run before.
                    looked = server._watchdog._homes[a.context]     # type: ignore[union-attr]
                    await until(lambda: looked.thread)
                    assert await client.read(0, 512) == bytes(512)

    run(main())
    assert "io-a has not come round" in said.blocks()[0]


def test_the_main_context_kept_by_a_worker_with_the_big_lock(tmp_path: Path, said: Said) -> None:
    """An export at home in the main context waits for whoever holds the big lock: that thread is shown."""
    def keep() -> None:
        with big_lock():
            asking.set()
            stand_with_the_lock(said)

    asking = threading.Event()

    async def main() -> None:
        async with serving(tmp_path, {"disk": (Memory(SIZE), None)}) as server:
            async with connect(server.uri("disk")) as client:
                keeping = to_worker(keep)
                assert await client.read(0, 512) == bytes(512)
                await keeping

    run(main())
    assert "the home of export 'disk' (Memory)" in said.blocks()[0]


def stand_with_the_lock(said: Said) -> None:
    assert said.blocked.wait(LIMIT_S), "the watchdog says nothing"


@asynccontextmanager
async def looked_at(device: Device, home: AioContext) -> AsyncIterator[tuple[Watchdog, Export]]:
    """A watchdog that does not look by itself while the test runs."""
    watchdog = Watchdog("test", 3600.0)
    export = Export("disk", device, home, payload_bytes_max=1 << 25)
    watchdog.watch(export)
    try:
        yield watchdog, export
    finally:
        watchdog.forget(export)


def test_a_home_that_sleeps_is_left_asleep(said: Said) -> None:
    async def main() -> None:
        with IOThread("io-a") as a:
            async with looked_at(Device(Memory(SIZE)), a.context) as (watchdog, _):
                await until(a.context.inbox.sleeping)
                iteration, now = a.context.home._iteration, time.monotonic()    # type: ignore[union-attr]
                for hour in range(1, 20):
                    watchdog.look(now + hour * 3600)
                assert a.context.home._iteration == iteration   # type: ignore[union-attr]
                assert a.context.statistics().posted == 0

    run(main())
    assert said.lines == []


def test_a_slow_async_device_is_no_blocked_home(said: Said) -> None:
    async def main() -> None:
        with IOThread("io-a") as a:
            driver = Gated(SIZE)
            device = Device(driver)

            async def read() -> Any:
                return await device.read(0, 512)    # type: ignore[misc]

            async with looked_at(device, a.context) as (watchdog, _):
                reading = a.context.spawn(read())
                await until(lambda: driver.waiting and a.context.inbox.sleeping())
                now = time.monotonic()
                for hour in range(1, 20):
                    watchdog.look(now + hour * 3600)
                a.context.post(driver.release)
                await reading

    run(main())
    assert said.lines == []


def test_a_home_that_is_busy_and_comes_round(said: Said) -> None:
    """Between two looks it went round: by its counter, or because it ran the probe."""
    async def main() -> None:
        stop = threading.Event()

        async def busy() -> None:
            while not stop.is_set():  # noqa: ASYNC110 - it is to keep its loop from sleeping
                await asyncio.sleep(0)

        with IOThread("io-a") as a:
            async with looked_at(Device(Memory(SIZE)), a.context) as (watchdog, _):
                running = a.context.spawn(busy())
                now = time.monotonic()
                for hour in range(1, 20):
                    before = a.context.home._iteration      # type: ignore[union-attr]
                    await until(lambda: a.context.home._iteration > before + 2)     # type: ignore[union-attr] # noqa: B023
                    watchdog.look(now + hour * 3600)
                stop.set()
                await running

    run(main())
    assert said.lines == []


def test_time_in_which_we_did_not_run_is_not_counted(said: Said) -> None:
    """The process was stopped for a day: nobody is told that a home stood still meanwhile."""
    async def main() -> None:
        go, standing = threading.Event(), threading.Event()

        def stand() -> None:
            standing.set()
            go.wait(LIMIT_S)

        with IOThread("io-a") as a:
            async with looked_at(Device(Memory(SIZE)), a.context) as (watchdog, _):
                a.context.post(stand)
                await to_worker(standing.wait)
                now = time.monotonic()
                watchdog.look(now)
                watchdog.look(now + 1)                      # posts its probe
                watchdog.look(now + 86400, 86399)
                assert said.lines == []
                watchdog.look(now + 86400 + 3600)
                assert len(said.lines) == 1
                watchdog.look(now + 86400 + 7200)           # said once
                assert len(said.lines) == 1
                go.set()

    run(main())


def test_off(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(AioContext.of(), limits=ServerLimits(blocked_s=None))
        before = threading.active_count()
        await server.add_export("disk", Device(Memory(SIZE)))
        assert threading.active_count() == before
        await server.remove_export("disk")
        await server.close()

    run(main())


def test_no_thread_to_be_had(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is served all the same; the next one tries again."""
    async def main() -> None:
        server = Server(AioContext.of(), name="test")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            await server.add_export("a", Device(Memory(SIZE)))
        assert said.lines == ["test: nobody looks whether a device blocks: can't start new thread"]
        await server.add_export("b", Device(Memory(SIZE)))
        assert "test watchdog" in {thread.name for thread in threading.enumerate()}
        await server.close()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    run(main())


def test_the_thread_is_there_while_an_export_is() -> None:
    def watchers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.endswith("watchdog")]

    async def main() -> None:
        server = Server(AioContext.of())
        assert watchers() == []
        for _ in range(3):
            await server.add_export("a", Device(Memory(SIZE)))
            await server.add_export("b", Device(Memory(SIZE)))
            assert watchers() == ["nbd watchdog"]
            await server.remove_export("a")
            await server.remove_export("b")
            await until(lambda: not watchers())
        await server.add_export("a", Device(Memory(SIZE)))
        await server.close()
        await until(lambda: not watchers())

    run(main())
