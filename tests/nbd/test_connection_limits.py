"""Back-pressure: what one client may occupy, and that it is served to the end all the same."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from homeloop.block.memory import Memory
from tests.nbd import wire
from tests.nbd.talking import Gated, talk, turns, until

SIZE = 1 << 20


def reads(count: int, length: int) -> bytes:
    return b"".join(wire.request(wire.READ, i, i * length % SIZE, length) for i in range(count))


@pytest.mark.parametrize("limits", [{"requests_max": 8}, {"in_flight_bytes_max": 8 * 512}])
def test_requests_in_flight(limits: dict[str, int]) -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver, **limits) as t:
            await t.client.send(reads(100, 512))
            await until(lambda: len(driver.waiting) == 8)
            await turns()
            assert driver.begun == 8
            assert t.connection.statistics().in_flight == 8
            driver.release(0, 512)              # still above half of the limit: nothing new begins
            await t.client.replies(2, 512)
            await turns()
            assert driver.begun == 8
            driver.release(1024, 1536)
            await until(lambda: driver.begun == 12)
            answered = 4
            while answered < 100:
                await until(lambda: driver.waiting)
                answered += len(driver.waiting)
                assert len(driver.waiting) <= 8
                driver.release()
                await turns()
            assert {reply.cookie for reply in await t.client.replies(98, 512)} <= set(range(100))
            assert t.connection.statistics().paused >= 1

    asyncio.run(main())


def test_one_request_above_the_limit_is_served() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver, in_flight_bytes_max=10, unsent_bytes_max=10) as t:
            await t.client.send(reads(3, 4096))
            for cookie in range(3):
                await until(lambda: driver.waiting)
                await turns()
                assert driver.begun == cookie + 1
                driver.release()
                assert (await t.client.reply(4096)).cookie == cookie

    asyncio.run(main())


@pytest.mark.parametrize(("length", "count"), [(512, 4000), (65536, 1000)])
def test_client_that_does_not_read(length: int, count: int) -> None:
    """Unsent replies stay below the limit and a little more; the other requests stay in the socket."""
    unsent_max = 4 * 65536

    async def main() -> None:
        async with talk(Memory(SIZE), unsent_bytes_max=unsent_max) as t:
            sending = asyncio.ensure_future(t.client.send(reads(count, length)))
            await until(lambda: t.connection.statistics().paused)
            await turns()
            stopped = t.connection.statistics()
            await turns(200)
            assert t.connection.statistics() == stopped
            assert unsent_max <= stopped.unsent_bytes <= unsent_max + 65536 + length + 16
            assert stopped.requests < count
            for cookie in range(count):
                assert (await t.client.reply(length)).cookie == cookie
            await sending
            assert t.connection.statistics().unsent_bytes == 0

    asyncio.run(main())


def test_small_replies_are_counted_too() -> None:
    """Sixteen-byte replies would take a thousand times their size in objects before they are 16 MiB."""
    async def main() -> None:
        async with talk(Memory(SIZE), unsent_pieces_max=100) as t:
            flushes = b"".join(wire.request(wire.FLUSH, i) for i in range(30_000))
            sending = asyncio.ensure_future(t.client.send(flushes))
            await until(lambda: t.connection.statistics().paused)
            assert t.connection.statistics().unsent_bytes <= 16 * (100 + 1)
            assert [reply.cookie for reply in await t.client.replies(30_000)] == list(range(30_000))
            await sending

    asyncio.run(main())


def test_one_client_does_not_occupy_the_loop() -> None:
    """Between two looks of somebody else, a client that never pauses gets a bounded number of requests."""
    async def main() -> None:
        async with talk(Memory(SIZE), turn_requests_max=50) as t:
            await t.client.send(reads(4000, 0))
            seen = [0]
            while seen[-1] < 4000:
                await asyncio.sleep(0)
                seen.append(t.connection.statistics().requests)
            assert max(b - a for a, b in itertools.pairwise(seen)) <= 2 * 50
            await t.client.replies(4000)

    asyncio.run(main())


def test_a_turn_is_bounded_in_bytes() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), turn_bytes_max=1 << 17) as t:
            await t.client.send(reads(200, 1 << 16))
            seen = [0]
            receiving = asyncio.ensure_future(t.client.replies(200, 1 << 16))
            while seen[-1] < 200:
                await asyncio.sleep(0)
                seen.append(t.connection.statistics().requests)
            assert max(b - a for a, b in itertools.pairwise(seen)) <= 4
            assert len(await receiving) == 200

    asyncio.run(main())


def test_end_while_paused() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver, requests_max=4) as t:
            await t.client.send(reads(50, 512))
            await until(lambda: len(driver.waiting) == 4)
            t.client.close()
            while not t.closed.done():
                await until(lambda: driver.waiting or t.closed.done())
                driver.release()
                await turns()
            assert await t.end() is None

    asyncio.run(main())


def test_shutdown_while_paused_does_not_begin_what_waits() -> None:
    async def main() -> None:
        driver = Gated()
        async with talk(driver, requests_max=4) as t:
            await t.client.send(reads(50, 512))
            await until(lambda: len(driver.waiting) == 4)
            t.connection.shutdown()
            driver.release()
            assert len(await t.client.ended()) == 4 * (512 + 16)
            assert await t.end() is None
            assert driver.begun == 4

    asyncio.run(main())
