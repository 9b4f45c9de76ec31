"""The client that reconnects against a server that is killed, stopped, slow and back, with requests in flight."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from homeloop.core.runtime import run
from homeloop.nbd.connector import Pacing
from homeloop.nbd.reconnecting import ReconnectingClient
from tests.nbd.talking import soon, turns, until

SIZE = 1 << 20
HOUR_S = 3600.0
SOON = Pacing(pause=lambda stop, _seconds: stop.wait(0.01))

pytestmark = pytest.mark.foreign("nbdkit")


class Nbdkit:
    """A server of one file, as a process."""

    def __init__(self, folder: Path, *filters: str) -> None:
        self.image = folder / "image"
        self.image.write_bytes(bytes(SIZE))
        self.path = folder / "s"
        self.uri = f"nbd+unix:///?socket={self.path}"
        self._filters = filters
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        nbdkit = shutil.which("nbdkit")
        assert nbdkit is not None
        filters, options = [part for part in self._filters if part[0] == "-"], [f for f in self._filters if f[0] != "-"]
        command = [nbdkit, "-f", "-U", str(self.path), *filters, "file", str(self.image), *options]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def tell(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """All its threads stand still when this returns."""
        assert self._process is not None
        self.tell(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def kill(self) -> None:
        """At once, as it stands; also one that is stopped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
        self.path.unlink(missing_ok=True)



@pytest.fixture
def nbdkit(tmp_path: Path) -> Iterator[Nbdkit]:
    server = Nbdkit(tmp_path)
    server.start()
    yield server
    server.kill()


def client_of(server: Nbdkit) -> ReconnectingClient:
    return ReconnectingClient(
        server.uri, reconnect_delay=HOUR_S, open_timeout=20, server_keeps_writes=True, pacing=SOON
    )


def test_killed_with_requests_in_flight(nbdkit: Nbdkit) -> None:
    """It is stopped, so that nothing of them is answered, then killed; its successor answers all."""
    async def main() -> None:
        async with client_of(nbdkit) as client:
            await client.write(0, b"before")
            nbdkit.stop()
            requests: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(client.write(n * 4096, bytes([n]) * 4096)) for n in range(1, 100)
            ]
            requests.append(asyncio.ensure_future(client.read(0, 6)))
            requests.append(asyncio.ensure_future(client.flush()))
            await turns()
            nbdkit.kill()
            await until(lambda: not client.connected)
            assert not any(request.done() for request in requests)
            nbdkit.start()
            results = await asyncio.wait_for(asyncio.gather(*requests), 30)
            assert results[-2] == b"before"
            assert client.connections == 2

    run(main())
    data = nbdkit.image.read_bytes()
    assert all(data[n * 4096:(n + 1) * 4096] == bytes([n]) * 4096 for n in range(1, 100))


def test_stopped_and_back(nbdkit: Nbdkit) -> None:
    """It is slow, no more: requests wait for it on the same connection."""
    async def main() -> None:
        async with client_of(nbdkit) as client:
            nbdkit.stop()
            requests = [asyncio.ensure_future(client.read(n * 4096, 4096)) for n in range(20)]
            await turns(200)
            assert not any(request.done() for request in requests)
            nbdkit.tell(signal.SIGCONT)
            assert await soon(asyncio.gather(*requests)) == [bytes(4096)] * 20
            assert client.connections == 1

    run(main())


def test_stopped_for_too_long(nbdkit: Nbdkit) -> None:
    """It says nothing to a request: lost. It accepts and says nothing: attempts end, each at its limit."""
    due: list[Callable[[], object]] = []

    def call_later(loop: asyncio.AbstractEventLoop, _seconds: float, fn: Callable[[], object]) -> asyncio.TimerHandle:
        due.append(fn)
        return loop.call_later(HOUR_S, fn)

    async def main() -> None:
        pacing = Pacing(pause=SOON.pause, call_later=call_later)
        client = ReconnectingClient(
            nbdkit.uri, reconnect_delay=HOUR_S, open_timeout=20, attempt_timeout=0.5, reply_timeout=5, pacing=pacing)
        async with client:
            nbdkit.stop()
            reading = asyncio.ensure_future(client.read(0, 512))
            await turns()
            for _ in range(2):                          # perhaps it was asked just now; then it is silent
                assert client.connected
                due.pop()()
            assert not client.connected
            await until(lambda: isinstance(client._connector.failure, TimeoutError))
            assert not reading.done()
            nbdkit.tell(signal.SIGCONT)
            assert await soon(reading) == bytes(512)
            assert client.connections >= 2

    run(main())


def test_a_slow_server(tmp_path: Path) -> None:
    """Every read takes 20 ms there: a hundred wait at once."""
    server = Nbdkit(tmp_path, "--filter=delay", "rdelay=20ms")
    server.start()

    async def main() -> None:
        async with client_of(server) as client:
            reads = [client.read(n * 512, 512) for n in range(100)]
            assert await asyncio.wait_for(asyncio.gather(*reads), 30) == [bytes(512)] * 100

    try:
        run(main())
    finally:
        server.kill()


def test_killed_again_and_again(nbdkit: Nbdkit, seed: int) -> None:
    """Each task has a range of its own and finds what it wrote there, whatever happens to the server."""
    models = [bytearray(64 << 10) for _ in range(8)]

    async def main() -> None:
        async with client_of(nbdkit) as client:
            over = False
            done = [0] * len(models)

            async def work(number: int) -> None:
                dice, model, start = random.Random(seed + number), models[number], number << 16
                while not over:
                    length = dice.choice([1, 512, 4096, 40_000])
                    offset = dice.randrange(len(model) - length + 1)
                    if dice.random() < 0.5:
                        model[offset:offset + length] = data = dice.randbytes(length)
                        await client.write(start + offset, data)
                    elif dice.random() < 0.1:
                        await client.flush()
                    else:
                        assert await client.read(start + offset, length) == model[offset:offset + length]
                    done[number] += 1

            async def kill() -> None:
                nonlocal over
                dice = random.Random(seed)
                try:
                    for _ in range(6):
                        before = client.connections, list(done)
                        if dice.random() < 0.5:
                            nbdkit.stop()
                        await turns(dice.randrange(200))
                        nbdkit.kill()
                        nbdkit.start()
                        # Each of them goes on: a request that five connections did not survive would fail.
                        await until(lambda before=before: client.connections > before[0] and all(
                            now > then for now, then in zip(done, before[1], strict=True)))
                finally:
                    over = True

            async with asyncio.timeout(40), asyncio.TaskGroup() as group:
                for number in range(len(models)):
                    group.create_task(work(number))
                group.create_task(kill())
            assert client.connections >= 7

    run(main())
    assert nbdkit.image.read_bytes()[:8 << 16] == b"".join(models)
