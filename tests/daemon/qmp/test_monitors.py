"""The control socket: several clients, each in its own order; slow, dead and hostile ones disturb nobody."""

from __future__ import annotations

import asyncio
import json
import os
import random
import stat
from pathlib import Path

import pytest

from homeloop.core.runtime import run
from homeloop.daemon.qmp import commands, monitors
from homeloop.testing.leaks import leak_check
from tests.daemon.qmp.control import LIMIT_S, connect, controlled


def test_the_socket_is_for_its_user_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled(tmp_path):
            assert stat.S_IMODE((tmp_path / "control").stat().st_mode) == 0o600
        assert not (tmp_path / "control").exists()

    before = os.umask(0o022)
    run(main())
    assert os.umask(before) == 0o022


def test_commands_of_one_client_are_answered_in_order(tmp_path: Path) -> None:
    """All sent at once, also in the middle of each other's packets; ids tell."""
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            text = "".join(json.dumps({"execute": "query-version", "id": number}) for number in range(50))
            half = len(text) // 2 + 3
            client.send(text[:half])
            await client.writer.drain()
            first = await client.answer()
            client.send(text[half:])
            answers = [first, *[await client.answer() for _ in range(49)]]
            assert [answer["id"] for answer in answers] == list(range(50))

    run(main())


def test_clients_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that takes its time holds up its own client's next one, and no other client's."""
    go = asyncio.Event()

    async def slow(_daemon: object, _arguments: object) -> object:
        await go.wait()
        return "slow"

    monkeypatch.setitem(commands.COMMANDS, "slow", commands._Entry(commands.ANY, slow))

    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            client.send('{"execute":"slow"}{"execute":"query-version"}')
            other = await connect(tmp_path / "control")
            assert "qemu" in await other.run("query-version")
            go.set()
            assert await client.answer() == {"return": "slow"}
            assert "qemu" in (await client.answer())["return"]
            await other.close()

    run(main())


def test_events_are_for_all_who_have_negotiated(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            other = await connect(tmp_path / "control")
            new = await connect(tmp_path / "control", negotiate=False)
            daemon.emit("NEWS", {"number": 1})
            for one in (client, other):
                event = await one.line()
                assert (event["event"], event["data"]) == ("NEWS", {"number": 1})
            assert await new.run("qmp_capabilities") == {}
            assert new.events == []
            await other.close()
            await new.close()

    run(main())


def test_a_client_that_does_not_read_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitors, "UNSENT_BYTES_MAX", 100_000)

    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            slow = await connect(tmp_path / "control")
            slow.reader._transport.pause_reading()      # type: ignore[attr-defined]
            async with asyncio.timeout(LIMIT_S):
                while "does not read" not in caplog.text:
                    daemon.emit("NEWS", {"text": "x" * 10_000})
                    assert (await client.line())["event"] == "NEWS"
            assert "qemu" in await client.run("query-version")
            slow.writer.transport.abort()

    run(main())


def test_hostile_bytes(tmp_path: Path, seed: int) -> None:
    """Garbage, deep nesting, a value without end, a client that goes in the middle: the others notice nothing."""
    chance = random.Random(seed)
    hostile = [
        b"\x00\xff\x01" * 100, b"[" * 100_000, b'{"a":"' + b"x" * (2 << 20), b"}" * 5000, b'{"execute":',
        bytes(chance.randrange(256) for _ in range(5000)), b'{"execute":"query-version"}' * 100,
    ]

    async def one(data: bytes) -> None:
        client = await connect(tmp_path / "control", negotiate=chance.random() < 0.5)
        client.send(data)
        if chance.random() < 0.5:
            client.writer.write_eof()
            while await client.reader.read(65536):
                pass
        client.writer.transport.abort()

    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, owner, client):
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*(one(data) for data in hostile * 2), return_exceptions=True)
                assert "qemu" in await client.run("query-version")
                while len(owner._monitors) > 1:     # noqa: ASYNC110 - of states that no event announces
                    await asyncio.sleep(0)

    with leak_check():
        run(main())


def test_a_command_that_fails_by_our_mistake_is_an_error_of_that_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_daemon: object, _arguments: object) -> object:
        raise KeyError("ours")

    monkeypatch.setitem(commands.COMMANDS, "broken", commands._Entry(commands.ANY, broken))

    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            client.send('{"execute":"broken","id":7}{"execute":"query-version","id":8}')
            failed = await client.answer()
            assert failed["id"] == 7
            assert failed["error"]["desc"] == "Internal error: KeyError: 'ours'"
            assert (await client.answer())["id"] == 8

    run(main())
    assert "broken failed by a mistake of ours" in caplog.text


def test_quit_answers_then_ends(tmp_path: Path) -> None:
    """Nothing behind it is run; a quit with wrong arguments is none."""
    async def main() -> None:
        quits: list[int] = []
        async with controlled(tmp_path) as (_daemon, owner, client):
            owner.on_quit = lambda: quits.append(1)
            client.send('{"execute":"quit","arguments":{"x":1}}{"execute":"quit"}{"execute":"query-version"}')
            assert "unexpected" in (await client.answer())["error"]["desc"]
            assert await client.answer() == {"return": {}}
            with pytest.raises(EOFError):
                await client.answer()
        assert quits == [1]

    run(main())


def test_close_lets_a_command_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its answer reaches the client before the socket is closed."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(_daemon: object, _arguments: object) -> object:
        begun.set()
        await go.wait()
        return "done"

    monkeypatch.setitem(commands.COMMANDS, "slow", commands._Entry(commands.ANY, slow))

    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, owner, client):
            client.send('{"execute":"slow"}')
            await begun.wait()
            closing = asyncio.ensure_future(owner.close())
            await asyncio.sleep(0)
            go.set()
            assert await client.answer() == {"return": "done"}
            await closing

    run(main())


def test_too_many_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "MONITORS_MAX", 2)

    async def main() -> None:
        async with controlled(tmp_path):
            second = await connect(tmp_path / "control")
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "control"))
            assert await reader.read() == b""
            writer.close()
            await second.close()

    run(main())


def test_two_daemons_cannot_share_a_path(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, _client):
            with pytest.raises(OSError, match="another server listens"):
                monitors.Monitors(daemon, str(tmp_path / "control"))

    run(main())


