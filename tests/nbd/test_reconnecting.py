"""The client that reconnects: what is asked again, what fails and when, what a flush may promise."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homeloop.core.iothread import IOThread
from homeloop.core.runtime import Runtime, run
from homeloop.core.workers import to_worker
from homeloop.errors import BlockError, ConnectionLost, PeerError, UsageError, WrongState
from homeloop.nbd.attempt import Attempt
from homeloop.nbd.connector import Connector, Pacing
from homeloop.nbd.reconnecting import TRIES_MAX, ReconnectingClient
from homeloop.nbd.uri import parse_uri
from tests.nbd import wire
from tests.nbd.scripted import Asked, Peer, Scripted
from tests.nbd.talking import soon, turns, until

HOUR_S = 3600.0


class Clock:
    """Pauses and timers that pass when the test says so."""

    def __init__(self, patience: int = 0) -> None:
        self.pauses: list[float] = []                   # the connect thread's, as they were asked for
        self.timers: list[tuple[float, Callable[[], object]]] = []
        self.patience = threading.Semaphore(patience)   # one for each pause that may pass
        self.pacing = Pacing(pause=self._pause, call_later=self._call_later)

    def _pause(self, stop: threading.Event, seconds: float) -> None:
        self.pauses.append(seconds)
        while not stop.is_set():
            if self.patience.acquire(timeout=0.01):
                return

    def let_pass(self, pauses: int = 1) -> None:
        self.patience.release(pauses)

    def _call_later(self, _loop: object, seconds: float, fn: Callable[[], object]) -> Any:
        entry = seconds, fn
        self.timers.append(entry)

        class Handle:
            def cancel(_self) -> None:
                if entry in self.timers:
                    self.timers.remove(entry)

        return Handle()

    def ring(self) -> float:
        """Let the only timer go off."""
        ((seconds, fn),) = self.timers
        self.timers.clear()
        fn()
        return seconds


@asynccontextmanager
async def reconnecting(
    server: Scripted, clock: Clock | None = None, **options: Any
) -> AsyncIterator[ReconnectingClient]:
    options = {"reconnect_delay": HOUR_S, **options}
    client = ReconnectingClient(server.uri, pacing=(clock or Clock(1000)).pacing, **options)
    try:
        yield await soon(client.open())
    finally:
        await soon(client.close())


def scripted(test: Callable[..., Awaitable[None]]) -> Callable[[Path], None]:
    """Run a test as a coroutine, with a server that it may script."""
    def run_it(tmp_path: Path) -> None:
        async def main() -> None:
            async with Scripted(tmp_path / "s") as server:
                await test(server)

        run(main())

    run_it.__name__, run_it.__doc__ = test.__name__, test.__doc__
    return run_it


async def asked_for(peer: Peer, count: int) -> list[Asked]:
    return [await peer.asked() for _ in range(count)]


@scripted
async def test_what_is_in_flight_is_asked_again(server: Scripted) -> None:
    """Each is answered once, also what the first server had done; what was answered is not asked again."""
    async with reconnecting(server) as client:
        first = await server.peer()
        done = asyncio.ensure_future(client.read(0, 512))
        first.answer(await first.asked())
        assert await soon(done) == bytes(512)
        asking: list[Awaitable[Any]] = [
            client.read(512, 512), client.write(1024, b"x" * 100), client.trim(4096, 512), client.flush(),
            client.write_zeroes(8192, 512), client.cache(0, 512), client.write(2048, b"y", fua=True),
        ]
        requests = [asyncio.ensure_future(one) for one in asking]
        before = await asked_for(first, len(requests))
        first.hang_up()
        second = await server.peer()
        again = await asked_for(second, len(requests))
        key = lambda asked: (asked.command, asked.flags, asked.offset, asked.length, asked.data)  # noqa: E731
        assert sorted(map(key, again)) == sorted(map(key, before))
        assert not any(one.done() for one in requests)
        for asked in again:
            second.answer(asked)
        results = await soon(asyncio.gather(*requests))
        assert results[0] == bytes(512)
        assert (client.connections, client.connected) == (2, True)


@scripted
async def test_requests_wait_and_then_fail_and_then_go_on(server: Scripted) -> None:
    clock = Clock(1)
    async with reconnecting(server, clock, reconnect_delay=30) as client:
        peer = await server.peer()
        in_flight = asyncio.ensure_future(client.read(0, 512))
        await peer.asked()
        await server.stop()
        peer.hang_up()
        await until(lambda: not client.connected)
        new = asyncio.ensure_future(client.write(0, b"x"))
        await until(lambda: len(clock.pauses) == 2)     # an attempt has failed
        assert not in_flight.done()
        assert clock.ring() == 30
        for request, kind in ((in_flight, "read"), (new, "write")):
            with pytest.raises(ConnectionLost, match=rf"{kind}: no connection to nbd\+unix.* for 30 s: .*No such"):
                await soon(request)
        with pytest.raises(ConnectionLost, match="flush: no connection"):
            await soon(client.flush())
        assert not clock.timers
        await server.start()
        clock.let_pass()
        peer = await server.peer()
        await until(lambda: client.connected)
        await do(peer, client.read(0, 512))
        peer.hang_up()
        peer = await server.peer()
        await until(lambda: client.connected)
        assert not clock.timers                         # of this delay nothing is left for the next loss


@scripted
async def test_no_delay(server: Scripted) -> None:
    """Requests in flight fail with the connection; it is made anew all the same."""
    async with reconnecting(server, reconnect_delay=0) as client:
        peer = await server.peer()
        reading = asyncio.ensure_future(client.read(0, 512))
        await peer.asked()
        peer.hang_up()
        with pytest.raises(ConnectionLost, match="for 0 s"):
            await soon(reading)
        await server.peer()
        await until(lambda: client.connected)


@scripted
async def test_back_off(server: Scripted) -> None:
    """1, 2, 4, 8, 16 and then 16 s; from 1 again once a connection has answered something, and only then."""
    clock = Clock()
    async with reconnecting(server, clock) as client:
        first = await server.peer()
        reading = asyncio.ensure_future(client.read(0, 512))
        first.answer(await first.asked())
        await soon(reading)
        await server.stop()
        first.hang_up()
        clock.let_pass(6)
        await until(lambda: len(clock.pauses) == 7)
        assert clock.pauses == [1, 2, 4, 8, 16, 16, 16]
        await server.start()
        clock.let_pass()
        (await server.peer()).hang_up()                 # one that answers nothing is no success
        await until(lambda: len(clock.pauses) == 8)
        assert clock.pauses[7] == 16
        clock.let_pass()
        third = await server.peer()
        reading = asyncio.ensure_future(client.read(0, 512))
        third.answer(await third.asked())
        await soon(reading)
        third.hang_up()
        (await server.peer()).hang_up()                 # at once
        await until(lambda: len(clock.pauses) == 9)
        assert clock.pauses[8] == 1


@scripted
async def test_a_cancelled_request_is_not_asked_again(server: Scripted) -> None:
    clock = Clock()
    async with reconnecting(server, clock) as client:
        peer = await server.peer()
        requests = [asyncio.ensure_future(client.read(n * 512, 512)) for n in range(3)]
        await asked_for(peer, 3)
        requests[1].cancel()                            # in flight
        await turns()
        await server.stop()
        peer.hang_up()
        await until(lambda: not client.connected)
        requests[2].cancel()                            # while it waits for a connection
        await turns()
        await server.start()
        clock.let_pass()
        peer = await server.peer()
        asked = await peer.asked()
        assert asked.offset == 0
        peer.answer(asked)
        assert await soon(requests[0]) == bytes(512)
        await soon(client.close())
        assert wire.request(wire.DISC) == await peer.ended()


async def lose(server: Scripted, peer: Peer) -> Peer:
    peer.hang_up()
    return await server.peer()


async def do(peer: Peer, request: Awaitable[Any]) -> Any:
    """Let one request be answered."""
    asking = asyncio.ensure_future(request)
    peer.answer(await peer.asked())
    return await soon(asking)


@scripted
async def test_d1_a_flush_after_changes_that_may_be_lost(server: Scripted) -> None:
    """The flush says so, once; the next one covers what came after."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        await do(peer, client.write(0, b"x"))
        peer = await lose(server, peer)
        await do(peer, client.write(512, b"y"))
        with pytest.raises(BlockError, match="may have lost them") as caught:
            await soon(client.flush())
        assert caught.value.errno == errno.EIO
        await do(peer, client.flush())


