"""Programs of others: their success, what they say when they fail, their end when nobody waits any more."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from homeloop.cli.clients import FOREIGN, ForeignClient
from homeloop.core.runtime import run
from tests.cli.running import LIMIT_S


def program(folder: Path, script: str) -> ForeignClient:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return ForeignClient(name=str(path), package="x", options=("--option",))


async def copied(client: ForeignClient, target: Path) -> str | None:
    async with asyncio.timeout(LIMIT_S):
        return await client.copy("nbd://x", str(target))


def test_its_command_line(tmp_path: Path) -> None:
    """Options, the URI, the target; None for exit status 0, whatever was said on stderr."""
    target = tmp_path / "target"
    client = program(tmp_path, 'echo "$@" > "$3"; echo progress >&2')
    assert run(copied(client, target)) is None
    assert target.read_text() == f"--option nbd://x {target}\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [("exit 7", "exit status 7"), ("kill -9 $$", "exit status -9"), ("echo a >&2; echo b >&2; exit 1", "b")],
)
def test_its_failure(tmp_path: Path, script: str, said: str) -> None:
    """The last line that it said; its status if it said nothing."""
    assert run(copied(program(tmp_path, script), tmp_path / "target")) == said


def test_cancelled_it_is_killed(tmp_path: Path) -> None:
    """It has ended when the cancelled coroutine has."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    client = program(tmp_path, f"exec >{fifo}; echo here; exec sleep 1000")

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            copying = asyncio.create_task(client.copy("nbd://x", "y"))
            pipe = await asyncio.to_thread(open, fifo)
            with pipe:
                assert await asyncio.to_thread(pipe.readline) == "here\n"
                copying.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await copying
                assert await asyncio.to_thread(pipe.read) == ""

    run(main())


def test_who_is_known() -> None:
    assert [(client.name, client.pads_to) for client in FOREIGN] == [("nbdcopy", 1), ("qemu-img", 512)]
