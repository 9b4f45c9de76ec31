"""Bytes from hell at a server that runs: each client gets a clean end, and the next one is served.

Sessions are made of what clients say, then spoiled: bits flipped, parts cut out, doubled, swapped, lengths made huge;
sent in random pieces, and with an end at any byte. One second here; HOMELOOP_FUZZ_S=600 for ten minutes of it, and
HOMELOOP_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import struct
import time
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import run
from homeloop.errors import HomeloopError
from homeloop.nbd.client import connect
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.limits import ConnectionLimits
from homeloop.nbd.server import Server, ServerLimits
from homeloop.nbd.tls import TlsSocket, Wire, receive, send_all
from tests.nbd import wire
from tests.nbd.certificates import Certificates
from tests.nbd.talking import LIMIT_S, until

SIZE = 1 << 20
FUZZ_S = float(os.environ.get("HOMELOOP_FUZZ_S") or 1.0)
NUMBERS = [0, 1, 511, 512, 4096, SIZE - 1, SIZE, SIZE + 1, 1 << 25, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]


class Later(Memory):
    """Some requests wait."""

    async def read(self, offset: int, length: int) -> object:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().read(offset, length)


def options(dice: random.Random) -> list[bytes]:
    """What may be said before GO."""
    names = ["inline", "later", "", "none"]
    many = [
        wire.option(wire.STRUCTURED), wire.option(wire.EXT), wire.option(wire.LIST),
        wire.meta(wire.SET_META, dice.choice(names), ("base:allocation",)),
        wire.meta(wire.LIST_META, dice.choice(names), ("base:", "x:y")),
        wire.info(wire.INFO, dice.choice(names), (0, 1, 2, 3)),
        wire.option(dice.randrange(1 << 32), dice.randbytes(dice.randrange(50))),
        wire.option(wire.STARTTLS),
    ]
    return dice.sample(many, dice.randrange(len(many)))


def requests(dice: random.Random, extended: bool) -> list[bytes]:
    made = []
    for cookie in range(dice.randrange(30)):
        command, flags = dice.randrange(10), dice.choice([0, 0, 0, dice.randrange(64), dice.randrange(1 << 16)])
        offset, length = dice.choice(NUMBERS), dice.choice(NUMBERS)
        payload = dice.randbytes(dice.choice([0, 1, 8, 12, 512, 40_000]))
        if extended:
            if command == wire.WRITE or flags & wire.PAYLOAD_LEN:
                made.append(wire.ext_request(command, cookie, offset, 0, flags, payload))
            else:
                made.append(wire.ext_request(command, cookie, offset, length, flags))
        elif command == wire.WRITE:
            made.append(wire.write(cookie, offset % SIZE, payload, flags & 0xFFFF))
        else:
            made.append(wire.request(command, cookie, offset, length & 0xFFFFFFFF, flags))
    return made


def spoil(dice: random.Random, data: bytearray) -> None:
    """Do one thing to the bytes that nobody should do."""
    if not data:
        return
    at = dice.randrange(len(data))
    match dice.randrange(7):
        case 0:
            data[at] ^= 1 << dice.randrange(8)
        case 1:
            del data[at:at + dice.randrange(1, 40)]
        case 2:
            data[at:at] = data[at:at + dice.randrange(1, 200)]
        case 3:
            data[at:at] = dice.randbytes(dice.randrange(1, 40))
        case 4:
            data[at:at + 4] = struct.pack(">I", dice.choice(NUMBERS) & 0xFFFFFFFF)
        case 5:
            data[at:at + 8] = struct.pack(">Q", dice.choice(NUMBERS))
        case 6:
            del data[at:]


def session(dice: random.Random) -> bytes:
    """What one client says."""
    said = [wire.client_flags(dice.choice([3, 3, 3, 1, 0, 7])), *options(dice)]
    extended = wire.option(wire.EXT) in said
    said.append(wire.info(wire.GO, dice.choice(["inline", "later"])))
    said += requests(dice, extended)
    data = bytearray(b"".join(said))
    for _ in range(dice.choice([0, 1, 1, 2, 10])):
        spoil(dice, data)
    return bytes(data)


async def talk(where: Path, dice: random.Random, tls: TlsCredentials | None) -> int:
    """Be one client, to the end of the connection; how many bytes the server has said to it."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    end: Wire = sock
    try:
        await loop.sock_connect(sock, str(where))
        if tls is not None and dice.random() < 0.7:
            await loop.sock_sendall(sock, wire.client_flags() + wire.option(wire.STARTTLS))
            await loop.sock_recv(sock, 38)
            if dice.random() < 0.8:
                end = secure = TlsSocket(sock, tls.client_context(check_hostname=False), server_side=False)
                await secure.handshake(loop)
        data = session(dice)
        if end is not sock:
            data = data[4:]     # the flags have been said
        return await _exchange(end, sock, data, dice)
    except (OSError, HomeloopError):
        return 0        # the server has ended it
    finally:
        end.close()


