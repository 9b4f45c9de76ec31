"""`homeloop serve`."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import time

from homeloop.cli.words import amount, clear_line, status_line
from homeloop.core.runtime import run
from homeloop.daemon.exporting import Daemon, ExportConfig, ListenConfig
from homeloop.errors import UsageError

__all__ = ["listen_config", "serve"]


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status. UsageError for options that make no sense."""
    exports = _exports(options)
    listen = listen_config(options)
    if options.iothreads < 1:
        raise UsageError(f"--iothreads {options.iothreads}: there must be at least one")
    run(_serve(exports, listen, options.iothreads))
    return 0


def listen_config(options: argparse.Namespace) -> ListenConfig:
    """What --socket and --listen say."""
    if options.socket is not None:
        if not options.socket:
            raise UsageError("--socket needs a path")
        return ListenConfig(socket=options.socket)
    if options.listen is None:
        return ListenConfig()
    host, colon, port = options.listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen {options.listen!r}: write HOST:PORT, such as localhost:10809 or [::1]:0")
    return ListenConfig(host=host.removeprefix("[").removesuffix("]") or "localhost", port=int(port))


def _exports(options: argparse.Namespace) -> list[ExportConfig]:
    if options.name is not None and len(options.source) > 1:
        raise UsageError(f"--name is for one SOURCE, and there are {len(options.source)}")
    configs: list[ExportConfig] = []
    for source in options.source:
        name = options.name
        if name is None:
            name = "memory" if source.startswith("memory:") else os.path.basename(source.removeprefix("file:"))
        if any(config.name == name for config in configs):
            raise UsageError(f"two exports would be named {name!r}: serve them separately, with --name")
        configs.append(ExportConfig(source=source, name=name, read_only=options.read_only, size=options.size))
    return configs


async def _serve(exports: list[ExportConfig], listen: ListenConfig, iothreads: int) -> None:
    enough = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, enough.set)
    async with Daemon(iothreads=iothreads) as daemon:
        await daemon.start(listen)
        for config in exports:
            await daemon.add_export(config)
            _announce(daemon, config)
        print("Ctrl-C ends it.", flush=True)
        await _until(enough, daemon)
        clear_line()
        print("finishing what is in flight ...", flush=True)
    print("flushed and closed.", flush=True)


def _announce(daemon: Daemon, config: ExportConfig) -> None:
    device, home = daemon.exported[config.name].device, daemon.exported[config.name].iothread.name
    uri = daemon.server.uri(config.name)
    quoted = shlex.quote(uri)
    size = amount(device.size)
    rights = "read-only" if device.read_only else "writable"
    print(f"serving {config.source}, {size}, {rights}, as export {config.name!r}, at home in {home}")
    print(f"  {uri}")
    print("try:")
    print(f"  nbdinfo {quoted}")
    print(f"  nbdcopy --progress {quoted} copy.img")
    print(f"  qemu-img convert -p -O qcow2 {quoted} copy.qcow2", flush=True)


async def _until(enough: asyncio.Event, daemon: Daemon) -> None:
    """Wait for the signal; on a terminal show the throughput meanwhile."""
    if not sys.stdout.isatty():
        await enough.wait()
        return
    seen, then = _moved(daemon), time.monotonic()
    while not enough.is_set():
        try:
            await asyncio.wait_for(enough.wait(), 1)
        except TimeoutError:
            pass
        now, moved = time.monotonic(), _moved(daemon)
        reads, writes = ((new - old) / (now - then) for new, old in zip(moved, seen, strict=True))
        clients = daemon.server.statistics().connections
        status_line(f"{clients} clients   read {amount(reads)}/s   written {amount(writes)}/s")
        seen, then = moved, now


def _moved(daemon: Daemon) -> tuple[int, int]:
    """Bytes read and written so far, over all exports."""
    counts = [exported.device.statistics() for exported in daemon.exported.values()]
    return sum(count.read_bytes for count in counts), sum(count.written_bytes for count in counts)
