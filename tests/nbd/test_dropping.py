"""A driver that cuts the connection of a request: what came before is answered, nobody else is hurt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.faults import Faults
from homeloop.block.memory import Memory
from homeloop.errors import ConnectionDropped
from tests.nbd import wire
from tests.nbd.talking import Reply, soon, talk, turns

SIZE = 1 << 20


def read(cookie: int, offset: int) -> bytes:
    return wire.request(wire.READ, cookie, offset, 512)


@pytest.mark.parametrize("kind", ["read", "write", "flush"])
@pytest.mark.parametrize("waits", [False, True])
def test_cut_after_the_replies_to_what_came_before(kind: str, waits: bool) -> None:
    async def main() -> None:
        faults = Faults()
        device = Device(faults.over(Memory(SIZE)))
        at = (4096, 8192) if kind == "read" else None
        if waits:
            faults.on(kind, at=at).delay(0)
        faults.on(kind, at=at).drop()
        dropped = {
            "read": read(3, 4096), "flush": wire.request(wire.FLUSH, 3),
            "write": wire.request(wire.WRITE, 3, 0, 4) + b"data",
        }
        async with talk(None, device=device) as other, talk(None, device=device) as it:
            await it.client.send(read(1, 0) + read(2, 512) + dropped[kind] + b"".join(read(n, 0) for n in range(4, 40)))
            assert await it.client.replies(2, 512) == [Reply(1, 0, bytes(512)), Reply(2, 0, bytes(512))]
            rest = await it.client.ended()
            if not waits:
                assert rest == b""                      # nothing behind it
            assert b"\0\0\0\0\0\0\0\x03" not in [rest[n + 8 : n + 16] for n in range(0, len(rest), 528)]
            assert await it.end() is None
            await other.client.send(read(9, 0))
            assert await other.client.reply(512) == Reply(9, 0, bytes(512))
        assert device.in_flight == 0

    asyncio.run(main())


def test_what_else_is_in_flight_runs_to_its_end() -> None:
    async def main() -> None:
        faults = Faults()
        memory = Memory(SIZE)
        device = Device(faults.over(memory))
        stall = faults.on("write", nth=1).stall()
        faults.on("read").drop()
        async with talk(None, device=device) as it:
            await it.client.send(wire.request(wire.WRITE, 1, 0, 4) + b"data" + read(2, 0))
            assert await it.client.ended() == b""
            assert not it.closed.done()
            stall.release()
            assert await it.end() is None
            assert memory.read(0, 4) == b"data"

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["read", "flush"])
def test_nothing_behind_it_is_asked_of_the_device(kind: str) -> None:
    async def main() -> None:
        faults = Faults()
        memory = Memory(SIZE)
        device = Device(faults.over(memory))
        faults.on(kind).drop()
        dropped = read(1, 0) if kind == "read" else wire.request(wire.FLUSH, 1)
        async with talk(None, device=device) as it:
            await it.client.send(dropped + wire.request(wire.WRITE, 2, 0, 4) + b"data" + read(3, 0))
            assert await it.client.ended() == b""
            assert await it.end() is None
        assert (faults.count("write"), faults.count()) == (0, 1)
        assert memory.read(0, 4) == bytes(4)

    asyncio.run(main())


def test_a_program_gets_an_error() -> None:
    async def main() -> None:
        class Cuts(Memory):
            async def read(self, offset: int, length: int) -> Any:          # type: ignore[override]
                raise ConnectionDropped("enough")

        answer: Any = Device(Cuts(SIZE)).read(0, 1)
        with pytest.raises(ConnectionDropped, match="ECONNRESET: enough"):
            await soon(answer)
        await turns()

    asyncio.run(main())
