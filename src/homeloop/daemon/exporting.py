"""The block-export daemon: an NBD server on the main context, each export at home in an IOThread.

    control:  command -> Daemon (main context) -> exports, nodes, IOThreads
    data:     client -> connection -> device, on the export's IOThread; the daemon is not in its way

Starting and stopping a thread and opening an image block, so workers do them; the main loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import os
import socket
import tempfile
from collections.abc import Callable, Collection, Mapping
from socket import socket as Socket
from types import TracebackType
from typing import Final

from homeloop.block.device import Device
from homeloop.block.filters.specs import apply_filters, parse_filter
from homeloop.block.opening import open_device
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.workers import to_worker
from homeloop.daemon.io_errors import IoErrors
from homeloop.daemon.iothreads import IOThreads
from homeloop.daemon.nodes import Node, Nodes, is_identifier
from homeloop.daemon.tls_objects import TlsObjects
from homeloop.errors import BlockError, UsageError, WrongState
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.export import Export
from homeloop.nbd.protocol import pack_string
from homeloop.nbd.server import Server, ServerLimits

__all__ = ["Daemon", "ExportConfig", "Exported", "ListenConfig"]

# A removed export whose device does not come back is waited for so long; then it ends without us, and its event says
# when. What asked for the removal may have other things to do.
_PATIENCE_S: Final = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """One export as a person asks for it."""

    source: str                     # what open_device() takes
    name: str
    read_only: bool = False
    size: int | None = None         # bytes; of an image that is made if it is missing
    description: str = ""
    filters: tuple[str, ...] = ()   # what apply_filters() takes; the last is what clients see


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where the daemon listens; neither: a unix socket in a private folder that goes with the daemon."""

    socket: str | None = None       # a path
    host: str | None = None
    port: int | None = None
    inherited: Socket | None = None      # one that listens already


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Exported:
    """A node of the daemon under a name, and the IOThread where it is at home (None: the main context)."""

    id: str
    name: str                       # what NBD clients ask for
    node: Node
    iothread: IOThread | None
    server: Server                  # which may have been stopped since
    export: Export | None = None    # None until the server has it
    removal: asyncio.Task[None] | None = None

    @property
    def device(self) -> Device:
        """The node's device."""
        return self.node.device

    @property
    def writable(self) -> bool:
        """May its clients change it?"""
        return self.export is not None and not self.export.read_only

    @property
    def home_name(self) -> str:
        """Of the IOThread, or of the main context."""
        return self.node.home.name


