"""docs/migrating.md: nest_asyncio, after."""

import asyncio

import homeloop


async def fetch() -> str:
    await asyncio.sleep(0.001)
    return "fetched"


def callback() -> str:          # synchronous, called by a coroutine, wants the result of another one
    return homeloop.main_context().call(fetch())


async def main() -> None:
    print(callback())


homeloop.run(main())
