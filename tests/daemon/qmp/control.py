"""A daemon with a control socket inside a test, and a client that says exactly what the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from homeloop.daemon.exporting import Daemon
from homeloop.daemon.qmp.monitors import Monitors

LIMIT_S = 20.0


class Failed(Exception):
    """A command's error."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error["desc"])
        self.kind = error["class"]


class Client:
    """One client; events that come while it waits for an answer are kept in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.events: list[dict[str, Any]] = []

    async def line(self) -> Any:
        async with asyncio.timeout(LIMIT_S):
            line = await self.reader.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    async def answer(self) -> Any:
        """The next line that is no event."""
        while "event" in (found := await self.line()):
            self.events.append(found)
        return found

    def send(self, text: str | bytes) -> None:
        self.writer.write(text.encode() if isinstance(text, str) else text)

    async def run(self, name: str, /, **arguments: Any) -> Any:
        """Run a command: its result, or Failed. node_name stands for node-name."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.send(json.dumps({"execute": name, "arguments": named}))
        found = await self.answer()
        if "error" in found:
            raise Failed(found["error"])
        return found["return"]

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def connect(path: Path, *, negotiate: bool = True) -> Client:
    """A client that has read the greeting, and negotiated if wanted."""
    client = Client(*await asyncio.open_unix_connection(str(path)))
    assert "QMP" in await client.line()
    if negotiate:
        assert await client.run("qmp_capabilities") == {}
    return client


@asynccontextmanager
async def controlled(tmp_path: Path) -> AsyncIterator[tuple[Daemon, Monitors, Client]]:
    """A daemon, its monitors, and a client."""
    path = tmp_path / "control"
    async with Daemon() as daemon:
        monitors = Monitors(daemon, str(path))
        client = await connect(path)
        try:
            yield daemon, monitors, client
        finally:
            await client.close()
            await monitors.close()
