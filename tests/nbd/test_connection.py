"""One connection in transmission: what it answers, in which order, and how it ends. Ids as in the checklist."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.errors import BlockError, ContextClosed, PeerError
from tests.nbd import wire
from tests.nbd.talking import Gated, Reply, talk, turns, until

SIZE = 1 << 20
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95


def read(cookie: int, offset: int = 0, length: int = 512, flags: int = 0) -> bytes:
    return wire.request(wire.READ, cookie, offset, length, flags)


class NoFlush:
    """A driver without flush: no FLUSH, no FUA."""

    size = SIZE
    thread_model = "inline"

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write(self, offset: int, data: Any) -> None:
        pass


class Strict(NoFlush):
    """A driver with blocks."""

    block_size_min = 512


class Slow(NoFlush):
    """A driver that is not supported by what it stands on."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        raise OSError(errno.EOPNOTSUPP, "only by writing")


class Broken(NoFlush):
    """A driver that fails."""

    def read(self, offset: int, length: int) -> bytes:
        raise OSError(errno.ENODEV, "gone")


def test_x1_cookies_are_opaque() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            for cookie in (0, 1, 2**64 - 1, 0, 0):
                await t.client.send(read(cookie))
                assert await t.client.reply(512) == Reply(cookie, 0, bytes(512))

    asyncio.run(main())


def test_x2_the_same_cookie_twice_in_flight_is_answered_twice() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(7, 0) + read(7, 512))
            await until(lambda: len(driver.waiting) == 2)
            driver.release()
            assert await t.client.replies(2, 512) == [Reply(7, 0, bytes(512))] * 2

    asyncio.run(main())


def test_x3_replies_come_when_they_are_ready() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512) + read(2, 1024) + wire.request(wire.TRIM, 3, 0, 512))
            assert await t.client.reply() == Reply(3, 0)
            await until(lambda: len(driver.waiting) == 2)
            driver.release(1024)
            assert (await t.client.reply(512)).cookie == 2
            driver.release(512)
            assert (await t.client.reply(512)).cookie == 1

    asyncio.run(main())


def test_inline_replies_of_a_batch_are_one_send() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            await t.client.send(b"".join(read(i, i * 512) for i in range(16)))
            assert [reply.cookie for reply in await t.client.replies(16, 512)] == list(range(16))
            assert t.sock.sends == 1
            assert t.sock.receives <= 3
            assert not t.tasks

    asyncio.run(main())


def test_completions_of_one_turn_are_one_send() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(b"".join(read(i, i * 512) for i in range(16)))
            await until(lambda: len(driver.waiting) == 16)
            driver.release()
            assert {reply.cookie for reply in await t.client.replies(16, 512)} == set(range(16))
            assert t.sock.sends == 1

    asyncio.run(main())


def test_requests_behind_the_handshake() -> None:
    async def main() -> None:
        head = read(1) + read(2)
        async with talk(Memory(SIZE), leftover=head[:40]) as t:
            await t.client.send(head[40:])
            assert [reply.cookie for reply in await t.client.replies(2, 512)] == [1, 2]

    asyncio.run(main())


