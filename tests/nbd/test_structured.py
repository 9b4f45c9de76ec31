"""A connection that agreed on structured replies: what it answers. Ids as in the checklist."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from typing import Any

import pytest

from homeloop.block.memory import Memory
from homeloop.errors import BlockError
from homeloop.nbd.handshake import Agreed
from tests.nbd import wire
from tests.nbd.talking import Chunk, Gated, Reply, data_chunk, error_chunk, talk, until

SIZE = 1 << 20
AGREED = Agreed(structured=True)
SELECTED = Agreed(structured=True, allocation_id=7)
NONE, HOLE, BLOCK_STATUS = 0, 2, 5
EIO, EINVAL, ENOSPC = 5, 22, 28


def read(cookie: int, offset: int = 0, length: int = 512, flags: int = 0) -> bytes:
    return wire.request(wire.READ, cookie, offset, length, flags)


def status(cookie: int, offset: int = 0, length: int = 512, flags: int = 0) -> bytes:
    return wire.request(wire.BLOCK_STATUS, cookie, offset, length, flags)


def extents(cookie: int, *told: int) -> Chunk:
    """(length, flags) of each, flat."""
    return Chunk(cookie, BLOCK_STATUS, struct.pack(f">{1 + len(told)}I", 7, *told))


def hole(cookie: int, offset: int, length: int) -> Chunk:
    return Chunk(cookie, HOLE, struct.pack(">QI", offset, length))


class Later(Memory):
    """Memory that lets others run before it answers."""

    async def read(self, offset: int, length: int) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().read(offset, length)


class Failing:
    """Reads fail in ways that have a text."""

    size = SIZE
    thread_model = "inline"

    def read(self, offset: int, length: int) -> bytes:
        raise [OSError(errno.ENOSPC, "no room"), ValueError("a\0b"), BlockError(errno.EIO, "x" * 9000)][offset]


class FailingLater(Failing):
    """The same, after others ran."""

    async def read(self, offset: int, length: int) -> bytes:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().read(offset, length)


both = pytest.mark.parametrize("make", [Memory, Later])


@both
def test_sr2_r4_reads_are_answered_by_one_chunk_with_done(make: Any) -> None:
    async def main() -> None:
        driver = make(SIZE)
        driver.write(0, b"abc" * 100_000)
        async with talk(driver, agreed=AGREED) as t:
            for length in (1, 4096, 200_000):
                await t.client.send(read(7, 3, length))
                assert await t.client.chunk() == data_chunk(7, 3, (b"abc" * 100_000)[:length])

    asyncio.run(main())


@both
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (70_000, 4096), (100, 300_000), (0, SIZE)])
def test_r6_what_the_driver_knows_to_be_zero_is_a_hole(make: Any, offset: int, length: int) -> None:
    async def main() -> None:
        async with talk(make(SIZE), agreed=AGREED) as t:
            await t.client.send(read(1, offset, length))
            assert await t.client.chunk() == hole(1, offset, length)

    asyncio.run(main())


@both
@pytest.mark.parametrize("length", [1, 65536, SIZE])
def test_r9_df_gets_zeroes_as_data(make: Any, length: int) -> None:
    async def main() -> None:
        async with talk(make(SIZE), agreed=AGREED) as t:
            await t.client.send(read(1, 0, length, wire.DF) + read(2, 0, length, wire.DF | wire.FUA))
            assert await t.client.chunks(2) == [data_chunk(1, 0, bytes(length)), data_chunk(2, 0, bytes(length))]

    asyncio.run(main())


@both
def test_x14_r6_an_empty_read_has_no_content(make: Any) -> None:
    async def main() -> None:
        async with talk(make(SIZE), agreed=AGREED) as t:
            await t.client.send(read(1, 0, 0) + read(2, SIZE, 0, wire.DF))
            assert await t.client.chunks(2) == [Chunk(1, NONE), Chunk(2, NONE)]

    asyncio.run(main())


@pytest.mark.parametrize("make", [Failing, FailingLater])
def test_r3_r8_errors_carry_the_exceptions_text(make: Any) -> None:
    async def main() -> None:
        async with talk(make(), agreed=AGREED) as t:
            name = make.__name__
            await t.client.send(read(1, 0) + read(2, 1) + read(3, 2))
            found = sorted(await t.client.chunks(3), key=lambda chunk: chunk.cookie)
            assert found == [
                error_chunk(1, ENOSPC, f"{name}.read: OSError: [Errno 28] no room"),
                error_chunk(2, EIO, f"{name}.read: ValueError: ab"),
                error_chunk(3, EIO, "x" * 256),
            ]
            assert t.connection.statistics().errors == 3

    asyncio.run(main())


@pytest.mark.parametrize(("request_", "error"), [
    (read(1, SIZE, 1), EINVAL),
    (read(1, 0, (1 << 25) + 1), EINVAL),
    (read(1, flags=wire.REQ_ONE), EINVAL),
    (wire.write(1, SIZE, b"x"), ENOSPC),
    (wire.write(1, 0, b"x", wire.DF), EINVAL),
    (wire.request(4711, 1), EINVAL),
    (status(1), EINVAL),
])
def test_r3_whatever_is_wrong_is_answered_by_an_error_chunk(request_: bytes, error: int) -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=AGREED) as t:
            await t.client.send(request_ + read(2))
            chunk = await t.client.chunk()
            number, text_bytes = struct.unpack_from(">IH", chunk.payload)
            assert (chunk.cookie, chunk.kind, chunk.flags, number) == (1, 32769, 1, error)
            assert len(chunk.payload) == 6 + text_bytes > 6
            assert (await t.client.chunk()).cookie == 2

    asyncio.run(main())


def test_r3_success_without_data_is_simple() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=AGREED) as t:
            await t.client.send(wire.write(1, 0, b"x") + wire.request(wire.FLUSH, 2) + read(3, 0, 2))
            assert await t.client.replies(2) == [Reply(1, 0), Reply(2, 0)]
            assert await t.client.chunk() == data_chunk(3, 0, b"x\0")

    asyncio.run(main())


def test_x6_df_without_structured_replies() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            await t.client.send(read(1, flags=wire.DF) + read(2))
            assert await t.client.reply() == Reply(1, EINVAL)
            assert await t.client.reply(512) == Reply(2, 0, bytes(512))

    asyncio.run(main())


def test_a_request_that_ends_after_its_client_is_dropped() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver, agreed=AGREED) as t:
            await t.client.send(read(1, 0) + read(2, 512))
            await until(lambda: len(driver.waiting) == 2)
            t.connection.abort()
            driver.fail(0, OSError(errno.EIO, "late"))
            driver.release(512)
            assert await t.end() is None
            assert t.connection.statistics().errors == 1

    asyncio.run(main())


def test_inline_replies_of_a_batch_are_one_send() -> None:
    async def main() -> None:
        driver = Memory(SIZE)
        driver.write(0, b"x" * 65536)
        async with talk(driver, agreed=AGREED) as t:
            await t.client.send(b"".join(read(i, i * 8192) for i in range(16)))
            assert [chunk.cookie for chunk in await t.client.chunks(16)] == list(range(16))
            assert t.sock.sends == 1
            assert t.connection.statistics().unsent_bytes == 0

    asyncio.run(main())


def test_random_requests_against_a_model(seed: int) -> None:
    """What is read through data and hole chunks is what was written, zeroed or trimmed."""
    dice = random.Random(seed)

    async def main() -> None:
        model = bytearray(SIZE)
        async with talk(Memory(SIZE), agreed=AGREED) as t:
            for cookie in range(300):
                length = dice.choice([1, 512, 4096, 65536, 65537, 250_000])
                offset = dice.randrange(SIZE - length + 1) & dice.choice([-1, ~0xFFFF])
                if dice.random() < 0.3:
                    data = dice.randbytes(length)
                    model[offset:offset + length] = data
                    await t.client.send(wire.write(cookie, offset, data))
                    assert await t.client.reply() == Reply(cookie, 0)
                elif dice.random() < 0.4:
                    model[offset:offset + length] = bytes(length)
                    await t.client.send(wire.request(wire.WRITE_ZEROES, cookie, offset, length))
                    assert await t.client.reply() == Reply(cookie, 0)
                else:
                    await t.client.send(read(cookie, offset, length))
                    chunk = await t.client.chunk()
                    if chunk.kind == HOLE:
                        assert chunk == hole(cookie, offset, length)
                        assert not any(model[offset:offset + length])
                    else:
                        assert chunk == data_chunk(cookie, offset, bytes(model[offset:offset + length]))

    asyncio.run(main())


# BLOCK_STATUS


class MappedLater(Memory):
    """Memory that others may run before it says where it is."""

    async def extents(self, offset: int, length: int) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().extents(offset, length)


mapped = pytest.mark.parametrize("make", [Memory, MappedLater])


@mapped
def test_bs2_bs3_r14_extents(make: Any) -> None:
    """Holes are told with both bits, data with none; REQ_ONE gets one, no longer than asked."""
    async def main() -> None:
        driver = make(SIZE)
        driver.write(131072, b"x" * 65536)
        async with talk(driver, agreed=SELECTED) as t:
            await t.client.send(status(1, 0, SIZE))
            assert await t.client.chunk() == extents(1, 131072, 3, 65536, 0, SIZE - 196608, 3)
            await t.client.send(status(2, 0, SIZE, wire.REQ_ONE))
            assert await t.client.chunk() == extents(2, 131072, 3)
            await t.client.send(status(3, 130560, 512, wire.REQ_ONE | wire.FUA))
            assert await t.client.chunk() == extents(3, 512, 3)
            await t.client.send(status(4, 130560, 1024))
            assert await t.client.chunk() == extents(4, 512, 3, 512, 0)

    asyncio.run(main())


def test_bs5_a_driver_that_cannot_tell() -> None:
    async def main() -> None:
        async with talk(Failing(), agreed=SELECTED) as t:
            await t.client.send(status(1, 5, SIZE - 5))
            assert await t.client.chunk() == extents(1, SIZE - 5, 0)

    asyncio.run(main())


@pytest.mark.parametrize("request_", [
    status(1, 0, 0), status(1, 0, SIZE + 1), status(1, SIZE, 1), status(1, 2**64 - 1, 1), status(1, flags=wire.DF),
])
def test_e1_x14_bs1_block_status_refused(request_: bytes) -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=SELECTED) as t:
            await t.client.send(request_ + status(2))
            chunk = await t.client.chunk()
            assert (chunk.kind, struct.unpack_from(">I", chunk.payload)) == (32769, (EINVAL,))
            assert await t.client.chunk() == extents(2, 512, 3)

    asyncio.run(main())


def test_r8_a_driver_whose_extents_fail() -> None:
    class Lost(Failing):
        def extents(self, offset: int, length: int) -> Any:
            return 7

    text = "Lost.extents returned int, not an iterable of extents"

    async def main() -> None:
        async with talk(Lost(), agreed=SELECTED) as t:
            await t.client.send(status(1))
            assert await t.client.chunk() == error_chunk(1, EIO, text)

    asyncio.run(main())


def test_bs4_r10_an_answer_has_a_limit() -> None:
    """Of a map with a hole in every second page the first extents are told; no chunk is above the payload limit."""
    async def main() -> None:
        size = 4096 << 16
        driver = Memory(size)
        for page in range(0, 4096, 2):
            driver.write(page << 16, b"x")
        for limit, told in ((1 << 25, 1024), (4096, 512)):
            async with talk(driver, agreed=SELECTED, payload_bytes_max=limit) as t:
                await t.client.send(status(1, 0, size))
                assert await t.client.chunk() == extents(1, *[65536, 0, 65536, 3] * (told // 2))

    asyncio.run(main())


def test_wz2_enotsup_has_a_text() -> None:
    class Slow(Memory):
        def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
            raise OSError(errno.ENOTSUP, "slow")

    async def main() -> None:
        async with talk(Slow(SIZE), agreed=AGREED) as t:
            await t.client.send(wire.request(wire.WRITE_ZEROES, 1, 0, 512, wire.FAST_ZERO))
            assert await t.client.chunk() == error_chunk(1, 95, "Slow.write_zeroes: OSError: [Errno 95] slow")

    asyncio.run(main())


@pytest.mark.parametrize("agreed", [AGREED, SELECTED], ids=["structured", "allocation"])
def test_x1_x9_f5_any_request_gets_one_reply(agreed: Agreed, seed: int) -> None:
    """Whatever the command, flags and range: one answer, with its cookie, and the connection goes on."""
    dice = random.Random(seed)
    commands = [wire.READ, wire.FLUSH, wire.TRIM, wire.CACHE, wire.WRITE_ZEROES, wire.BLOCK_STATUS, 8, 65535]
    numbers = [0, 1, 511, 512, 65536, SIZE - 1, SIZE, SIZE + 1, 1 << 25, (1 << 32) - 1]

    async def main() -> None:
        async with talk(Memory(SIZE), agreed=agreed) as t:
            for cookie in range(600):
                command = dice.choice(commands)
                flags = dice.choice([0, 0, dice.randrange(64), dice.randrange(65536)])
                length = dice.choice(numbers)
                await t.client.send(wire.request(command, cookie, dice.choice([*numbers, 2**64 - 1]), length, flags))
                magic = await t.client.receive(4)
                if magic == b"\x67\x44\x66\x98":
                    error, found = struct.unpack(">IQ", await t.client.receive(12))
                    assert (error, found) == (0, cookie)
                    assert command not in (wire.READ, wire.BLOCK_STATUS)
                else:
                    done, kind, found, payload_bytes = struct.unpack(">HHQI", await t.client.receive(16))
                    assert (magic, done, found) == (b"\x66\x8e\x33\xef", 1, cookie)
                    payload = await t.client.receive(payload_bytes)
                    assert kind == 32769 or command in (wire.READ, wire.BLOCK_STATUS)
                    if kind == BLOCK_STATUS:
                        told = struct.unpack_from(f">{(payload_bytes - 4) // 4}I", payload, 4)[::2]
                        assert told
                        assert all(told)
                        assert sum(told) <= length

    asyncio.run(main())
