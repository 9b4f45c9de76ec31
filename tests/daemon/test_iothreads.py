"""IOThreads as objects: what can be set, and what comes of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from homeloop.core.runtime import run
from tests.daemon.qmp.control import Failed, controlled


def test_iothread_properties(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            await client.run("object-add", qom_type="iothread", id="io0", poll_max_ns=5000, thread_pool_max=3)
            shown = {thread["id"]: thread for thread in await client.run("query-iothreads")}
            assert shown["io0"]["poll-max-ns"] == 5000
            assert shown["io0"]["thread-id"] in {thread.native_id for thread in threading.enumerate()}
            await client.run("qom-set", path="/objects/io0", property="poll-max-ns", value=7000)
            assert await client.run("qom-get", path="io0", property="poll-max-ns") == 7000
            polling = daemon.objects["io0"].context.statistics().polling
            assert polling is not None
            assert polling.maximum_ns == 7000
            await client.run("qom-set", path="io0", property="thread-pool-max", value=7)
            assert await client.run("qom-get", path="io0", property="thread-pool-max") == 7
            context = daemon.objects["io0"].context

            async def limit() -> int:
                return context.pool().maximum

            assert await context.run(limit()) == 7
            with pytest.raises(Failed, match="bad thread-pool-min/thread-pool-max values"):
                await client.run("qom-set", path="io0", property="thread-pool-min", value=8)
            assert await client.run("qom-get", path="io0", property="thread-pool-min") == 0
            with pytest.raises(Failed, match="not writable"):
                await client.run("qom-set", path="io0", property="aio-max-batch", value=7)

    run(main())