ANSWERS: list[tuple[str, Any, bytes, int]] = [
    ("w1_write", Memory, wire.write(1, 0, b"x" * 512), 0),
    ("d3_write_fua", Memory, wire.write(1, 0, b"x", wire.FUA), 0),
    ("d1_flush", Memory, wire.request(wire.FLUSH), 0),
    ("tr1_trim", Memory, wire.request(wire.TRIM, 1, 0, SIZE), 0),
    ("wz1_write_zeroes", Memory, wire.request(wire.WRITE_ZEROES, 1, 0, SIZE), 0),
    ("wz1_no_hole", Memory, wire.request(wire.WRITE_ZEROES, 1, 0, 512, wire.NO_HOLE | wire.FUA), 0),
    ("x10_fua_on_trim", Memory, wire.request(wire.TRIM, 1, 0, 512, wire.FUA), 0),
    ("x10_fua_on_flush", Memory, wire.request(wire.FLUSH, 1, flags=wire.FUA), 0),
    ("x9_unknown_command", Memory, wire.request(4711), EINVAL),
    ("ca1_cache", Memory, wire.request(wire.CACHE, 1, 0, SIZE), 0),
    ("ca1_unknown_flag", Memory, wire.request(wire.CACHE, 1, 0, 512, wire.DF), EINVAL),
    ("ca1_past_the_end", Memory, wire.request(wire.CACHE, 1, 0, SIZE + 1), EINVAL),
    ("ca1_cache_not_offered", NoFlush, wire.request(wire.CACHE, 1, 0, 512), EINVAL),
    ("x9_df_without_structured_replies", Memory, read(1, flags=wire.DF), EINVAL),
    ("x9_no_hole_on_write", Memory, wire.write(1, 0, b"x", wire.NO_HOLE), EINVAL),
    ("x9_unknown_flag", Memory, read(1, flags=0x8000), EINVAL),
    ("x9_fua_not_offered", NoFlush, wire.write(1, 0, b"x", wire.FUA), EINVAL),
    ("d4_flush_not_offered", NoFlush, wire.request(wire.FLUSH), EINVAL),
    ("x5_trim_not_offered", NoFlush, wire.request(wire.TRIM, 1, 0, 512), EINVAL),
    ("wz2_fast_zero", Memory, wire.request(wire.WRITE_ZEROES, 1, 0, SIZE, wire.FAST_ZERO | wire.NO_HOLE), 0),
    ("wz2_fast_zero_is_slow", Slow, wire.request(wire.WRITE_ZEROES, 1, 0, 1, wire.FAST_ZERO), ENOTSUP),
    ("wz2_slow_without_fast_zero", Slow, wire.request(wire.WRITE_ZEROES, 1, 0, 1), EINVAL),
    ("wz2_fast_zero_past_the_end", Memory, wire.request(wire.WRITE_ZEROES, 1, SIZE, 1, wire.FAST_ZERO), ENOSPC),
    ("wz2_fast_zero_not_offered", NoFlush, wire.request(wire.WRITE_ZEROES, 1, 0, 1, wire.FAST_ZERO), EINVAL),
    ("bs1_block_status", Memory, wire.request(wire.BLOCK_STATUS, 1, 0, 512), EINVAL),
    ("e1_read_past_the_end", Memory, read(1, SIZE - 1, 2), EINVAL),
    ("e1_read_far_past_the_end", Memory, read(1, 2**64 - 1, 1), EINVAL),
    ("e1_trim_past_the_end", Memory, wire.request(wire.TRIM, 1, SIZE, 1), EINVAL),
    ("e2_write_past_the_end", Memory, wire.write(1, SIZE, b"x"), ENOSPC),
    ("e2_write_zeroes_past_the_end", Memory, wire.request(wire.WRITE_ZEROES, 1, 0, 2**32 - 1), ENOSPC),
    ("e4_unaligned_read", Strict, read(1, 1, 512), EINVAL),
    ("e4_unaligned_write", Strict, wire.write(1, 0, b"x"), EINVAL),
    ("w2_driver_fails", Broken, read(1), EIO),
    ("z6_read_above_the_maximum", Memory, read(1, 0, (1 << 25) + 1), EINVAL),
    ("x14_empty_write", Memory, wire.write(1, 0, b""), 0),
    ("x14_empty_read", Memory, read(1, 0, 0), 0),
]


@pytest.mark.parametrize(("driver", "request_", "error"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
def test_answer(driver: Any, request_: bytes, error: int) -> None:
    """Each gets its answer, without payload (R2), and the connection goes on (F5)."""
    async def main() -> None:
        async with talk(driver() if driver is not Memory else Memory(SIZE)) as t:
            await t.client.send(request_ + wire.request(4711, 99))
            assert (await t.client.reply()).error == error
            assert await t.client.reply() == Reply(99, EINVAL)
            assert t.connection.statistics().errors == 1 + bool(error)

    asyncio.run(main())


@pytest.mark.parametrize("request_", [
    wire.write(1, 0, b"x"),
    wire.write(1, 0, b"x", wire.FUA),
    wire.request(wire.TRIM, 1, 0, 512),
    wire.request(wire.WRITE_ZEROES, 1, 0, 512),
    wire.write(1, 0, bytes(200_000)),
])
def test_e3_read_only(request_: bytes) -> None:
    async def main() -> None:
        driver = Memory(SIZE)
        async with talk(driver, read_only=True) as t:
            await t.client.send(request_ + read(2))
            assert await t.client.reply() == Reply(1, EPERM)
            assert await t.client.reply(512) == Reply(2, 0, bytes(512))
        assert driver.allocated_bytes == 0

    asyncio.run(main())


def test_x10_fua_on_read() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            await t.client.send(read(1, flags=wire.FUA))
            assert await t.client.reply(512) == Reply(1, 0, bytes(512))

    asyncio.run(main())


def test_z9_payload_above_ours_but_not_above_32_mib() -> None:
    """Too much for this export, but no attack: taken, refused, and on it goes."""
    async def main() -> None:
        async with talk(Memory(SIZE), payload_bytes_max=1 << 16) as t:
            sending = asyncio.ensure_future(t.client.send(wire.write(1, 0, bytes((1 << 16) + 1)) + read(2)))
            assert await t.client.reply() == Reply(1, EINVAL)
            assert (await t.client.reply(512)).cookie == 2
            await sending

    asyncio.run(main())


def test_z9_payload_above_32_mib_ends_the_connection() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            await t.client.send(wire.request(wire.WRITE, 1, 0, (1 << 25) + 1))
            assert await t.client.ended() == b""
            error = await t.end()
            assert isinstance(error, PeerError)
            assert "33554433 bytes" in str(error)

    asyncio.run(main())


def test_malformed_input_comes_after_the_answers_to_what_was_right() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            await t.client.send(read(1) + b"rubbish" * 4)
            assert await t.client.ended() == wire.simple_reply(1, 0, bytes(512))
            assert isinstance(await t.end(), PeerError)

    asyncio.run(main())


def test_malformed_input_waits_for_nothing_but_ends_after_what_runs() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512))
            await until(lambda: driver.waiting)
            await t.client.send(bytes(28))
            assert await t.client.ended() == b""
            assert not t.closed.done()
            driver.release()
            assert isinstance(await t.end(), PeerError)

    asyncio.run(main())