@scripted
async def test_d1_every_flush_in_flight_is_told(server: Scripted) -> None:
    """Two flushes were asked for behind an answered change: neither may succeed. The next covers nothing lost."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        await do(peer, client.trim(0, 512))
        flushes = [asyncio.ensure_future(client.flush()) for _ in range(2)]
        await asked_for(peer, 2)
        peer = await lose(server, peer)
        told = await soon(asyncio.gather(*flushes, return_exceptions=True))
        assert [getattr(error, "errno", error) for error in told] == [errno.EIO, errno.EIO]
        await do(peer, client.flush())


@scripted
async def test_d1_nothing_to_lose(server: Scripted) -> None:
    """Flushed before, or FUA, or only read: a flush after the loss is right."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        await do(peer, client.write(0, b"x"))
        await do(peer, client.flush())
        await do(peer, client.write(0, b"x", fua=True))
        await do(peer, client.read(0, 512))
        peer = await lose(server, peer)
        await do(peer, client.flush())


@scripted
async def test_d1_a_flush_covers_only_what_was_answered_before_it(server: Scripted) -> None:
    async with reconnecting(server) as client:
        peer = await server.peer()
        flushing = asyncio.ensure_future(client.flush())
        asked = await peer.asked()
        await do(peer, client.write(0, b"behind it"))
        peer.answer(asked)
        await soon(flushing)
        peer = await lose(server, peer)
        with pytest.raises(BlockError, match="may have lost"):
            await soon(client.flush())


