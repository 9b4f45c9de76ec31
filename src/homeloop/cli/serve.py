"""`homeloop serve`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import os
import re
import shlex
import time

from homeloop.block.filters.specs import parse_filter
from homeloop.block.opening import default_name
from homeloop.cli.ending import Ending
from homeloop.cli.words import amount, plural, screen
from homeloop.core.runtime import run
from homeloop.daemon.exporting import Daemon, ExportConfig, ListenConfig
from homeloop.daemon.qmp.monitors import Monitors
from homeloop.errors import BlockError, UsageError
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.uri import parse_uri

__all__ = ["Throughput", "export_configs", "listen_config", "serve", "tls_credentials"]

STATUS_EVERY_S = 1.0
IOTHREADS_MAX = 1024            # far beyond use; a slip of the finger must not fill the process with threads


def serve(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit status. The main thread.

    UsageError for options that make no sense. Leaves its signal handlers behind: see Ending.
    """
    exports = export_configs(options)
    listen = listen_config(options)
    if not 1 <= options.iothreads <= IOTHREADS_MAX:
        raise UsageError(f"--iothreads {options.iothreads}: it must be from 1 to {IOTHREADS_MAX}")
    if not exports and options.control is None:
        raise UsageError("the following arguments are required: SOURCE (homeloop serve --help explains)")
    tls = tls_credentials(options)
    run(_serve(exports, listen, options.iothreads, tls, _hints(options), options.control))
    return 0


def tls_credentials(options: argparse.Namespace) -> TlsCredentials | None:
    """What the --tls options say; None: no TLS."""
    folder, psk_file, verify_peer = options.tls_certificates, options.tls_psk, options.tls_verify_peer
    if folder is None and psk_file is None and not verify_peer:
        return None
    return TlsCredentials.for_server(folder, psk_file=psk_file, verify_peer=verify_peer)


def listen_config(options: argparse.Namespace) -> ListenConfig:
    """What --socket and --listen say."""
    if options.socket is not None:
        if not options.socket:
            raise UsageError("--socket needs a path")
        return ListenConfig(socket=options.socket)
    if options.listen is None:
        return ListenConfig()
    host, colon, port = options.listen.rpartition(":")
    if not colon or re.fullmatch("[0-9]{1,5}", port) is None or int(port) > 65535:
        raise UsageError(f"--listen {options.listen!r}: write HOST:PORT, such as localhost:10809 or [::1]:0")
    return ListenConfig(host=host.removeprefix("[").removesuffix("]") or "localhost", port=int(port))


def export_configs(options: argparse.Namespace) -> list[ExportConfig]:
    """What is to be served, under which names."""
    if options.name is not None and len(options.source) > 1:
        raise UsageError(f"--name is for one SOURCE, and there are {len(options.source)}")
    filters = tuple(options.filter)
    for text in filters:
        parse_filter(text)              # before anything is opened
    configs: dict[str, ExportConfig] = {}
    for source in options.source:
        name = options.name
        if name is None:
            name = default_name(source)
        if name in configs:
            raise UsageError(
                f"{configs[name].source!r} and {source!r} would both be named {name!r}: "
                "serve them separately, with --name"
            )
        configs[name] = ExportConfig(
            source=source, name=name, read_only=options.read_only, size=options.size, filters=filters
        )
    return list(configs.values())


async def _serve(
    exports: list[ExportConfig],
    listen: ListenConfig,
    iothreads: int,
    tls: TlsCredentials | None,
    hints: dict[str, str],
    control: str | None,
) -> None:
    daemon = Daemon(iothreads=iothreads, tls=tls)
    with Ending(lambda: _give_up(daemon)) as ending:
        async with daemon, contextlib.AsyncExitStack() as stack:
            for config in exports:
                await _add(daemon, config)
            if exports or listen != ListenConfig():
                await daemon.listen(listen)
            if exports:
                _announce(daemon, exports, hints)
            if control is not None:
                monitors = Monitors(daemon, control)
                stack.push_async_callback(monitors.close)
                monitors.on_quit = ending.wanted.set
                screen.say(f"control socket: {control}")
            screen.say("Ctrl-C ends it.")
            throughput = Throughput(daemon)
            await _until(ending.wanted, throughput)
            in_flight = throughput.in_flight()
            what = f"{plural(in_flight, 'request')} in flight" if in_flight else "and flushing"
            screen.say(f"finishing {what}; Ctrl-C again gives up on that")
        screen.say(f"flushed and closed: {throughput.summary()}")


