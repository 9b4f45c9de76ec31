"""A device with a class for its own bytes: an error for one request, a quick path, holes that clients see."""

import asyncio
import errno

import homeloop
from homeloop import block, nbd
from homeloop.errors import BlockError


class Sheet:
    """1 MiB in blocks of 4 KiB that take their time to load; what was loaded once is answered at once."""

    size = 1 << 20
    block_size_min = 4096                       # clients ask for whole blocks

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken                    # the block that cannot be read
        self.loaded: dict[int, bytes] = {}

    async def read(self, offset: int, length: int) -> bytes:
        blocks = range(offset // 4096, (offset + length) // 4096)
        for number in blocks:
            if number not in self.loaded:
                await asyncio.sleep(0.001)      # as if it came from far away
                if number == self.broken:
                    raise OSError(errno.EIO, f"block {number} is broken")
                self.loaded[number] = bytes([number]) * 4096
        return b"".join(self.loaded[number] for number in blocks)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return self.loaded.get(offset // 4096) if length == 4096 else None      # None: ask read()

    def extents(self, offset: int, length: int) -> list[tuple[int, bool, bool]]:
        return [(length, False, offset == 0 and length == 4096)]    # (length, hole, zero)


async def main() -> None:
    device = block.Device(Sheet(broken=3))
    async with nbd.serve(device) as uri, await nbd.connect(uri) as client:
        print("block 2 begins with", (await client.read(2 * 4096, 4096))[0])
        try:
            await client.read(3 * 4096, 4096)
        except BlockError as error:
            print("block 3:", error)
        await client.read(2 * 4096, 4096)       # this one is answered by read_nowait()
    counts = device.statistics()
    print(counts.reads, "reads,", counts.errors, "failed,", counts.waited, "had to wait")


homeloop.run(main())
