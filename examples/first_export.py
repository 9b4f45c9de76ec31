"""One IOThread, one export: what docs/index.md goes through."""

import threading

import homeloop
from homeloop import nbd


class Clock:
    """One sector, which says how often it was read, and by which thread."""

    size = 512
    thread_model = "inline"                     # read() never waits

    def __init__(self) -> None:
        self.reads = 0                          # no lock: one thread runs the code of a context

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        text = f"read {self.reads} in {threading.current_thread().name}\n"
        return text.encode().ljust(512, b"\0")[offset : offset + length]


async def look(uri: str) -> str:
    async with nbd.connect(uri) as client:
        return bytes(await client.read(0, 512)).split(b"\n")[0].decode()


async def main() -> None:
    with homeloop.IOThread("disk") as disk, homeloop.IOThread("net") as net:
        async with nbd.serve(Clock(), iothread=disk) as uri:
            print(await look(uri))              # from the main context
            print(await net.run(look(uri)))     # from another IOThread

            def thread() -> str:
                return homeloop.main_context().call(look(uri))

            print(await homeloop.to_worker(thread))         # and from a plain thread


homeloop.run(main())