async def _add(daemon: Daemon, config: ExportConfig) -> None:
    try:
        await daemon.add_export(config)
    except BlockError as exc:
        if config.read_only or exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise BlockError(exc.errno, f"{exc.text} (to serve it read-only: --read-only)") from exc


def _give_up(daemon: Daemon) -> str:
    """In the signal handler of the second Ctrl-C: what is lost by it."""
    daemon.remove_folder()
    left = [
        f"export {name!r} ({plural(exported.device.in_flight, 'request')} in flight)"
        for name, exported in list(daemon.exported.items())
    ]
    return f"homeloop serve: gave up before the end; not flushed: {', '.join(left) or 'nothing'}"


def _hints(options: argparse.Namespace) -> dict[str, str]:
    """What a client of this machine needs in its URI: it can use the same files, if it may read them."""
    files = {"tls_certificates": options.tls_certificates, "tls_psk_file": options.tls_psk}
    return {field: os.path.abspath(path) for field, path in files.items() if path is not None}


def _announce(daemon: Daemon, exports: list[ExportConfig], hints: dict[str, str]) -> None:
    for config in exports:
        exported = daemon.exported[config.name]
        size = amount(exported.device.size)
        rights = "read-only" if exported.device.read_only else "writable"
        name = f"export {config.name!r}" if config.name else "the default export"
        screen.say(f"serving {config.source}, {size}, {rights}, as {name}, at home in {exported.home_name}")
        screen.say(f"  {daemon.server.uri(config.name)}")
    found = dataclasses.replace(parse_uri(daemon.server.uri(exports[0].name)), **hints)  # type: ignore[arg-type]
    uri = shlex.quote(str(found))
    screen.say("try:")
    screen.say(f"  nbdinfo {uri}")
    screen.say(f"  nbdcopy --progress {uri} copy.img")
    if not found.tls:       # qemu-img takes its credentials apart from the URI
        screen.say(f"  qemu-img convert -p -O qcow2 {uri} copy.qcow2")


async def _until(wanted: asyncio.Event, throughput: Throughput) -> None:
    """Wait for the first signal; on a terminal show the throughput meanwhile."""
    while not wanted.is_set():
        try:
            await asyncio.wait_for(wanted.wait(), STATUS_EVERY_S if screen.is_terminal() else None)
        except TimeoutError:
            screen.status(throughput.line())


class Throughput:
    """What the exports of a daemon have moved, and how fast of late. The main context."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._then = time.monotonic()       # when line() was last asked
        self._moved = daemon.nodes.moved()  # and what it found

    def line(self) -> str:
        """Since it was last asked, as one line."""
        now, moved = time.monotonic(), self._daemon.nodes.moved()
        read, written, requests = (
            (new - old) / (now - self._then) for new, old in zip(moved, self._moved, strict=True)
        )
        self._then, self._moved = now, moved
        clients = plural(self._daemon.server.statistics().connections, "client")
        return f"{clients}   read {amount(read)}/s   written {amount(written)}/s   {requests:,.0f} requests/s"

    def summary(self) -> str:
        """All of it, as one line; also when the daemon has ended."""
        read, written, requests = self._daemon.nodes.moved()
        clients = plural(self._daemon.server.statistics().accepted, "client")
        return f"{clients}, {plural(requests, 'request')}, {amount(read)} read, {amount(written)} written"

    def in_flight(self) -> int:
        """Requests that wait for a device just now."""
        return sum(exported.device.in_flight for exported in self._daemon.exports.values())
