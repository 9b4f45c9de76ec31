"""The client against servers that break the protocol in every way: who waits is told, nothing hangs, nothing leaks in.

Each answer is to the same three requests: a READ of 1 MiB at 4096 (cookie 1), a READ of 512 bytes at 0 (cookie 2), and
a BLOCK_STATUS (cookie 3).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import pytest

from homeloop.errors import BlockError, ConnectionLost, PeerError
from homeloop.nbd.client import Client
from homeloop.nbd.client_handshake import ServerInfo
from homeloop.nbd.protocol import TransmissionFlag
from tests.nbd import wire
from tests.nbd.talking import soon, turns

SIZE = 4 << 20
LARGE, AT = 1 << 20, 4096
CONTEXT = 7
INFO = ServerInfo(name="", size=SIZE, flags=TransmissionFlag.HAS_FLAGS, structured=True, allocation_id=CONTEXT)
FILL = bytes(LARGE)


def status(context: int, *extents: tuple[int, int]) -> bytes:
    return struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)


BROKEN: dict[str, bytes] = {
    "no magic": b"\0" * 20,
    "a request's magic": wire.request(wire.READ, 1),
    "half of a magic, then the end": b"\x66\x8e",
    "the end in a header": wire.data_chunk(2, 0, bytes(512))[:19],
    "the end in a small payload": wire.data_chunk(2, 0, bytes(512))[:100],
    "the end in a large payload": wire.data_chunk(1, AT, FILL)[:500_000],
    "the end with all unanswered": b"",
    "a cookie that was not asked": wire.data_chunk(4, 0, bytes(512)),
    "a cookie twice": wire.data_chunk(2, 0, bytes(512)) * 2,
    "a simple reply to a READ": wire.simple_reply(2, 0, bytes(512)),
    "a simple reply to a BLOCK_STATUS": wire.simple_reply(3),
    "a simple reply to nobody": wire.simple_reply(99),
    "data before the request": wire.data_chunk(1, AT - 512, bytes(512)),
    "data behind the request": wire.data_chunk(1, AT + LARGE, bytes(512)),
    "data over the request's end": wire.data_chunk(1, AT + LARGE - 100, bytes(512)),
    "data at an offset that wraps": wire.data_chunk(1, (1 << 64) - 1, bytes(512)),
    "more data than asked": wire.data_chunk(2, 0, bytes(513)),
    "4 GiB of data in the header": struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 2, 0xFFFFFFFF, 0),
    "an empty data chunk": wire.data_chunk(2, 0, b""),
    "a data chunk without room for its offset": wire.chunk(2, 1, b"1234567"),
    "data twice": wire.data_chunk(1, AT, FILL[:8192], 0) + wire.data_chunk(1, AT + 4096, FILL[:8192], 0),
    "large data twice": wire.data_chunk(1, AT, FILL[:LARGE // 2], 0) + wire.data_chunk(1, AT, FILL[:LARGE // 2], 0),
    "a hole over data": wire.data_chunk(2, 0, bytes(512), 0) + wire.hole_chunk(2, 100, 12),
    "a hole behind the request": wire.hole_chunk(2, 0, 1024),
    "a hole of nothing": wire.hole_chunk(2, 0, 0),
    "a hole chunk of another length": wire.chunk(2, 2, bytes(13)),
    "done, with a part missing": wire.data_chunk(1, AT, FILL[:4096]),
    "done, with nothing told": wire.chunk(2, 0),
    "NONE that is not the last": wire.chunk(2, 0, flags=0),
    "NONE with a payload": wire.chunk(2, 0, b"x"),
    "an unknown chunk type": wire.chunk(2, 3, bytes(8)),
    "an unknown chunk type, large": struct.pack(">IHHQI", 0x668E33EF, 1, 77, 2, 0x7FFFFFFF),
    "extents for a READ": wire.chunk(2, 5, status(CONTEXT, (512, 0))),
    "data for a BLOCK_STATUS": wire.data_chunk(3, 0, bytes(512)),
    "a hole for a BLOCK_STATUS": wire.hole_chunk(3, 0, 512),
    "extents of another context": wire.chunk(3, 5, status(CONTEXT + 1, (512, 0))),
    "extents twice": wire.chunk(3, 5, status(CONTEXT, (512, 0)), 0) + wire.chunk(3, 5, status(CONTEXT, (512, 0))),
    "no extent": wire.chunk(3, 5, status(CONTEXT)),
    "half an extent": wire.chunk(3, 5, status(CONTEXT, (512, 0)) + b"1234"),
    "an extent of no bytes": wire.chunk(3, 5, status(CONTEXT, (0, 0))),
    "2^29 extents in the header": struct.pack(">IHHQI", 0x668E33EF, 1, 5, 3, 0xFFFFFFFC),
    "BLOCK_STATUS done without extents": wire.chunk(3, 0),
    "an error chunk too short": wire.chunk(2, 32769, b"12345"),
    "an error text longer than its chunk": wire.chunk(2, 32769, struct.pack(">IH", 5, 100) + b"x"),
    "an error text of 64 KiB": wire.error_chunk(2, 5, b"x" * 65535),
    "an extended reply": struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, 2, 0, 0),
}


async def against(said: bytes) -> list[Any]:
    """What the three requests end with when the server says this and hangs up."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    client = Client(ours, INFO, b"")
    loop = asyncio.get_running_loop()
    with theirs:
        asking = asyncio.gather(
            client.read(AT, LARGE), client.read(0, 512), client.extents(0, SIZE), return_exceptions=True)
        await turns()
        assert len(await loop.sock_recv(theirs, 1 << 16)) == 3 * 28
        for at in range(0, len(said), 50_000):          # more than the socket takes at once
            try:
                await soon(loop.sock_sendall(theirs, said[at:at + 50_000]))
            except (BrokenPipeError, ConnectionResetError):
                break                                   # it has heard enough
        if client.failure is None:
            theirs.shutdown(socket.SHUT_WR)
        results = await soon(asking)
    with pytest.raises(PeerError):
        await soon(client.read(0, 512))
    await soon(client.close())
    return list(results)


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    results = asyncio.run(against(BROKEN[name]))
    failed = [result for result in results if isinstance(result, PeerError)]
    # The first of "twice" may be a whole reply; nobody else gets an answer.
    answered = [result for result in results if not isinstance(result, Exception)]
    assert len(failed) >= 2, results
    assert all(result in (bytes(512), [(512, False, False)]) for result in answered), results
    assert all("unanswered" in name or str(error) for error in failed)
    gone = any(isinstance(error, ConnectionLost) for error in failed)
    assert gone == ("the end" in name), failed


