"""The kinds of nodes that test_commands.py does not go through."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.delay import Delay
from homeloop.core.runtime import run
from homeloop.daemon.kinds import KINDS
from homeloop.nbd.client import connect
from tests.block.test_http import DATA, Site
from tests.daemon.qmp.control import Failed, controlled


def test_an_image_on_a_web_server(tmp_path: Path) -> None:
    async def main(site: Site) -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            await client.run("blockdev-add", driver="http", node_name="web", url=site.url, timeout=30)
            path = tmp_path / "nbd"
            await client.run("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
            await client.run("block-export-add", type="nbd", id="e0", node_name="web", iothread="iothread-0")
            async with connect(f"nbd+unix:///web?socket={path}") as nbd:
                assert bytes(await nbd.read(512, 4096)) == DATA[512:4608]
            with pytest.raises(Failed, match="Cannot export read-only node as writable"):
                await client.run("block-export-add", type="nbd", id="e1", node_name="web", name="w", writable=True)
            for arguments, says in (
                ({"driver": "https", "url": site.url}, "https does not support the URL"),
                ({"driver": "http", "url": f"{site.url}", "timeout": 0}, "'timeout' expects"),
                ({"driver": "http", "url": "http://127.0.0.1:1/x"}, "cannot open http://127.0.0.1:1/x"),
                ({"driver": "http"}, "Parameter 'url' is missing"),
            ):
                with pytest.raises(Failed, match=says):
                    await client.run("blockdev-add", node_name="other", **arguments)    # type: ignore[arg-type]

    site = Site()
    serving = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        run(main(site))
    finally:
        site.shutdown()
        site.server_close()
        serving.join()


def test_null_co_with_latency(tmp_path: Path) -> None:
    """A filter, so that it costs no thread; none at all where nobody asks for it."""
    nowhere: Any = None
    made: Any = KINDS["null-co"].make({"latency-ns": 2_000_000, "size": 1 << 20}, {}, nowhere)
    assert isinstance(made, Delay)
    assert made._seconds["read"] == made._seconds["flush"] == 0.002
    assert not isinstance(KINDS["null-co"].make({"size": 1 << 20}, {}, nowhere), Delay)

    async def main() -> None:
        device = Device(made)
        assert bytes(await device.read(0, 512)) == bytes(512)       # type: ignore[misc]
        await device.close()
        async with controlled(tmp_path) as (daemon, _monitors, client):
            await client.run("blockdev-add", driver="null-co", node_name="n", latency_ns=1_000_000)
            assert daemon.nodes["n"].device.size == 1 << 30
            with pytest.raises(Failed, match="'latency-ns' expects"):
                await client.run("blockdev-add", driver="null-co", node_name="m", latency_ns=-1)

    run(main())