# Ends


def test_f1_disc_finishes_what_is_outstanding() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512) + wire.request(wire.DISC) + read(3))
            await until(lambda: driver.waiting)
            await turns()
            assert not t.closed.done()
            driver.release()
            assert await t.client.ended() == wire.simple_reply(1, 0, bytes(512))
            assert await t.end() is None
            assert driver.begun == 1            # F2: what follows DISC is not looked at

    asyncio.run(main())


def test_f1_disc_on_an_idle_connection() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            await t.client.send(wire.request(wire.DISC))
            assert await t.client.ended() == b""
            assert await t.end() is None

    asyncio.run(main())


def test_half_closed_client_gets_its_replies() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512))
            t.client.sock.shutdown(socket.SHUT_WR)
            await until(lambda: driver.waiting)
            await turns()
            driver.release()
            assert await t.client.ended() == wire.simple_reply(1, 0, bytes(512))
            assert await t.end() is None

    asyncio.run(main())


@pytest.mark.parametrize("cut", [0, 1, 27, 28, 40])
def test_client_goes_without_a_word(cut: int) -> None:
    """In the middle of a request too: no error, and what runs is run to its end."""
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512) + wire.write(2, 0, bytes(100))[:cut])
            await until(lambda: driver.waiting)
            t.client.close()
            await turns()
            assert not t.closed.done()
            driver.release()
            assert await t.end() is None

    asyncio.run(main())


def test_reset_by_the_client() -> None:
    """Unread replies make a close of a unix socket a reset."""
    async def main() -> None:
        async with talk(Memory(SIZE)) as t:
            await t.client.send(read(1))
            await until(lambda: t.sock.sends)
            t.client.close()
            assert await t.end() is None

    asyncio.run(main())


def test_f3_shutdown_finishes_what_is_in_flight() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512))
            await until(lambda: driver.waiting)
            t.connection.shutdown()
            await t.client.send(read(2))
            await turns()
            assert not t.closed.done()
            driver.release()
            assert await t.client.ended() == wire.simple_reply(1, 0, bytes(512))
            assert await t.end() is None
            assert driver.begun == 1

    asyncio.run(main())


def test_shutdown_and_start_in_the_wrong_order() -> None:
    """The server posts both; an export may be removed before its newest client has begun."""
    async def main() -> None:
        async with talk(Memory(SIZE), start=False) as t:
            t.connection.shutdown()
            t.connection.start(read(1))
            assert await t.client.ended() == b""
            assert await t.end() is None

    asyncio.run(main())


def test_abort_drops_the_replies() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512))
            await until(lambda: driver.waiting)
            t.connection.abort()
            t.connection.abort()
            assert await t.client.ended() == b""
            assert not t.closed.done()
            driver.release()
            assert await t.end() is None

    asyncio.run(main())


def test_a_client_that_does_not_take_its_last_replies() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), linger_s=0.01) as t:
            await t.client.send(read(1, 0, SIZE) + wire.request(wire.DISC))
            assert await t.end() is None
            assert 0 < len(await t.client.ended()) < SIZE

    asyncio.run(main())


def test_our_own_mistake_ends_this_connection() -> None:
    async def main() -> None:
        device: Any = Device(Memory(SIZE))

        def mistake(offset: int, length: int, caller: object) -> bytes:
            raise ZeroDivisionError

        device.read = mistake
        async with talk(None, device=device) as t:
            await t.client.send(read(1))
            assert await t.client.ended() == b""
            assert isinstance(await t.end(), ZeroDivisionError)

    asyncio.run(main())


