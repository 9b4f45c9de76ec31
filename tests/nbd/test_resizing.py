"""A device that changes its size, or loses what was not flushed, under several connections of one export."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.faults import Faults
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.nbd.client import connect
from homeloop.nbd.protocol import TransmissionFlag, wire_errno
from homeloop.nbd.server import Server
from tests.nbd import wire
from tests.nbd.talking import soon
from tests.nbd.test_server import entered

SIZE = 1 << 20


@pytest.mark.parametrize("model", ["inline", "serialised"])
def test_resize_while_clients_are_connected(model: str, tmp_path: Path) -> None:
    """New clients and statistics see the new size at once; who is there gets an error behind the new end."""
    class Disk(Memory):
        thread_model = model    # type: ignore[assignment]

    async def main() -> None:
        with IOThread("io") as io:
            device = Device(Disk(SIZE))
            server = Server(AioContext.of())
            await server.add_export("disk", device, io.context)
            await server.listen(tmp_path / "s")
            present = await entered(server, "disk")
            for size in (2 * SIZE, SIZE // 2, SIZE):
                await io.context.run(device.resize(size))
                assert server.statistics().exports[0].size == size
                async with connect(server.uri("disk")) as new:
                    assert new.info.size == size
                    await new.write(size - 512, b"x" * 512)
                await present.send(wire.request(wire.READ, 1, size - 512, 512))
                reply = await present.reply(512)
                assert (reply.error, reply.data) == (0, b"x" * 512)
                await present.send(wire.request(wire.READ, 2, size - 511, 512) + wire.write(3, size, bytes(512)))
                # On workers a refusal may overtake nothing: both are answered at once, in order.
                assert [(reply.cookie, reply.error) for reply in await present.replies(2)] == [
                    (2, wire_errno(errno.EINVAL)), (3, wire_errno(errno.ENOSPC)),
                ]
            present.close()
            await server.close()

    run(main())


def test_x7_a_flush_on_one_connection_covers_what_the_other_was_answered(tmp_path: Path, seed: int) -> None:
    """multi-conn is a promise: the driver's cache loses, in a crash, whatever was not flushed."""
    chance = random.Random(seed)

    async def main() -> None:
        faults = Faults(seed=seed, volatile=True)
        memory: Any = Memory(SIZE)
        with IOThread("io") as io:
            server = Server(AioContext.of())
            device = Device(faults.over(memory))
            assert device.can_multi_conn
            await server.add_export("disk", device, io.context)
            await server.listen(tmp_path / "s")
            expected = bytearray(SIZE)
            lost = 0
            async with connect(server.uri("disk")) as one, connect(server.uri("disk")) as other:
                assert one.info.flags & TransmissionFlag.CAN_MULTI_CONN
                for turn in range(20):
                    for _ in range(chance.randrange(1, 8)):
                        at, data = chance.randrange(SIZE // 512) * 512, chance.randbytes(512)
                        await soon(chance.choice((one, other)).write(at, data))
                        expected[at : at + 512] = data
                    await soon(chance.choice((one, other)).flush())
                    at = turn * 512
                    await soon(one.write(at, b"\xff" * 512))        # answered, and not flushed by anybody
                    faults.crash()
                    faults.recover()
                    assert bytes(await soon(other.read(0, SIZE))) == expected
                    lost += bytes(await soon(one.read(at, 512))) != b"\xff" * 512
            assert lost == 20                                       # the driver does lose
            await server.close()

    run(main())
