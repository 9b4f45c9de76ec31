"""docs/migrating.md: nest_asyncio, before."""

import asyncio

import nest_asyncio


async def fetch() -> str:
    await asyncio.sleep(0.001)
    return "fetched"


def callback() -> str:          # synchronous, called by a coroutine, wants the result of another one
    return asyncio.get_event_loop().run_until_complete(fetch())


async def main() -> None:
    print(callback())


nest_asyncio.apply()
asyncio.run(main())
