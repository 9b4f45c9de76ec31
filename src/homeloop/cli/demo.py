"""`homeloop demo`: an image, an IOThread, real clients, and plain threads that join in under the big lock."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable

from homeloop.block.driver import BytesLike
from homeloop.cli.words import amount, clear_line, status_line, table
from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine, current_coroutine, park
from homeloop.core.current import current_context
from homeloop.core.iothread import IOThread
from homeloop.core.registry import big_lock
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.daemon.exporting import Daemon, ExportConfig, ListenConfig
from homeloop.errors import HomeloopError
from homeloop.nbd.client import Client, connect

__all__ = ["demo"]

IMAGE_BYTES = 64 << 20
PIECE_BYTES = 256 << 10         # of a read of the copy
IN_FLIGHT = 16                  # reads of the copy
READERS = 3                     # plain threads
BLOCK_BYTES = 4096              # of a read of theirs
BLOCKS_MIN = 100                # that each of them reads, however fast the copy is


def demo(options: argparse.Namespace) -> int:
    """Run the demo; return the exit status: 0 if every hash was right."""
    with tempfile.TemporaryDirectory(prefix="homeloop-demo-") as folder:
        image = options.image
        if image is None:
            image = os.path.join(folder, "demo.img")
            make_image(image)
            print(f"made an image of {amount(IMAGE_BYTES)}, half of it holes")
        return 0 if run(_demo(image, folder)) else 1


def make_image(path: str) -> None:
    """Write an image with data and holes, the same each time."""
    chunk = 1 << 20
    source = random.Random(7)
    with open(path, "wb") as file:
        for start in range(0, IMAGE_BYTES, 2 * chunk):
            file.seek(start)
            file.write(source.randbytes(chunk))
        file.truncate(IMAGE_BYTES)


def hash_file(path: str) -> str:
    """SHA-256 of a file. Blocks: for a worker."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(slots=True)
class _Shared:
    """Loop-bound: touched on the main context only, by whichever thread is its home just then."""

    readers: int = 0            # plain threads that are done
    blocks: int = 0             # blocks that they have read
    wrong: int = 0              # ... that differed from the image
    threads: set[str] = dataclasses.field(default_factory=set)


