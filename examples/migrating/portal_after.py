"""docs/migrating.md: anyio's blocking portal, after."""

import anyio

import homeloop


async def add(a: int, b: int) -> int:
    await anyio.sleep(0.001)                    # anyio's functions work in it as they did
    return a + b


with homeloop.Runtime() as rt:
    print(rt.call(add(1, 2)))
    co = rt.main.spawn(add(3, 4))
    print(co.result())
