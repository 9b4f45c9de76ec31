"""Clients of which nothing comes: who is cut off, and who must not be. At times that the tests make up."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.nbd.client import connect
from homeloop.nbd.limits import ConnectionLimits
from homeloop.nbd.server import Server, ServerLimits
from tests.nbd import wire
from tests.nbd.talking import Gated, RawClient, soon, turns, until
from tests.nbd.test_server import entered, logged, serving

SIZE = 1 << 20
HOUR = 3600.0


def look(server: Server, *hours: float) -> None:
    now = time.monotonic()
    for hour in hours:
        server._patience.look(now + hour * HOUR)


async def gone(server: Server) -> None:
    await until(lambda: server.statistics().connections == 0)


def test_a_client_that_takes_no_replies_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It holds no more than its limit, the others are served, and in the end it goes."""
    async def main() -> None:
        limit = 4 << 20
        limits = ConnectionLimits(unsent_bytes_max=limit)
        async with serving(tmp_path, Memory(SIZE), stalled_s=HOUR, connection=limits) as server:
            client = await entered(server, "disk0")
            reads = b"".join(wire.request(wire.READ, i, 0, 1 << 18) for i in range(100))
            await client.send(reads)

            def unsent() -> int:
                return server.statistics().exports[0].connections[0].unsent_bytes

            await until(lambda: unsent() >= limit)
            await turns()
            assert unsent() <= limit + (1 << 18) + (1 << 16)
            assert server._budget.held_bytes > 0
            look(server, 0, 0.9)
            await turns()
            async with connect(server.uri("disk0")) as other:
                assert await other.read(0, 512) == bytes(512)
            await until(lambda: server.statistics().connections == 1)
            look(server, 1.1)
            await gone(server)
            assert server.statistics().failed == 1
            assert server._budget.held_bytes == 0
            client.close()

    run(main())
    (line,) = logged(caplog)
    assert "taken none of its replies for 3600 s" in line


def test_a_client_that_stops_in_the_middle_of_a_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE), stalled_s=HOUR) as server:
            client = await entered(server, "disk0")
            await client.send(wire.request(wire.WRITE, 1, 0, 1 << 17) + bytes((1 << 17) - 1))

            def received() -> int:
                return server.statistics().exports[0].connections[0].received_bytes

            await until(lambda: received() == 28 + (1 << 17) - 1)
            look(server, 0, 0.9)
            await turns()
            assert server.statistics().connections == 1
            look(server, 1.1)
            await gone(server)
            client.close()

    run(main())
    assert "in the middle of a request" in logged(caplog)[0]


def test_idle_clients_stay_unless_asked_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server, connect(server.uri("disk0")) as client:
            await client.flush()
            look(server, 0, 1, 24, 48)
            await turns()
            await client.flush()

    run(main())
    assert logged(caplog) == []


def test_idle_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No request for so long; who waits for an answer is not idle, nor who asked in between."""
    async def main() -> None:
        driver = Gated(SIZE)
        async with serving(tmp_path, driver, idle_s=HOUR) as server:
            idle, waiting, busy = [await entered(server, "disk0") for _ in range(3)]
            await waiting.send(wire.request(wire.READ, 1, 0, 512))
            await until(lambda: driver.waiting)
            look(server, 0)
            await busy.send(wire.request(wire.FLUSH, 2))
            await busy.reply()
            look(server, 0.9, 1.1)
            assert await idle.ended() == b""
            await until(lambda: server.statistics().connections == 2)
            driver.release()
            assert (await waiting.reply(512)).cookie == 1
            look(server, 1.5, 1.8)                  # the flush was before 0.9, the answer before 1.5
            await turns()
            assert server.statistics().connections == 2
            look(server, 2.6)
            assert await waiting.ended() == b""
            assert await busy.ended() == b""

    run(main())
    assert all("no request for 3600 s" in line for line in logged(caplog))
    assert len(logged(caplog)) == 3


def test_a_request_that_comes_between_the_look_and_the_end(tmp_path: Path) -> None:
    """The home looks again: who has just asked stays."""
    async def main() -> None:
        with IOThread("io") as io:
            server = Server(AioContext.of(), limits=ServerLimits(idle_s=HOUR))
            await server.add_export("disk0", Device(Memory(SIZE)), io.context)
            await server.listen(tmp_path / "s")
            async with connect(server.uri("disk0")) as client:
                await client.flush()
                (connection,) = server.statistics().exports[0].connections
                (ours,) = server._patience._connections
                await client.flush()
                await AioContext.of(io.context.loop).run(_call(ours.expel, "no request", connection))
                await client.flush()
            await server.close()

    run(main())


async def _call(fn: Any, *args: Any) -> None:
    fn(*args)


def test_the_timer_is_there_while_a_client_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE)) as server:
            assert server._patience._timer is None
            async with connect(server.uri("disk0")):
                await until(lambda: server._patience._timer is not None)
            await gone(server)
            assert server._patience._timer is None

    run(main())


def test_it_looks_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        async with serving(tmp_path, Memory(SIZE), idle_s=0.05) as server:
            client = await entered(server, "disk0")
            assert await client.ended() == b""
            await gone(server)

    run(main())
    assert len(logged(caplog)) == 1


def test_all_clients_together(tmp_path: Path) -> None:
    """Three ask for more than the server has for all: it keeps to that, each gets its share, and nobody starves."""
    async def main() -> None:
        driver, total, length, count = Gated(128 << 20), 16 << 20, 1 << 20, 40
        async with serving(tmp_path, driver, in_flight_bytes_max=total) as server:
            clients: list[RawClient] = [await entered(server, "disk0") for _ in range(3)]
            for number, client in enumerate(clients):
                at = [(number * count + i) * length for i in range(count)]
                await client.send(b"".join(wire.request(wire.READ, i, at[i], length) for i in range(count)))

            def held() -> list[int]:        # in requests
                connections = server.statistics().exports[0].connections
                return [one.in_flight + one.unsent_bytes // length for one in connections]

            await until(lambda: sum(held()) >= 16)
            await turns(50)
            answered = [asyncio.ensure_future(client.replies(count, length)) for client in clients]
            most = least = 0
            while not all(future.done() for future in answered):
                most, least = max(most, sum(held())), max(least, min(held()))
                for number in range(3):             # the oldest of each
                    mine = [at for at in driver.waiting if at // length // count == number]
                    if mine and not driver.waiting[mine[0]].done():
                        driver.release(mine[0])
                await turns(5)
            for future in answered:
                assert {reply.cookie for reply in await soon(future)} == set(range(count))
            assert 16 <= most <= 16 + 3 + 3     # each may pass its limit by one, and has one that is free
            assert least >= 4               # the share is five
            await until(lambda: server._budget.held_bytes == 0)
            for client in clients:
                client.close()

    run(main())