@scripted
async def test_d1_a_server_that_keeps_its_writes(server: Scripted) -> None:
    async with reconnecting(server, server_keeps_writes=True) as client:
        peer = await server.peer()
        await do(peer, client.write(0, b"x"))
        peer = await lose(server, peer)
        await do(peer, client.flush())


@scripted
async def test_another_export(server: Scripted) -> None:
    """Its size is another: nothing is asked of it, and every request says why, for good."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        reading = asyncio.ensure_future(client.read(0, 512))
        await peer.asked()
        server.size = 2 << 20
        server.flags |= 2
        peer = await lose(server, peer)
        for request in (reading, client.flush()):
            with pytest.raises(PeerError, match=r"another than before: size 1048576 -> 2097152, flags 0x46d -> 0x46f"):
                await soon(request)
        assert await peer.ended() == b""
        assert "broken" in repr(client)


@scripted
async def test_a_request_that_no_connection_survives(server: Scripted) -> None:
    async with reconnecting(server) as client:
        reading = asyncio.ensure_future(client.read(0, 512))
        for _ in range(TRIES_MAX):
            peer = await server.peer()
            await peer.asked()
            peer.hang_up()
        with pytest.raises(ConnectionLost, match=f"{TRIES_MAX} connections did not survive it"):
            await soon(reading)
        await do(await server.peer(), client.read(0, 512))


@scripted
async def test_a_server_that_breaks_the_protocol(server: Scripted) -> None:
    """Asking again would break it again: what is in flight fails. The next request has a new connection."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        reading = asyncio.ensure_future(client.read(0, 512))
        asked = await peer.asked()
        peer.say(wire.simple_reply(asked.cookie + 1))
        with pytest.raises(PeerError, match="no request is in flight") as caught:
            await soon(reading)
        assert not isinstance(caught.value, ConnectionLost)
        await do(await server.peer(), client.read(0, 512))