def test_unknown_errors_are_survived() -> None:
    """R12, X12: an unknown type of the error kind, a number that is none, a text that is no text; and a good reply."""
    said = (
        wire.chunk(2, 32768 + 99, struct.pack(">IH", 4711, 3) + b"\xff\xfe\xfd" + b"more of it")
        + wire.error_chunk(1, 0, b"") + wire.chunk(3, 5, status(CONTEXT, (512, 3), (1 << 31, 0xFFFFFFFC)))
    )
    large, small, extents = asyncio.run(against(said))
    assert isinstance(large, BlockError)
    assert isinstance(small, BlockError)
    assert extents == [(512, True, True), (SIZE - 512, False, False)]


@pytest.mark.parametrize("step", [1, 7, 20, 29, 4096])
def test_pieces_of_any_size(step: int) -> None:
    """A READ in chunks out of order, others between them, however the bytes come."""
    said = (
        wire.data_chunk(1, AT + LARGE // 2, b"b" * 1000, 0) + wire.chunk(3, 5, status(CONTEXT, (512, 0)), 0)
        + wire.hole_chunk(1, AT, LARGE // 2, 0) + wire.data_chunk(2, 0, b"s" * 512) + wire.chunk(3, 0)
        + wire.hole_chunk(1, AT + LARGE // 2 + 1000, LARGE // 2 - 1000)
    )

    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        client = Client(ours, INFO, b"")
        with theirs:
            asking = asyncio.gather(client.read(AT, LARGE), client.read(0, 512), client.extents(0, SIZE))
            await turns()
            for at in range(0, len(said), step):
                await asyncio.get_running_loop().sock_sendall(theirs, said[at:at + step])
                await asyncio.sleep(0)
            large, small, extents = await soon(asking)
            assert large == bytes(LARGE // 2) + b"b" * 1000 + bytes(LARGE // 2 - 1000)
            assert (small, extents) == (b"s" * 512, [(512, False, False)])
            await soon(client.close())

    asyncio.run(main())
