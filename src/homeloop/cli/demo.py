"""`homeloop demo`: an image, an IOThread, real clients, and plain threads that join in under the big lock."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import io
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Coroutine as CoroutineABC
from typing import Any

from homeloop.block.driver import BytesLike
from homeloop.cli.clients import FOREIGN, ForeignClient
from homeloop.cli.words import amount, plural, screen, table
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

__all__ = ["Demo", "demo", "hash_file", "make_image"]

IMAGE_BYTES = 64 << 20
PIECE_BYTES = 256 << 10         # of a read of the copy
IN_FLIGHT = 16                  # reads of the copy
HASH_BYTES = 4 << 20            # that a worker hashes at once: Ctrl-C waits for no more than that
READERS = 3                     # plain threads
BLOCK_BYTES = 4096              # of a read of theirs
BLOCKS_MIN = 100                # that each of them reads, however fast the copy is
PROGRESS_EVERY_S = 0.1          # of copies by other processes
STALLED_S = 60.0                # then such a copy is given up


def demo(options: argparse.Namespace) -> int:
    """Run the demo; return the exit status: 0 if every hash was right. The main thread."""
    with tempfile.TemporaryDirectory(prefix="homeloop-demo-") as folder:
        image = options.image
        if image is None:
            image = os.path.join(folder, "demo.img")
            make_image(image)
            screen.say(f"made an image of {amount(IMAGE_BYTES)}, half of it holes")
        try:
            return 0 if run(_demo(image, folder)) else 1
        except asyncio.CancelledError:
            screen.complain("homeloop demo: terminated")
            return 128 + signal.SIGTERM


def make_image(path: str) -> None:
    """Write an image with data and holes, the same each time."""
    chunk = 1 << 20
    source = random.Random(7)
    with open(path, "wb") as file:
        for start in range(0, IMAGE_BYTES, 2 * chunk):
            file.seek(start)
            file.write(source.randbytes(chunk))
        file.truncate(IMAGE_BYTES)


async def _demo(image: str, folder: str) -> bool:
    """As Ctrl-C does already, SIGTERM cancels it: sockets and copies are removed, other programs ended."""
    me = current_coroutine()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    async with Daemon(iothreads=1) as daemon:
        exported = await daemon.add_export(ExportConfig(source=f"file:{image}", name="demo", read_only=True))
        await daemon.listen(ListenConfig())
        uri = daemon.server.uri("demo")
        screen.say(f"serving {plural(exported.device.size, 'byte')}, at home in {exported.home_name}, as")
        screen.say(f"  {uri}")
        client = await connect(uri)
        try:
            return await Demo(image, folder, daemon, client).run()
        finally:
            with contextlib.suppress(HomeloopError, OSError):
                await client.close()


async def hash_file(path: str, what: str) -> str:
    """SHA-256 of a file of any size, in pieces on a worker; `what` it is stands in the status line."""
    digest = hashlib.sha256()

    def add_piece() -> int:
        piece = file.read(HASH_BYTES)
        digest.update(piece)
        return len(piece)

    with await to_worker(io.FileIO, path) as file:
        size, done = os.fstat(file.fileno()).st_size, 0
        while length := await to_worker(add_piece):
            done += length
            screen.status(f"hashing {what}: {done * 100 // max(size, done):3d} %")
    screen.status("")
    return digest.hexdigest()


@dataclasses.dataclass(slots=True)
class _Shared:
    """Loop-bound: touched on the main context only, by whichever thread is its home just then."""

    readers: int = 0            # plain threads that are done
    blocks: int = 0             # blocks that they have read
    wrong: int = 0              # ... that differed from the image
    failures: list[str] = dataclasses.field(default_factory=list)      # of the threads, if they ended early
    threads: set[str] = dataclasses.field(default_factory=set)         # that ran the tally


class Demo:
    """One run over the export "demo" of a daemon. Methods that are coroutines: of the main context."""

    def __init__(self, image: str, folder: str, daemon: Daemon, client: Client) -> None:
        self._image = image
        self._folder = folder
        self._daemon = daemon
        self._device = daemon.exported["demo"].device
        self._iothread: IOThread = daemon.iothreads[0]      # where all its exports are at home
        self._client = client
        self._main = AioContext.of()
        self._shared = _Shared()
        self._stop = threading.Event()
        self._rates: list[tuple[str, float]] = []       # what copied, bytes a second
        self._notes: list[str] = []                     # what was left out, and why

    async def run(self) -> bool:
        """Everything; True if all hashes are right."""
        expected = await hash_file(self._image, "the image")
        hashes = {"client of this process": await self._copy_beside_threads()}
        hashes[f"coroutine in {self._iothread.name}"] = await self._iothread.run(self._hash_at_home())
        for client in FOREIGN:
            copied = await self._foreign_copy(client)
            if copied is not None:
                hashes[client.name] = copied
        return self._report(expected, hashes)

    async def _copy_beside_threads(self) -> str:
        """Copy out while plain threads read blocks; return the hash of the copy."""
        tally = self._main.spawn(self._tally(), name="tally")
        threads = [
            threading.Thread(target=self._plain_thread, args=(number, tally), name=f"plain-{number}")
            for number in range(READERS)
        ]
        for thread in threads:
            thread.start()
        try:
            return await self._copy_out()
        finally:
            self._stop.set()
            await tally                 # a plain thread's last wake ends it
            for thread in threads:
                await to_worker(thread.join)
            screen.status("")

    async def _copy_out(self) -> str:
        """Read the whole export through the client, many reads in flight; return the hash."""
        size = self._client.size
        digest = hashlib.sha256()
        started = time.monotonic()
        reads: deque[asyncio.Task[BytesLike]] = deque()
        begun = done = 0
        try:
            while done < size:
                while begun < size and len(reads) < IN_FLIGHT:
                    length = min(PIECE_BYTES, size - begun)
                    reads.append(asyncio.create_task(self._client.read(begun, length)))
                    begun += length
                data = await reads.popleft()
                digest.update(data)
                done += len(data)
                blocks = f"{self._shared.blocks} blocks read by plain threads"
                screen.status(f"copying out: {done * 100 // size:3d} %   {blocks}")
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
        if size:
            self._rates.append(("client of this process", size / (time.monotonic() - started)))
        return digest.hexdigest()

    def _plain_thread(self, number: int, tally: Coroutine[None]) -> None:
        failure = ""
        try:
            self._read_blocks(number, tally)
        except Exception as exc:
            failure = f"thread plain-{number}: {type(exc).__name__}: {exc}"
        with big_lock():                # this thread is the home of the main context now
            if failure:
                self._shared.failures.append(failure)
            self._shared.readers += 1
            tally.wake()

    def _read_blocks(self, number: int, tally: Coroutine[None]) -> None:
        """A plain thread: synchronous code that uses the main context's client, and wakes a coroutine of it."""
        source = random.Random(number)
        assert current_context() is None
        blocks = -(-self._client.size // BLOCK_BYTES)
        with open(self._image, "rb") as file:
            done = 0
            # All of them at least once: the copy of a small image is over before the threads run.
            while blocks and (done < BLOCKS_MIN or not self._stop.is_set()):
                offset = source.randrange(blocks) * BLOCK_BYTES
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
        digest = hashlib.sha256()
        size = self._device.size
        for offset in range(0, size, PIECE_BYTES):
            answer = self._device.read(offset, min(PIECE_BYTES, size - offset))
            # What the page cache has is answered at once; a context that never waits lets nobody else in.
            data = await answer if asyncio.iscoroutine(answer) else answer
            digest.update(data)
            await asyncio.sleep(0)
        return digest.hexdigest()

    async def _foreign_copy(self, client: ForeignClient) -> str | None:
        """Copy out with a program of others; its hash, "failed", or None if it was left out."""
        size = self._client.size
        if (reason := self._why_not(client)) is not None:
            self._notes.append(f"{client.name} left out: {reason}")
            return None
        target = os.path.join(self._folder, f"{client.name}.img")
        started = time.monotonic()
        failure = await self._watched(client.name, client.copy(self._daemon.server.uri("demo"), target))
        if failure is not None:
            self._notes.append(f"{client.name} failed: {failure}")
            return "failed"
        if size:
            self._rates.append((client.name, size / (time.monotonic() - started)))
        try:
            await to_worker(_drop_padding, target, size, client.pads_to)
            return await hash_file(target, f"the copy of {client.name}")
        finally:
            await to_worker(os.unlink, target)

    def _why_not(self, client: ForeignClient) -> str | None:
        size, room = self._client.size, shutil.disk_usage(self._folder).free
        if shutil.which(client.name) is None:
            return f"not installed (Debian: {client.package})"
        if room < size:
            return f"the temporary folder has {amount(room)} free, and it would copy {amount(size)}"
        return None

    async def _watched(self, name: str, copy: CoroutineABC[Any, Any, str | None]) -> str | None:
        """Await a copy by another process; what its requests have read tells how far it is, and whether it hangs."""
        size, before = self._client.size, self._device.statistics().read_bytes
        done, since = 0, time.monotonic()
        copying = asyncio.create_task(copy)
        try:
            while not (await asyncio.wait((copying,), timeout=PROGRESS_EVERY_S))[0]:
                seen, done = done, min(self._device.statistics().read_bytes - before, size)
                if done != seen:
                    since = time.monotonic()
                elif time.monotonic() - since > STALLED_S:
                    return f"nothing read for {STALLED_S:.0f} s, at {done} of {size} bytes"
                screen.status(f"copying out with {name}: {done * 100 // max(size, 1):3d} %")
        finally:
            screen.status("")
            if not copying.done():
                copying.cancel()
                await asyncio.wait((copying,))
        return copying.result()

    def _report(self, expected: str, hashes: dict[str, str]) -> bool:
        shared = self._shared
        screen.say(f"\nsha256 of the image  {expected}")
        for name, found in hashes.items():
            screen.say(f"  {_verdict(found == expected)}  {name}")
        right = not shared.wrong and not shared.failures
        screen.say(f"  {_verdict(right)}  {plural(shared.blocks, 'block')} read by {READERS} plain threads")
        for note in (*shared.failures, *self._notes):
            screen.say(f"  {note}")
        self._report_threads()
        if self._rates:
            screen.say("\nthroughput")
            screen.say(table([(name, f"{amount(rate)}/s") for name, rate in self._rates]))
        return right and all(found == expected for found in hashes.values())

    def _report_threads(self) -> None:
        main, home = self._main.statistics(), self._iothread.context.statistics()
        saved = 2 * main.calls_driven + main.calls_handed_over + main.entered
        screen.say("\nwho ran what where")
        screen.say(table([
            ("wakes and starts queued to the main context", f"{main.scheduled}"),
            (f"... to {self._iothread.name}", f"{home.scheduled}"),
            ("entered directly, on the waking thread", f"{main.entered}"),
            ("call() that ended in the calling thread", f"{main.calls_driven}"),
            ("call() begun there, ended at home", f"{main.calls_handed_over}"),
            ("thread switches saved", f"{saved}"),
        ]))
        screen.say(f"  the parked coroutine ran on {', '.join(sorted(self._shared.threads))}")


def _drop_padding(path: str, size: int, pads_to: int) -> None:
    if size < os.path.getsize(path) < size + pads_to:
        os.truncate(path, size)


def _verdict(right: bool) -> str:
    return "same " if right else "WRONG"