class Daemon:
    """An NBD server, its exports, their nodes and IOThreads. Methods, but where they say otherwise: the main context's.

    start(), add_export() for each, then listen(): whoever can connect finds them all. Others come and go at any time:
    open nodes (`nodes`), offer() them, take_down() the export again. `subscribers` are called with each event's name
    and data, on the main context.
    """

    def __init__(
        self, *, iothreads: int = 1, limits: ServerLimits | None = None, tls: TlsCredentials | None = None,
        tls_only: Collection[str] = (),
    ) -> None:
        """tls: nobody is served without; but if there are names in `tls_only`, only the exports of these need it."""
        if iothreads < 1:
            raise UsageError(f"{iothreads} IOThreads: there must be at least one")
        self._threads = [IOThread(f"iothread-{number}") for number in range(iothreads)]
        self.limits = limits if limits is not None else ServerLimits()
        self.tls = tls
        self.tls_only = frozenset(tls_only)
        if self.tls_only and tls is None:
            raise UsageError(f"export {min(self.tls_only)!r} is for TLS only, and there are no TLS credentials")
        self.tls_objects = TlsObjects()
        self.subscribers: list[Callable[[str, dict[str, object]], None]] = []
        self._started: _Parts | None = None             # from start() on
        self._exports: dict[str, Exported] = {}         # by id, in the order in which they were added; till closed
        self._folder: str | None = None                 # of the private socket
        self._listening = False
        self._ending: set[asyncio.Task[None]] = set()   # servers that were stopped, and wait for a request that hangs
        self._next_thread = 0

    # -- parts ---------------------------------------------------------------------------------------------

    def _parts(self) -> _Parts:
        if self._started is None:
            raise WrongState("the daemon has not been started")
        return self._started

    @property
    def server(self) -> Server:
        """The NBD server, once started."""
        return self._parts().server

    @property
    def nodes(self) -> Nodes:
        """The nodes, once started."""
        return self._parts().nodes

    @property
    def objects(self) -> IOThreads:
        """All IOThreads by their id, once started."""
        return self._parts().objects

    @property
    def iothreads(self) -> tuple[IOThread, ...]:
        """The IOThreads that it was made with, in the order in which add_export() deals exports to them."""
        return tuple(self._threads)

    @property
    def exports(self) -> Mapping[str, Exported]:
        """What is exported, by id; in close(), what is not closed yet. To look at: any thread."""
        return self._exports

    @property
    def exported(self) -> Mapping[str, Exported]:
        """The same by the names that clients ask for."""
        return {exported.name: exported for exported in list(self._exports.values())}

    # -- start and end -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Daemon:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the IOThreads. Cancelled or failed: close() ends those that run."""
        try:
            context = AioContext.of()
            self._started = _Parts(
                context=context, server=self._new_server(context, self.limits, self.tls), nodes=Nodes(context),
                objects=IOThreads(),
            )
            for iothread in self._threads:
                self._started.objects.adopt(iothread)
                await to_worker(iothread.start)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Listen no more; drain, flush and close every device; end the IOThreads. Twice is fine.

        Exports end side by side: one whose device hangs does not keep the others from being flushed. Raises a
        BlockError that names each export that could not be flushed and closed.
        """
        failures: list[tuple[str, Exception]] = []
        if self._started is not None:
            # In this order: all of it begins in one turn of the loop, so no client is told that an export is
            # unknown when it is the server that ends.
            closing = [self._close_export(exported, failures) for exported in list(self._exports.values())]
            await asyncio.gather(*closing, self._started.server.close(), *self._ending)
            self._listening = False
            await self._close_nodes(failures)
            await self._started.objects.stop(but=self._threads)
        await asyncio.gather(*(to_worker(iothread.stop) for iothread in self._threads))
        self.remove_folder()
        if failures:
            number = next((exc.errno for _name, exc in failures if isinstance(exc, BlockError)), errno.EIO)
            text = "; ".join(f"{name}: {_text_of(exc)}" for name, exc in failures)
            raise BlockError(number, text) from failures[0][1]

    async def _close_export(self, exported: Exported, failures: list[tuple[str, Exception]]) -> None:
        node = exported.node
        try:
            if exported.removal is None:
                await exported.server.remove_export(exported.name)
            else:
                await asyncio.wait([exported.removal])
            if exported.id in node.exports:
                node.exports.remove(exported.id)
            if not node.users() and node.name in self.nodes:
                await self.nodes.close(node)
        except Exception as exc:            # the others must still be flushed
            failures.append((f"export {exported.name!r}", exc))
        self._exports.pop(exported.id, None)

    async def _close_nodes(self, failures: list[tuple[str, Exception]]) -> None:
        """Those that no export had, each before what is below it."""
        nodes = self.nodes
        while unused := [node for node in nodes.values() if not node.users()]:
            ends = await asyncio.gather(*(nodes.close(node) for node in unused), return_exceptions=True)
            failures += [
                (f"node {node.name!r}", end)
                for node, end in zip(unused, ends, strict=True) if isinstance(end, Exception)
            ]

    # -- exports -------------------------------------------------------------------------------------------

    async def add_export(self, config: ExportConfig, *, iothread: IOThread | None = None) -> Exported:
        """Open a device and serve it from the IOThread, or from the next one in turn.

        UsageError or BlockError if the device cannot be opened: nothing has changed then.
        """
        self._check_new(config.name, config.description)        # before an image is made
        if iothread is None:
            iothread = self._threads[self._next_thread % len(self._threads)]
            self._next_thread += 1
        nodes = self.nodes
        free = is_identifier(config.name) and nodes.is_free(config.name)
        node = await nodes.open(
            config.name if free else nodes.free_name(), config.source.partition(":")[0],
            functools.partial(_opening, config, iothread.context), options={"source": config.source},
            home=iothread.context,
        )
        try:
            return await self.offer(
                node, name=config.name, iothread=iothread, description=config.description,
                writable=not config.read_only and not node.device.read_only,
            )
        except BaseException:
            await nodes.close(node)
            raise

    async def offer(
        self, node: Node, *, name: str, iothread: IOThread | None = None, id: str | None = None,
        writable: bool = False, description: str = "", fixed: bool = False,
    ) -> Exported:
        """Export a node. It moves to the IOThread; if that cannot be, `fixed` makes it an error.

        Without an IOThread, or where the node cannot move, its requests run where it is at home. UsageError, in
        QEMU's words, for what is taken or cannot be: nothing has changed then.
        """
        self._check_new(name, description)
        id = self._free_id(name) if id is None else id
        self.check_new_id(id)
        if writable and node.device.read_only:
            raise UsageError("Cannot export read-only node as writable")
        try:
            self.nodes.settle(node, node.home if iothread is None else iothread.context)
        except UsageError:
            if fixed:
                raise
        home = self.objects.at(node.home)
        exported = Exported(id=id, name=name, node=node, iothread=home, server=self.server)
        self._exports[id] = exported
        node.exports.append(id)
        node.offered = True
        errors = IoErrors(self._parts().context, node.name, self.emit)
        try:
            exported.export = await exported.server.add_export(
                name, node.device, context=node.home, description=description, read_only=not writable,
                on_error=errors.on_error, tls_only=name in self.tls_only,
            )
        except BaseException:
            del self._exports[id]
            node.exports.remove(id)
            raise
        return exported

    def check_new_id(self, id: str) -> None:
        """UsageError, in QEMU's words, for an id that cannot be a new export's."""
        if id in self._exports:
            raise UsageError(f"Block export id '{id}' is already in use")

    def _free_id(self, name: str) -> str:
        base = name if is_identifier(name) else "export"
        found, number = base, 1
        while found in self._exports:
            number += 1
            found = f"{base}-{number}"
        return found

    def _check_new(self, name: str, description: str) -> None:
        if name in self.exported:
            raise UsageError(f"there is an export named {name!r} already")
        try:
            pack_string(name, "export name")
            pack_string(description, "description")
        except ValueError as error:
            raise UsageError(str(error)) from error

    async def take_down(self, exported: Exported, *, hard: bool = False) -> None:
        """Remove an export; its node stays. BLOCK_EXPORT_DELETED is emitted when no request of it runs any more.

        Returns then, or after some seconds if a request hangs: nobody can take it back, and the export stays listed
        as shutting down. Not hard: UsageError, in QEMU's words, if clients are connected.
        """
        if exported.removal is not None and not hard:
            raise UsageError(f"Export '{exported.id}' is already shutting down")
        if not hard and exported.export is not None and exported.export.connections:
            raise UsageError(f"export '{exported.id}' still in use")
        if exported.removal is None:
            exported.removal = asyncio.create_task(self._remove(exported, hard))
        await asyncio.wait([exported.removal], timeout=_PATIENCE_S)

    async def _remove(self, exported: Exported, hard: bool) -> None:
        await exported.server.remove_export(exported.name, hard=hard)
        exported.node.exports.remove(exported.id)
        del self._exports[exported.id]
        self.emit("BLOCK_EXPORT_DELETED", {"id": exported.id})

    async def resize(self, node: Node, size: int) -> None:
        """Change a node's size: new clients see it, the device's checks are those of now for all.

        UsageError or BlockError if it cannot be.
        """
        if node.device.read_only:
            raise UsageError("Image is read-only")
        if node.parents:
            raise UsageError(f"Node {node.name} is in use by {', '.join(node.users())}")
        await self.nodes.run_at_home(node, node.device.resize(size))

    def picture(self) -> list[dict[str, object]]:
        """The exports with their connections, as values that JSON can carry. Any thread; of about one moment."""
        shown: list[dict[str, object]] = []
        for exported in list(self._exports.values()):
            connections = [] if exported.export is None else list(exported.export.connections)
            shown.append({
                "id": exported.id, "name": exported.name, "node": exported.node.name, "home": exported.home_name,
                "size": exported.device.size, "in_flight": exported.device.in_flight,
                "connections": [dataclasses.asdict(connection.statistics()) for connection in connections],
            })
        return shown

    def emit(self, name: str, data: dict[str, object]) -> None:
        """Tell all subscribers of an event."""
        for subscriber in list(self.subscribers):
            subscriber(name, data)

    async def delete_iothread(self, id: str) -> None:
        """End an IOThread. UsageError, naming who, while anybody is at home there."""
        iothread = self.objects[id]
        users = [f"export '{exported.id}'" for exported in self._exports.values() if exported.iothread is iothread]
        if not users:
            users = self.nodes.move_out(iothread.context)
        if users:
            raise UsageError(f"object '{id}' is in use, can not be deleted: {', '.join(users)}")
        await self.objects.delete(id)
        if iothread in self._threads:
            self._threads.remove(iothread)

    # -- listening -----------------------------------------------------------------------------------------

    @property
    def listening(self) -> bool:
        """Is the NBD server running, as QEMU has it?"""
        return self._listening

    async def listen(self, where: ListenConfig) -> None:
        """Let clients in. OSError if nobody can listen there; UsageError for an address that makes no sense."""
        await self._listen(self.server, where)
        self._listening = True

    async def _listen(self, server: Server, where: ListenConfig) -> None:
        if where.port is not None:
            host = where.host or "localhost"
            try:
                await server.listen((host, where.port))
            except (socket.gaierror, UnicodeError) as error:
                # getaddrinfo() does not say for which host, nor has it an errno. A name that IDNA cannot encode
                # is a UnicodeError.
                text = error.strerror if isinstance(error, OSError) else str(error)
                raise OSError(errno.EADDRNOTAVAIL, f"cannot find the host {host!r}: {text}") from error
        elif where.inherited is not None:
            await server.listen(where.inherited)
        else:
            path = where.socket
            if path is None:
                self._folder = await to_worker(tempfile.mkdtemp, "", "homeloop-")
                path = os.path.join(self._folder, "nbd.sock")
            await server.listen(path)

    def _new_server(self, context: AioContext, limits: ServerLimits, tls: TlsCredentials | None) -> Server:
        return Server(context, limits=limits, tls=tls, tls_required=not self.tls_only)

    async def start_server(
        self, addresses: list[ListenConfig], connections_max: int | None = None, *, tls: TlsCredentials | None = None
    ) -> None:
        """Listen on all of these addresses, or on none: nbd-server-start. tls: None: the daemon's own."""
        if self._listening:
            raise UsageError("NBD server already running")
        parts = self._parts()
        limits = self.limits
        if connections_max:
            limits = dataclasses.replace(limits, connections_max=connections_max)
        old, server = parts.server, self._new_server(parts.context, limits, self.tls if tls is None else tls)
        parts.server = server
        self._listening = True              # nobody else starts it meanwhile
        try:
            await old.close()
            for address in addresses:
                await self._listen(server, address)
        except BaseException:
            if parts.server is server:      # else it was stopped meanwhile
                self._listening = False
            await server.close()
            raise

    async def stop_server(self) -> None:
        """Remove all exports, hard, and listen no more: nbd-server-stop."""
        if not self._listening:
            raise UsageError("NBD server not running")
        self._listening = False             # at once: who comes now must not be offered by the one that ends
        parts = self._parts()
        old, parts.server = parts.server, self._new_server(parts.context, self.limits, self.tls)
        await asyncio.gather(*(self.take_down(exported, hard=True) for exported in list(self._exports.values())))
        ending = asyncio.create_task(old.close())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.wait([ending], timeout=_PATIENCE_S)

    def remove_folder(self) -> None:
        """Remove the private socket and its folder, if there is one. Any thread; for who cannot wait for close()."""
        if self._folder is not None:
            with contextlib.suppress(OSError):      # whatever it is: nobody can do anything about it
                os.unlink(os.path.join(self._folder, "nbd.sock"))
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)


@dataclasses.dataclass(slots=True, kw_only=True)
class _Parts:
    """What a daemon has from its start on."""

    context: AioContext
    server: Server
    nodes: Nodes
    objects: IOThreads


def _opening(config: ExportConfig, home: AioContext, made: list[Device]) -> None:
    """Open a device with its filters, in a worker, for this home. What is in `made` by then is closed if one fails."""
    filters = [parse_filter(text) for text in config.filters]
    # Nothing is written through it: so others may read the image meanwhile, and it may be one that we may not write.
    covered = any(spec.name == "cow" for spec in filters)
    if covered and config.read_only:
        filters.append(parse_filter("readonly"))
    read_only = config.read_only or covered
    made.append(open_device(config.source, read_only=read_only, size=config.size, create=config.size is not None))
    for spec in filters:
        made[0] = apply_filters(made[0], [spec], run=home.call)


def _text_of(error: Exception) -> str:
    return error.text if isinstance(error, BlockError) else str(error) or type(error).__name__
