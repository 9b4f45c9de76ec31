"""Our client, our driver and our copies against servers that others wrote: qemu-nbd, nbdkit, nbd-server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.nbd.client import connect
from homeloop.nbd.connector import Pacing
from homeloop.nbd.copy_ends import open_source, open_target
from homeloop.nbd.copying import CopyPlan, compare, copy
from homeloop.nbd.nbd_driver import open_nbd
from homeloop.nbd.protocol import TransmissionFlag
from homeloop.nbd.reconnecting import ReconnectingClient
from tests.block.images import allocated_bytes, need_holes
from tests.nbd.talking import soon
from tests.nbd.test_interop import SIZE, image, tell

LIMIT_S = 20.0

# From an image and a folder to a command, and the URI where it serves.
Served = Callable[[Path, Path], tuple[list[str], str]]


def qemu_nbd(path: Path, folder: Path) -> tuple[list[str], str]:
    sock = folder / "q"
    options = ["-f", "raw", "-t", "-e", "8", "-x", "an export", "-k", str(sock), "--discard=unmap"]
    return ["qemu-nbd", *options, str(path)], f"nbd+unix:///an%20export?socket={sock}"


def nbdkit(path: Path, folder: Path) -> tuple[list[str], str]:
    sock = folder / "k"
    return ["nbdkit", "-f", "-U", str(sock), "file", str(path)], f"nbd+unix:///?socket={sock}"


def nbdkit_simple(path: Path, folder: Path) -> tuple[list[str], str]:
    """Simple replies only."""
    sock = folder / "k"
    return ["nbdkit", "--no-sr", "-f", "-U", str(sock), "file", str(path)], f"nbd+unix:///?socket={sock}"


def nbdkit_blocks(path: Path, folder: Path) -> tuple[list[str], str]:
    """It takes blocks of 4096 bytes, and 64 KiB at once."""
    sock = folder / "k"
    sizes = [f"blocksize-{one}" for one in ("minimum=4096", "preferred=4096", "maximum=65536", "error-policy=error")]
    command = ["nbdkit", "-f", "-U", str(sock), "--filter=blocksize-policy", "file", str(path), *sizes]
    return command, f"nbd+unix:///?socket={sock}"


def nbd_server(path: Path, folder: Path) -> tuple[list[str], str]:
    """It goes into the background, and leaves its pid in a file."""
    sock, config = folder / "n", folder / "config"
    with socket.socket() as probe:                  # it wants a port, too, and takes no 0
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config.write_text(
        f"[generic]\nunixsock = {sock}\nallowlist = true\nlistenaddr = 127.0.0.1\nport = {port}\n"
        f"[disk]\nexportname = {path}\nflush = true\nfua = true\ntrim = true\n"
    )
    return ["nbd-server", "-C", str(config), "-p", str(folder / "pid")], f"nbd+unix:///disk?socket={sock}"


SERVERS = [
    pytest.param(serve, marks=pytest.mark.foreign(program), id=serve.__name__)
    for serve, program in (
        (qemu_nbd, "qemu-nbd"), (nbdkit, "nbdkit"), (nbdkit_simple, "nbdkit"), (nbdkit_blocks, "nbdkit"),
        (nbd_server, "nbd-server"),
    )
]
each = pytest.mark.parametrize("serve", SERVERS)


@contextlib.contextmanager
def running(serve: Served, path: Path, folder: Path) -> Iterator[str]:
    """A server of an image; its URI once it accepts."""
    command, uri = serve(path, folder)
    program = shutil.which(command[0])
    assert program is not None
    process = subprocess.Popen([program, *command[1:]], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_accepting(process, uri.partition("socket=")[2])
        yield uri
    finally:
        process.terminate()
        try:
            process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        end_daemon(folder / "pid")


def end_daemon(pid_file: Path) -> None:
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    pid_file.unlink(missing_ok=True)


def wait_accepting(process: subprocess.Popen[str], path: str) -> None:
    again = threading.Event()
    for _ in range(int(LIMIT_S / 0.02)):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(path)
            return
        assert process.poll() in (None, 0), process.communicate()
        again.wait(0.02)
    raise AssertionError(f"nobody accepts at {path}")


@each
def test_requests(serve: Served, tmp_path: Path, seed: int) -> None:
    """Random ones, many at once, against a model; then what it offers beyond."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))

    async def main(uri: str) -> None:
        async with connect(uri) as client:
            block = client.info.block_size_minimum
            most = min(client.info.payload_bytes_max, 64 << 10)

            async def work(number: int) -> None:
                dice = random.Random(seed + number)
                start, room = number << 17, 1 << 17
                model = bytearray(room)
                for _ in range(25):
                    length = dice.randrange(1, most // block + 1) * block
                    offset = dice.randrange(0, (room - length) // block + 1) * block
                    if dice.random() < 0.5:
                        model[offset:offset + length] = data = dice.randbytes(length)
                        await client.write(start + offset, data)
                    else:
                        assert await client.read(start + offset, length) == model[offset:offset + length]

            await soon(asyncio.gather(*[work(number) for number in range(8)]))
            await soon(client.flush())
            for flag, request in (
                (TransmissionFlag.SEND_TRIM, client.trim(0, 65536)),
                (TransmissionFlag.SEND_WRITE_ZEROES, client.write_zeroes(0, 65536, may_trim=False)),
                (TransmissionFlag.SEND_CACHE, client.cache(0, 65536)),
                (TransmissionFlag.SEND_FUA, client.write(0, bytes(4096), fua=True)),
            ):
                if client.can(flag):
                    await soon(request)
                else:
                    request.close()
            extents = await soon(client.extents(0, 1 << 20))
            assert sum(extent[0] for extent in extents) <= 1 << 20

    with running(serve, path, tmp_path) as uri:
        run(main(uri))


@each
def test_copies(serve: Served, tmp_path: Path, seed: int) -> None:
    """Into the server and out of it: every byte, and holes where the server tells of them."""
    need_holes(tmp_path)
    source, served, back = image(tmp_path / "source", seed), tmp_path / "served", tmp_path / "back"
    with served.open("wb") as file:
        file.truncate(SIZE)

    async def main(uri: str) -> None:
        for one, other in ((str(source), uri), (uri, str(back))):
            ours = await open_source(one)
            theirs = await open_target(other, SIZE)
            try:
                await asyncio.wait_for(copy(ours, theirs, CopyPlan()), LIMIT_S)
            finally:
                await ours.close()
                await theirs.close()
        ours, theirs = await open_source(str(source)), await open_source(uri)
        await asyncio.wait_for(compare(ours, theirs, CopyPlan()), LIMIT_S)
        await ours.close()
        await theirs.close()

    with running(serve, served, tmp_path) as uri:
        run(main(uri))
    assert source.read_bytes() == served.read_bytes() == back.read_bytes()
    if serve in (qemu_nbd, nbdkit, nbdkit_blocks):
        assert allocated_bytes(served) < SIZE // 2
        assert allocated_bytes(back) < SIZE // 2


@each
def test_the_driver(serve: Served, tmp_path: Path, seed: int) -> None:
    """A device over it, as large requests as a device takes."""
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    data = random.Random(seed).randbytes(3 << 20)

    async def main(uri: str) -> None:
        device = Device(await to_worker(open_nbd, uri))
        await soon(device.write(4096, data))            # type: ignore[arg-type]
        assert await soon(device.read(4096, len(data))) == data         # type: ignore[arg-type]
        await soon(device.write_zeroes(0, SIZE))        # type: ignore[arg-type]
        assert await soon(device.read(0, SIZE)) == bytes(SIZE)          # type: ignore[arg-type]
        await soon(device.close())

    with running(serve, path, tmp_path) as uri:
        run(main(uri))


@pytest.mark.foreign("qemu-nbd", "nbdinfo")
def test_extents_as_nbdinfo_maps_them(tmp_path: Path, seed: int) -> None:
    need_holes(tmp_path)
    path = image(tmp_path / "image", seed)

    async def main(uri: str) -> None:
        runs: list[tuple[int, int]] = []
        async with connect(uri) as client:
            at = 0
            while at < SIZE:
                for length, hole, zero in await soon(client.extents(at, SIZE - at)):
                    runs.append((length, hole + 2 * zero))
                    at += length
        mapped = [line.split() for line in (await tell("nbdinfo", "--map", uri)).splitlines()]
        assert runs == [(int(words[1]), int(words[2])) for words in mapped]

    with running(qemu_nbd, path, tmp_path) as uri:
        run(main(uri))


@pytest.mark.foreign("qemu-nbd")
def test_a_restart(tmp_path: Path) -> None:
    """The reconnecting client goes on with the next process; nbdkit's are in test_reconnecting_processes.py."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            uri = stack.enter_context(running(qemu_nbd, path, tmp_path))
            pacing = Pacing(pause=lambda stop, _seconds: stop.wait(0.01))
            client = ReconnectingClient(uri, reconnect_delay=60, pacing=pacing)
            async with client:
                await soon(client.write(0, b"x" * 4096))
                await soon(client.flush())
                await to_worker(stack.close)
                reading = asyncio.ensure_future(client.read(0, 4096))
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(uri.partition("socket=")[2])
                stack.enter_context(running(qemu_nbd, path, tmp_path))
                assert await asyncio.wait_for(reading, LIMIT_S) == b"x" * 4096
                assert client.connections >= 2

    run(main())
