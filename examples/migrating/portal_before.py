"""docs/migrating.md: anyio's blocking portal, before."""

import anyio
from anyio.from_thread import start_blocking_portal


async def add(a: int, b: int) -> int:
    await anyio.sleep(0.001)
    return a + b


with start_blocking_portal() as portal:
    print(portal.call(add, 1, 2))
    future = portal.start_task_soon(add, 3, 4)
    print(future.result())