def test_our_own_mistake_in_a_request_that_waited() -> None:
    async def main() -> None:
        device: Any = Device(Memory(SIZE))

        async def mistake(offset: int, length: int, caller: object) -> bytes:
            raise ZeroDivisionError

        device.read = mistake
        async with talk(None, device=device) as t:
            await t.client.send(read(1))
            assert await t.client.ended() == b""
            assert isinstance(await t.end(), ZeroDivisionError)

    asyncio.run(main())


def test_w2_a_request_that_waited_fails() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 0) + read(2, 512))
            await until(lambda: len(driver.waiting) == 2)
            driver.fail(0, OSError(errno.EDQUOT, "full"))
            driver.fail(512, BlockError(errno.ESHUTDOWN, "later"))
            assert {(r.cookie, r.error) for r in await t.client.replies(2)} == {(1, ENOSPC), (2, 108)}

    asyncio.run(main())


def test_a_request_that_is_cancelled_ends_the_connection() -> None:
    """The home is ending: there will be no reply, and the client must not wait for it."""
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            await t.client.send(read(1, 512))
            await until(lambda: driver.waiting)
            t.tasks[0].cancel()
            assert await t.client.ended() == b""
            assert await t.end() is None

    asyncio.run(main())


def test_home_that_takes_no_more_requests() -> None:
    """spawn() refuses: the request is forgotten whole, nothing waits for it."""
    async def main() -> None:
        driver = Gated()
        async with talk(driver) as t:
            def refuse(coro: Any) -> None:
                coro.close()
                raise ContextClosed("it has ended")

            t.connection._spawn = refuse
            await t.client.send(read(1))
            assert await t.client.ended() == b""
            assert await t.end() is None
            assert driver.begun == 0

    asyncio.run(main())


# Data


def test_random_requests_in_random_pieces(seed: int) -> None:
    """Against a model: writes of every size, cut anywhere, come out as they went in."""
    dice = random.Random(seed)
    lengths = [1, 100, 4096, 32767, 32768, 40000, 262144, 300_000]

    async def main() -> None:
        model = bytearray(SIZE)
        async with talk(Memory(SIZE)) as t:
            for _ in range(12):
                stream = bytearray()
                expected = []
                for cookie in range(dice.randrange(1, 12)):
                    length = dice.choice(lengths)
                    offset = dice.randrange(SIZE - length)
                    if dice.random() < 0.6:
                        data = dice.randbytes(length)
                        model[offset:offset + length] = data
                        stream += wire.write(cookie, offset, data)
                        expected.append(Reply(cookie, 0))
                    else:
                        stream += read(cookie, offset, length)
                        expected.append(Reply(cookie, 0, bytes(model[offset:offset + length])))
                sending = asyncio.ensure_future(send_in_pieces(t.client, bytes(stream), dice))
                for reply in expected:
                    assert await t.client.reply(len(reply.data)) == reply
                await sending

    asyncio.run(main())


async def send_in_pieces(client: Any, stream: bytes, dice: random.Random) -> None:
    while stream:
        cut = dice.choice([1, 20, 28, 5000, 100_000, len(stream)])
        await client.send(stream[:cut])
        stream = stream[cut:]
        await asyncio.sleep(0)


def test_a_write_that_waits_keeps_its_data() -> None:
    """Its payload lies in the receive buffer, which must not be overwritten by what comes next."""
    async def main() -> None:
        driver = Gated()
        expected = {}
        async with talk(driver) as t:
            for number in range(40):
                offset = number * 8192
                expected[offset] = bytes([number + 1]) * (8192 if number % 3 else 8000)
                await t.client.send(wire.write(number, offset, expected[offset]))
                await until(lambda count=number + 1: driver.begun == count)
            driver.release()
            assert {reply.error for reply in await t.client.replies(40)} == {0}
        for offset, data in expected.items():
            assert Memory.read(driver, offset, len(data)) == data

    asyncio.run(main())


def test_an_inline_write_is_not_copied() -> None:
    seen: list[Any] = []

    class Driver(NoFlush):
        def write(self, offset: int, data: Any) -> None:
            seen.append((type(data), type(data.obj), len(data.obj), bytes(data[:2])))

    async def main() -> None:
        async with talk(Driver()) as t:
            await t.client.send(wire.write(1, 0, b"ab" * 2048))
            await t.client.reply()
            await t.client.send(wire.write(1, 0, b"cd" * 150_000))
            await t.client.reply()

    asyncio.run(main())
    assert seen == [(memoryview, bytearray, 256 << 10, b"ab"), (memoryview, bytearray, 300_000, b"cd")]
