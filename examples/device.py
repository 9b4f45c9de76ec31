"""A block device in a few lines, read by a program that knows nothing of Python."""

import subprocess

import homeloop
from homeloop import nbd


class Numbered:
    """Every sector of 512 bytes says its own number."""

    size = 1 << 20
    block_size_min = 512                        # requests are checked before they come here
    thread_model = "inline"                     # never waits: answered without a task, without a thread

    def read(self, offset: int, length: int) -> bytes:
        sectors = range(offset // 512, (offset + length) // 512)
        return b"".join(b"sector %-504d\n" % number for number in sectors)


async def main() -> None:
    async with nbd.serve(Numbered()) as uri:    # at home in an IOThread of its own
        copy = await homeloop.to_worker(subprocess.check_output, ["nbdcopy", uri, "-"])
    print(len(copy), "bytes, the last of them", copy[-512:].split())


homeloop.run(main())
