"""docs/migrating.md: Blocking functions, after."""

import zlib

import homeloop


async def main() -> None:
    print(await homeloop.to_worker(zlib.crc32, b"x" * 1_000_000))


homeloop.run(main())