@scripted
async def test_f4_a_server_that_shuts_down(server: Scripted) -> None:
    """It is told goodbye, and its successor is asked."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        reads = [asyncio.ensure_future(client.read(n * 512, 512)) for n in range(3)]
        for asked in (await asked_for(peer, 3))[:2]:
            peer.answer(asked, error=108)
        assert await peer.ended() == wire.request(wire.DISC)
        peer = await server.peer()
        for asked in await asked_for(peer, 3):
            peer.answer(asked)
        assert await soon(asyncio.gather(*reads)) == [bytes(512)] * 3
        reading = asyncio.ensure_future(client.read(0, 512))
        for _ in range(TRIES_MAX - 1):
            peer.answer(await peer.asked(), error=108)
            peer = await server.peer()
        peer.answer(await peer.asked(), error=108)
        with pytest.raises(BlockError) as caught:
            await soon(reading)
        assert caught.value.errno == errno.ESHUTDOWN


@scripted
async def test_reply_timeout(server: Scripted) -> None:
    """Silence counts while something is in flight only; then it is a loss like another."""
    clock = Clock(1)
    async with reconnecting(server, clock, reply_timeout=5) as client:
        peer = await server.peer()
        assert clock.ring() == 5                        # nothing is in flight
        reading = asyncio.ensure_future(client.read(0, 512))
        await peer.asked()
        clock.ring()                                    # perhaps it was asked just now
        assert client.connected
        clock.ring()
        assert not client.connected
        peer = await server.peer()
        peer.answer(await peer.asked())
        assert await soon(reading) == bytes(512)


@scripted
async def test_open_fails_as_it_would_without_retries(server: Scripted) -> None:
    server.refuses = wire.UNKNOWN
    client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, pacing=Clock().pacing)
    with pytest.raises(BlockError, match="ERR_UNKNOWN: no") as caught:
        await soon(client.open())
    assert caught.value.errno == errno.ENOENT
    uri = f"nbds+unix:///?socket={server.path}&tls-certificates=/nonexistent"
    with pytest.raises(UsageError, match="/nonexistent"):
        await soon(ReconnectingClient(uri, reconnect_delay=HOUR_S, pacing=Clock().pacing).open())
    await server.stop()
    client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, pacing=Clock().pacing)
    with pytest.raises(FileNotFoundError):
        await soon(client.open())
    with pytest.raises(WrongState, match="read on a client that is closed"):
        await client.read(0, 512)


@scripted
async def test_open_waits(server: Scripted) -> None:
    """For a server that comes later, and not for ever."""
    await server.stop()
    clock = Clock()
    client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, open_timeout=7, pacing=clock.pacing)
    opening = asyncio.ensure_future(client.open())
    await until(lambda: clock.pauses)
    await server.start()
    clock.let_pass()
    assert await soon(opening) is client
    await client.close()
    await server.stop()
    client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, open_timeout=7, pacing=clock.pacing)
    opening = asyncio.ensure_future(client.open())
    await until(lambda: len(clock.pauses) > 1)
    assert clock.ring() == 7
    with pytest.raises(FileNotFoundError):
        await soon(opening)


@scripted
async def test_close_fails_who_waits(server: Scripted) -> None:
    async with reconnecting(server) as client:
        peer = await server.peer()
        reading = asyncio.ensure_future(client.read(0, 512))
        await peer.asked()
        await server.stop()
        peer.hang_up()
        await until(lambda: not client.connected)
        await turns()                                   # it has learned of the loss, and waits
        await soon(client.close())
        with pytest.raises(WrongState, match="closed"):
            await soon(reading)
        await soon(client.close())


@scripted
async def test_close_while_the_thread_connects_to_a_dead_peer(server: Scripted) -> None:
    """It accepts, and says nothing for ever: the thread's attempt is given up, or the test would leave a thread."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        server.path.unlink()
        mute = asyncio.Event()

        async def accept(_reader: object, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            mute.set()

        writers: list[asyncio.StreamWriter] = []
        dead = await asyncio.start_unix_server(accept, server.path)
        peer.hang_up()
        await soon(mute.wait())
        await soon(client.close())
        dead.close()
        for writer in writers:
            writer.transport.abort()


@scripted
async def test_no_thread_for_the_next_connection(server: Scripted) -> None:
    """Requests fail meanwhile; it is tried again, and not given up for good."""
    refused = asyncio.Event()

    def barren(_connector: Connector) -> None:
        refused.set()
        raise RuntimeError("can't start new thread")

    session = await to_worker(Attempt(parse_uri(server.uri)).run)
    pacing = Pacing(backoff_s=(0.01,))
    client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, session=session, pacing=pacing)
    first = await server.peer()
    await do(first, client.read(0, 512))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connector, "_start_locked", barren)
        first.hang_up()
        await soon(refused.wait())
        with pytest.raises(ConnectionLost, match="no connection"):
            await soon(client.read(0, 512))
    second = await server.peer()
    await until(lambda: client.connected)
    await do(second, client.read(0, 512))
    await client.close()