async def _exchange(end: Wire, sock: socket.socket, data: bytes, dice: random.Random) -> int:
    loop = asyncio.get_running_loop()

    async def say() -> None:
        left = data
        with contextlib.suppress(OSError):
            while left:
                size = dice.choice([1, 7, 28, 1000, 1 << 20])
                await send_all(loop, end, left[:size])
                left = left[size:]
            sock.shutdown(socket.SHUT_WR)       # an end at any byte

    saying = loop.create_task(say())
    heard = 0
    try:
        while part := await receive(loop, end, 1 << 16):
            heard += len(part)
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)
    return heard


@pytest.mark.foreign("openssl")
@pytest.mark.timeout(60 + 3 * FUZZ_S)
@pytest.mark.parametrize("with_tls", [False, True])
def test_any_bytes_give_a_clean_end(
    certificates: Certificates, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture, with_tls: bool
) -> None:
    """F5, O8, Z9: whatever comes, the server says what it has to say, or hangs up; and serves the next one."""
    dice = random.Random(seed)
    server_tls = TlsCredentials.for_server(certificates.all) if with_tls else None
    client_tls = TlsCredentials.for_client(certificates.all) if with_tls else None
    limits = ServerLimits(handshake_s=LIMIT_S, connection=ConnectionLimits(linger_s=1.0))
    caplog.set_level(logging.ERROR, "homeloop")     # no line for each of thousands
    sessions = heard = 0

    async def main() -> None:
        nonlocal sessions, heard
        with IOThread("fuzz") as io:
            server = Server(AioContext.of(), limits=limits, tls=server_tls, tls_required=False)
            mistakes: list[str] = []
            catch = _Catch(mistakes)
            logging.getLogger().addHandler(catch)
            try:
                await server.add_export("inline", Device(Memory(SIZE)), io.context)
                await server.add_export("later", Device(Later(SIZE)), io.context)
                uri = await server.listen(tmp_path / "s", export="inline")
                until_s = time.monotonic() + FUZZ_S / 2
                while time.monotonic() < until_s or sessions < 20:
                    async with asyncio.timeout(LIMIT_S):
                        heard += sum(await asyncio.gather(*(talk(tmp_path / "s", dice, client_tls) for _ in range(4))))
                    sessions += 4
                async with asyncio.timeout(LIMIT_S):
                    async with connect(uri, tls=client_tls) as client:
                        await client.write(0, b"still here")
                        assert await client.read(0, 10) == b"still here"
                    await until(lambda: not server.statistics().connections)
                    await until(lambda: not server.statistics().handshakes)
            finally:
                logging.getLogger().removeHandler(catch)
                await server.close()
            assert not mistakes, mistakes[0]

    run(main())
    print(f"{sessions} sessions, {heard} bytes of answers")
    assert heard > 18 * sessions / 2        # some got further than the greeting


class _Catch(logging.Handler):
    """Keeps what the server says is its own mistake."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._mistakes = mistakes

    def emit(self, record: logging.LogRecord) -> None:
        self._mistakes.append(self.format(record))
