"""docs/migrating.md: Blocking functions, before."""

import asyncio
import zlib


async def main() -> None:
    print(await asyncio.to_thread(zlib.crc32, b"x" * 1_000_000))


asyncio.run(main())