@scripted
async def test_a_session_made_elsewhere(server: Scripted) -> None:
    """A worker makes it; the first who asks is the home. One that is not used can be dropped."""
    session = await to_worker(Attempt(parse_uri(server.uri)).run)
    client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, session=session)
    assert client.size == server.size
    await do(await server.peer(), client.read(0, 512))
    await client.close()
    session = await to_worker(Attempt(parse_uri(server.uri)).run)
    ReconnectingClient(server.uri, reconnect_delay=HOUR_S, session=session).abandon()
    assert await (await server.peer()).ended() == b""
    session = await to_worker(Attempt(parse_uri(server.uri)).run)
    client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, session=session)
    await client.close()
    assert await (await server.peer()).ended() == b""
    with pytest.raises(WrongState, match="read on a client that is closed"):
        await client.read(0, 512)


def test_from_threads_while_the_server_is_away(tmp_path: Path) -> None:
    """Two plain threads and an IOThread call(); the connection is lost under them, and each gets its answer."""
    with Runtime(name="app") as rt, IOThread("io") as io:
        clock = Clock()
        server = Scripted(tmp_path / "s")
        rt.call(server.start())
        client = ReconnectingClient(server.uri, reconnect_delay=HOUR_S, pacing=clock.pacing)
        rt.call(client.open())
        clock.let_pass()
        results: list[Any] = []
        threads = [threading.Thread(target=lambda: results.append(rt.call(client.read(0, 512)))) for _ in range(2)]
        threads.append(threading.Thread(target=lambda: results.append(io.call(client.read(512, 512)))))

        async def script() -> None:
            first = await server.peer()
            for thread in threads:
                thread.start()
            await asked_for(first, 3)
            first.hang_up()
            second = await server.peer()
            for asked in await asked_for(second, 3):
                second.answer(asked)

        rt.call(script(), timeout=20)
        for thread in threads:
            thread.join(10)
        assert results == [bytes(512)] * 3
        io.call(client.close())
        rt.call(server.__aexit__())


@pytest.mark.parametrize("options", [
    {"reconnect_delay": -1}, {"reconnect_delay": float("nan")}, {"reconnect_delay": 1, "reply_timeout": 0},
    {"reconnect_delay": 1, "in_flight_max": 0}, {"reconnect_delay": 1, "open_timeout": -1},
])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ReconnectingClient("nbd://localhost", **options)  # type: ignore[arg-type]


@scripted
async def test_open_again(server: Scripted) -> None:
    """Nothing to do; and one that is cancelled while the connection is away changes nothing."""
    async with reconnecting(server) as client:
        peer = await server.peer()
        assert await client.open() is client
        await server.stop()
        peer.hang_up()
        await until(lambda: not client.connected)
        opening = asyncio.ensure_future(client.open())
        await turns()
        opening.cancel()
        await turns()
        await server.start()
        await do(await server.peer(), client.read(0, 512))
