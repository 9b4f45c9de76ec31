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
import sys
import time
from socket import socket as Socket

from homeloop.block.filters.specs import parse_filter
from homeloop.block.opening import default_name
from homeloop.cli.ending import Ending
from homeloop.cli.words import amount, plural, screen
from homeloop.core.runtime import run
from homeloop.daemon.activation import inherited_sockets
from homeloop.daemon.building import deploy
from homeloop.daemon.config import CONFIG_BYTES_MAX, ServeConfig, read_config
from homeloop.daemon.exporting import Daemon, ExportConfig, ListenConfig
from homeloop.daemon.qmp.monitors import Monitors
from homeloop.debug.listening import listen, runtime_folder
from homeloop.errors import BlockError, UsageError
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.uri import parse_uri

__all__ = ["Plan", "Throughput", "export_configs", "listen_config", "plan_of", "serve", "tls_credentials"]

STATUS_EVERY_S = 1.0
# Beside a thread that burns CPU the p99 of a request is 0.8 ms with it, with Python's own 5 ms it is 9.8.
SWITCH_INTERVAL_MS = 0.5
IOTHREADS_MAX = 1024            # far beyond use; a slip of the finger must not fill the process with threads


def serve(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit status. The main thread.

    UsageError for options that make no sense. Leaves its signal handlers behind: see Ending.
    """
    plan = plan_of(options)
    if options.check:
        screen.say(f"{options.config}: nothing is wrong with it")
        return 0
    interval_ms = plan.config.switch_interval_ms or SWITCH_INTERVAL_MS
    sys.setswitchinterval(interval_ms / 1000)
    run(_serve(plan))
    return 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be served, from the command line and the configuration file."""

    config: ServeConfig
    exports: tuple[ExportConfig, ...] = ()          # of the command line
    iothreads: int = 1
    tls: TlsCredentials | None = None
    tls_only: frozenset[str] = frozenset()          # exports that need it, where the others do not; none: all need it
    hints: dict[str, str] = dataclasses.field(default_factory=dict)
    inherited: tuple[Socket, ...] = ()              # for NBD clients
    inherited_control: Socket | None = None


def plan_of(options: argparse.Namespace) -> Plan:
    """What the options say, all of it checked. UsageError for what makes no sense, OSError for an unreadable file.

    Takes over the sockets of a service manager.
    """
    if options.config is not None:
        return _plan_of_file(options)
    if options.check:
        raise UsageError("--check is for --config FILE")
    exports = tuple(export_configs(options))
    listen = listen_config(options)
    if not 1 <= options.iothreads <= IOTHREADS_MAX:
        raise UsageError(f"--iothreads {options.iothreads}: it must be from 1 to {IOTHREADS_MAX}")
    config = _with_watchdog(options, ServeConfig(
        listen=() if listen == ListenConfig() else (listen,), control=options.control,
        switch_interval_ms=_interval(options),
    ))
    tls = tls_credentials(options)
    return _with_inherited(Plan(
        config=config, exports=exports, iothreads=options.iothreads, tls=tls, hints=_hints(options),
        tls_only=_tls_only(options, exports, tls),
    ))


def _plan_of_file(options: argparse.Namespace) -> Plan:
    given = {
        "SOURCE": options.source, "--name": options.name, "--socket": options.socket, "--listen": options.listen,
        "--iothreads": options.iothreads != 1, "--read-only": options.read_only, "--filter": options.filter,
        "--size": options.size, "--tls-certificates": options.tls_certificates,
        "--tls-verify-peer": options.tls_verify_peer, "--tls-psk": options.tls_psk, "--tls-only": options.tls_only,
    }
    wrong = [name for name, value in given.items() if value is not None and value is not False and value != []]
    if wrong:           # none is passed over: who asks for TLS, or for no changes, must not go without
        raise UsageError(f"--config takes the place of {' and '.join(wrong)}: say it in the file")
    with open(options.config, "rb") as file:
        data = file.read(CONFIG_BYTES_MAX + 1)
    if len(data) > CONFIG_BYTES_MAX:
        raise UsageError(f"{options.config} has more than {CONFIG_BYTES_MAX} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{options.config}:{line}: this is no UTF-8") from error
    config = read_config(text, options.config)
    if options.control is not None:
        config = dataclasses.replace(config, control=options.control)
    if options.switch_interval_ms is not None:
        config = dataclasses.replace(config, switch_interval_ms=_interval(options))
    config = _with_watchdog(options, config)
    tls = None
    if config.tls is not None:
        tls = TlsCredentials.for_server(
            config.tls.certificates, psk_file=config.tls.psk, verify_peer=config.tls.verify_peer
        )
    tls_only = frozenset(export.name for export in config.exports if export.tls_only)
    plan = Plan(config=config, tls=tls, tls_only=tls_only)
    return plan if options.check else _with_inherited(plan)


def _interval(options: argparse.Namespace) -> float | None:
    interval: float | None = options.switch_interval_ms
    if interval is not None and not 0.001 <= interval <= 1000:
        raise UsageError(f"--switch-interval-ms {interval}: it must be from 0.001 to 1000")
    return interval


def _with_watchdog(options: argparse.Namespace, config: ServeConfig) -> ServeConfig:
    blocked_s: float | None = options.watchdog_s
    if blocked_s is None:
        return config
    if not 0 <= blocked_s <= 1e6:
        raise UsageError(f"--watchdog-s {blocked_s}: it must be a number of seconds, or 0 for never")
    return dataclasses.replace(config, limits=dataclasses.replace(config.limits, blocked_s=blocked_s or None))


def _with_inherited(plan: Plan) -> Plan:
    """Add the sockets of a service manager; UsageError if there is nothing to do then."""
    sockets = inherited_sockets(os.environ, os.getpid())
    control = [sock for name, sock in sockets if name == "control"]
    if len(control) > 1 or (control and plan.config.control is not None):
        raise UsageError("there are two control sockets: one is enough")
    others = tuple(sock for name, sock in sockets if name != "control")
    if not plan.exports and not plan.config.exports and plan.config.control is None and not control:
        raise UsageError("the following arguments are required: SOURCE (homeloop serve --help explains)")
    return dataclasses.replace(plan, inherited=others, inherited_control=control[0] if control else None)


def tls_credentials(options: argparse.Namespace) -> TlsCredentials | None:
    """What the --tls options say; None: no TLS."""
    folder, psk_file, verify_peer = options.tls_certificates, options.tls_psk, options.tls_verify_peer
    if folder is None and psk_file is None and not verify_peer:
        return None
    return TlsCredentials.for_server(folder, psk_file=psk_file, verify_peer=verify_peer)


def _tls_only(
    options: argparse.Namespace, exports: tuple[ExportConfig, ...], tls: TlsCredentials | None
) -> frozenset[str]:
    names = frozenset(options.tls_only)
    for name in sorted(names - {export.name for export in exports}):
        raise UsageError(f"--tls-only {name}: there is no export of that name")
    if names and tls is None:
        raise UsageError("--tls-only needs --tls-certificates or --tls-psk")
    return names


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


async def _serve(plan: Plan) -> None:
    config = plan.config
    daemon = Daemon(iothreads=plan.iothreads, tls=plan.tls, limits=config.limits, tls_only=plan.tls_only)
    with Ending(lambda: _give_up(daemon)) as ending:
        async with daemon, contextlib.AsyncExitStack() as stack:
            for export in plan.exports:
                await _add(daemon, export)
            await deploy(daemon, config)
            await _listen(daemon, plan)
            _announce(daemon, plan)
            control = plan.inherited_control or config.control
            if control is not None:
                monitors = Monitors(daemon, control)
                stack.push_async_callback(monitors.close)
                monitors.on_quit = ending.wanted.set
                _answer_ps(daemon, stack)
                screen.say(f"control socket: {config.control or 'the inherited one'}")
            screen.say("Ctrl-C ends it.")
            throughput = Throughput(daemon)
            await _until(ending.wanted, throughput)
            in_flight = throughput.in_flight()
            what = f"{plural(in_flight, 'request')} in flight" if in_flight else "and flushing"
            screen.say(f"finishing {what}; Ctrl-C again gives up on that")
        screen.say(f"flushed and closed: {throughput.summary()}")


def _answer_ps(daemon: Daemon, stack: contextlib.AsyncExitStack) -> None:
    """Let `homeloop ps` find us; where that cannot be, we serve all the same."""
    try:
        listening = stack.enter_context(listen(runtime_folder() / f"{os.getpid()}-serve.sock"))
    except (OSError, UsageError) as error:
        screen.complain(f"homeloop serve: `homeloop ps` will not find this process: {error}")
        return
    listening.sources["exports"] = daemon.picture


async def _listen(daemon: Daemon, plan: Plan) -> None:
    """At every address that was named; at none, if a control socket may name one later."""
    wheres = [ListenConfig(inherited=sock) for sock in plan.inherited] + list(plan.config.listen)
    if not wheres and daemon.exports:
        wheres = [ListenConfig()]
    for where in wheres:
        await daemon.listen(where)


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


def _announce(daemon: Daemon, plan: Plan) -> None:
    sources = {export.name: export.source for export in plan.exports}
    for exported in daemon.exports.values():
        size = amount(exported.device.size)
        rights = "writable" if exported.writable else "read-only"
        name = f"export {exported.name!r}" if exported.name else "the default export"
        source = sources.get(exported.name) or exported.node.options.get("source") or f"node {exported.node.name}"
        screen.say(f"serving {source}, {size}, {rights}, as {name}, at home in {exported.home_name}")
        screen.say(f"  {daemon.server.uri(exported.name)}")
    if not daemon.exports:
        return
    first = next(iter(daemon.exports.values()))
    found = dataclasses.replace(parse_uri(daemon.server.uri(first.name)), **plan.hints)  # type: ignore[arg-type]
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
