"""docs/migrating.md: asgiref, before."""

import asyncio

from asgiref.sync import async_to_sync, sync_to_async


async def fetch(key: str) -> str:
    await asyncio.sleep(0.001)
    return key.upper()


def view() -> str:
    return async_to_sync(fetch)("answer")


async def main() -> None:
    print(await sync_to_async(view)())


asyncio.run(main())
