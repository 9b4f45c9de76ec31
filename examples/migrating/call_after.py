"""docs/migrating.md: A thread asks a loop, after."""

import asyncio

import homeloop


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0.001)
    return a + b


with homeloop.Runtime() as rt:
    print(rt.call(add(1, 2), timeout=10))