class _Demo:
    """One run. Methods that are coroutines: of the main context."""

    def __init__(self, image: str, folder: str, daemon: Daemon, iothread: IOThread, client: Client) -> None:
        self._image = image
        self._folder = folder
        self._daemon = daemon
        self._iothread = iothread
        self._client = client
        self._main = AioContext.of()
        self._shared = _Shared()
        self._stop = threading.Event()
        self.rates: list[tuple[str, float]] = []        # what copied, bytes a second

    async def run(self) -> bool:
        """Everything; True if all hashes are right."""
        expected = await to_worker(hash_file, self._image)
        tally = self._main.spawn(self._tally(), name="tally")
        threads = [threading.Thread(target=self._read_blocks, args=(n, tally), name=f"plain-{n}")
                   for n in range(READERS)]
        for thread in threads:
            thread.start()
        try:
            hashes = {"client of this process": await self._copy_out()}
        finally:
            self._stop.set()
            await tally                 # a plain thread's last wake ends it
            for thread in threads:
                await to_worker(thread.join)
        hashes["coroutine in " + self._iothread.name] = await self._iothread.run(self._hash_at_home())
        for name, arguments in self._foreign_clients().items():
            copied = await self._foreign_copy(name, arguments)
            if copied is not None:
                hashes[name] = copied
        return self._report(expected, hashes)

    async def _copy_out(self) -> str:
        """Read the whole export through the client, many reads in flight; return the hash."""
        size = self._client.size
        digest = hashlib.sha256()
        started = time.monotonic()
        reads: list[asyncio.Task[BytesLike]] = []
        begun = done = 0
        while done < size:
            while begun < size and len(reads) < IN_FLIGHT:
                length = min(PIECE_BYTES, size - begun)
                reads.append(asyncio.create_task(self._client.read(begun, length)))
                begun += length
            data = await reads.pop(0)
            digest.update(data)
            done += len(data)
            status_line(f"copying out: {done * 100 // size:3d} %   {self._shared.blocks} blocks read by plain threads")
        clear_line()
        self.rates.append(("client of this process", size / (time.monotonic() - started)))
        return digest.hexdigest()

    def _read_blocks(self, number: int, tally: Coroutine[None]) -> None:
        """A plain thread: synchronous code that uses the main context's client, and wakes a coroutine of it."""
        source = random.Random(number)
        assert current_context() is None
        with open(self._image, "rb") as file:
            done = 0
            while done < BLOCKS_MIN or not self._stop.is_set():
                offset = source.randrange(max(1, self._client.size // BLOCK_BYTES)) * BLOCK_BYTES
                length = min(BLOCK_BYTES, self._client.size - offset)
                data = self._main.call(self._client.read(offset, length))       # waits for the network
                file.seek(offset)
                self._main.call(self._count(data == file.read(length)))         # ends where it began: here
                done += 1
                if done % 2:
                    tally.wake()            # no lock: queued to the home
                else:
                    with big_lock():
                        tally.wake()        # big lock: if it is parked it runs here and now
        with big_lock():
            self._shared.readers += 1
            tally.wake()

    async def _count(self, right: bool) -> None:
        self._shared.blocks += 1
        self._shared.wrong += not right

    async def _tally(self) -> None:
        """Parked until somebody wakes it; notes which thread it runs on each time."""
        assert current_coroutine() is not None
        while self._shared.readers < READERS:
            await park("waits for a plain thread")
            self._shared.threads.add(threading.current_thread().name)

    async def _hash_at_home(self) -> str:
        """On the export's IOThread: ask the device itself, no network between."""
        assert current_context() is self._iothread.context
        device = self._daemon.exported["demo"].device
        digest = hashlib.sha256()
        for offset in range(0, device.size, PIECE_BYTES):
            answer = device.read(offset, min(PIECE_BYTES, device.size - offset))
            digest.update(await answer if asyncio.iscoroutine(answer) else answer)
        return digest.hexdigest()

    def _foreign_clients(self) -> dict[str, Callable[[str, str], list[str]]]:
        commands: dict[str, Callable[[str, str], list[str]]] = {
            "nbdcopy": lambda uri, target: ["nbdcopy", uri, target],
            "qemu-img": lambda uri, target: ["qemu-img", "convert", "-O", "raw", uri, target],
        }
        return {name: command for name, command in commands.items() if shutil.which(name)}

    async def _foreign_copy(self, name: str, arguments: Callable[[str, str], list[str]]) -> str | None:
        uri = self._daemon.server.uri("demo")
        target = os.path.join(self._folder, f"{name}.img")
        status_line(f"copying out with {name} ...")
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *arguments(uri, target), stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
        )
        _output, errors = await process.communicate()
        clear_line()
        if process.returncode != 0:
            print(f"{name} failed: {errors.decode(errors='replace').strip()}")
            return "failed"
        self.rates.append((name, self._client.size / (time.monotonic() - started)))
        return await to_worker(hash_file, target)

    def _report(self, expected: str, hashes: dict[str, str]) -> bool:
        shared, main = self._shared, self._main.statistics()
        print(f"\nsha256 of the image  {expected}")
        for name, found in hashes.items():
            print(f"  {'same' if found == expected else 'WRONG'}  {name}")
        print(f"  {'same' if not shared.wrong else 'WRONG'}  {shared.blocks} blocks read by {READERS} plain threads")
        print("\nwho ran what where")
        home = self._iothread.context.statistics()
        saved = 2 * main.calls_driven + main.calls_handed_over + main.entered
        print(table([
            ("wakes and starts queued to the main context", f"{main.scheduled}"),
            (f"... to {self._iothread.name}", f"{home.scheduled}"),
            ("entered directly, on the waking thread", f"{main.entered}"),
            ("call() that ended in the calling thread", f"{main.calls_driven}"),
            ("call() begun there, ended at home", f"{main.calls_handed_over}"),
            ("thread switches saved", f"{saved}"),
            ("threads that ran the parked coroutine", ", ".join(sorted(shared.threads))),
        ]))
        print("\nthroughput")
        print(table([(name, f"{amount(rate)}/s") for name, rate in self.rates]), flush=True)
        return not shared.wrong and all(found == expected for found in hashes.values())


async def _demo(image: str, folder: str) -> bool:
    async with Daemon(iothreads=1) as daemon:
        await daemon.start(ListenConfig())
        iothread = (await daemon.add_export(ExportConfig(source=f"file:{image}", name="demo", read_only=True))).iothread
        uri = daemon.server.uri("demo")
        print(f"serving it as {uri}, at home in {iothread.name}")
        client = await connect(uri)
        try:
            return await _Demo(image, folder, daemon, iothread, client).run()
        finally:
            with contextlib.suppress(HomeloopError, OSError):
                await client.close()
