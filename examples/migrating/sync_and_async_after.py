"""docs/migrating.md: asgiref, after."""

import asyncio

import homeloop


async def fetch(key: str) -> str:
    await asyncio.sleep(0.001)
    return key.upper()


def view() -> str:
    return homeloop.main_context().call(fetch("answer"))


async def main() -> None:
    print(await homeloop.to_worker(view))


homeloop.run(main())
