"""`homeloop ps` finds what runs, says what it does, and clears up after what died."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from homeloop.cli.main import main
from homeloop.cli.ps import text_of
from homeloop.core.runtime import run
from homeloop.nbd.client import connect
from tests.cli.running import Running, environment


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "homeloop"


def test_a_daemon_with_a_client(
    start: Callable[..., Running], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = start("serve", "memory:1M", "--control", str(tmp_path / "c"), env=environment())
    uri = running.uri()
    running.wait_for("Ctrl-C ends it")

    async def with_a_client() -> None:
        async with connect(uri) as client:
            await client.read(0, 512)
            assert main(["ps", "--json"]) == 0
            (shown,) = json.loads(capsys.readouterr().out)
            assert shown["pid"] == running.process.pid
            assert {context["name"] for context in shown["contexts"]} >= {"iothread-0"}
            (export,) = shown["exports"]
            assert (export["name"], export["size"], len(export["connections"])) == ("memory", 1 << 20, 1)
            assert main(["ps"]) == 0
            said = capsys.readouterr().out
            assert "export 'memory' of node memory, 1.0 MiB, at home in iothread-0" in said
            assert "1 request, 0 in flight" in said
            assert "no TLS, extended replies" in said
            assert "main context" in said

    run(with_a_client())
    assert running.end() == 0


def test_nobody_there(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(own_folder / "1.sock"))
    assert main(["ps"]) == 0
    assert "no program answers" in capsys.readouterr().out
    assert list(own_folder.iterdir()) == []
    assert main(["ps", str(own_folder / "none")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_picture_that_is_torn() -> None:
    assert text_of({"error": "x"}) == "?  \n  could not be shown in full: x"
