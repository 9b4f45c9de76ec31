"""Replies made of the memory's own pages: what is sent is what was there when the read was answered."""

from __future__ import annotations

import asyncio
import random

import pytest

from homeloop.block.memory import PAGE, Memory
from homeloop.nbd.handshake import Agreed
from tests.nbd import wire
from tests.nbd.talking import data_chunk, talk, until

SIZE = 4 << 20
LENGTH = 1 << 20


def filled(seed: int) -> tuple[Memory, bytes]:
    data = random.Random(seed).randbytes(SIZE)
    memory = Memory(SIZE)
    memory.write(0, data)
    return memory, data


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 3])
def test_a_write_does_not_reach_replies_that_are_on_their_way(seed: int, length: int) -> None:
    """The client takes nothing: most of a reply is still ours to send when what it was read from changes."""
    async def main() -> None:
        memory, data = filled(seed)
        async with talk(memory) as t:
            await t.client.send(wire.request(wire.READ, 1, 1, length))
            await until(lambda: t.connection.statistics().requests == 1)
            assert t.connection.statistics().unsent_bytes > length // 2         # a short send
            for page in range(0, SIZE, PAGE):
                await t.client.send(wire.request(wire.WRITE, 2, page + 5, 4096) + b"!" * 4096)
            await t.client.send(wire.request(wire.TRIM, 3, 0, LENGTH))
            await until(lambda: t.connection.statistics().requests == 2 + SIZE // PAGE)
            assert (await t.client.reply(length)).data == data[1 : 1 + length]
            assert len(await t.client.replies(1 + SIZE // PAGE)) == 1 + SIZE // PAGE
            await t.client.send(wire.request(wire.READ, 4, LENGTH, LENGTH))
            after = bytearray(data)
            for page in range(0, SIZE, PAGE):
                after[page + 5 : page + 5 + 4096] = b"!" * 4096
            assert (await t.client.reply(LENGTH)).data == after[LENGTH : 2 * LENGTH]

    asyncio.run(main())


def test_structured_replies(seed: int) -> None:
    async def main() -> None:
        memory, data = filled(seed)
        memory.trim(PAGE, PAGE)         # a hole inside: zeroes like any other bytes
        async with talk(memory, agreed=Agreed(structured=True)) as t:
            await t.client.send(wire.request(wire.READ, 1, 7, LENGTH))
            chunk = await t.client.chunk()
            expected = bytearray(data[7 : 7 + LENGTH])
            expected[PAGE - 7 : 2 * PAGE - 7] = bytes(PAGE)
            assert chunk == data_chunk(1, 7, bytes(expected))

    asyncio.run(main())
