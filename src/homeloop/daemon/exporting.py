"""The block-export daemon: an NBD server on the main context, each export at home in an IOThread.

    control:  command -> Daemon (main context) -> exports, devices, IOThreads
    data:     client -> connection -> device, on the export's IOThread; the daemon is not in its way

Starting and stopping a thread and opening an image block, so workers do them; the main loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import socket
import tempfile
from collections.abc import Mapping
from types import TracebackType

from homeloop.block.device import Device
from homeloop.block.filters.specs import apply_filters, parse_filter
from homeloop.block.opening import open_device
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.workers import to_worker
from homeloop.errors import BlockError, UsageError, WrongState
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.protocol import pack_string
from homeloop.nbd.server import Server, ServerLimits

__all__ = ["Daemon", "ExportConfig", "Exported", "ListenConfig"]


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

    socket: str | None = None
    host: str | None = None
    port: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A device of the daemon, and the IOThread where it is at home."""

    device: Device
    iothread: IOThread


class Daemon:
    """An NBD server, its exports and its IOThreads. Methods, but where they say otherwise: the main context's.

    start(), add_export() for each, then listen(): whoever can connect finds them all.
    """

    def __init__(
        self, *, iothreads: int = 1, limits: ServerLimits | None = None, tls: TlsCredentials | None = None
    ) -> None:
        """tls: nobody is served without."""
        if iothreads < 1:
            raise UsageError(f"{iothreads} IOThreads: there must be at least one")
        self._threads = [IOThread(f"iothread-{number}") for number in range(iothreads)]
        self._limits = limits
        self._tls = tls
        self._server: Server | None = None              # from start() on
        self._exported: dict[str, Exported] = {}        # by name, in the order in which they were added; till closed
        self._folder: str | None = None                 # of the private socket
        self._next_thread = 0

    @property
    def server(self) -> Server:
        """The NBD server, once started."""
        if self._server is None:
            raise WrongState("the daemon has not been started")
        return self._server

    @property
    def iothreads(self) -> tuple[IOThread, ...]:
        """Its IOThreads, in the order in which exports are dealt to them."""
        return tuple(self._threads)

    @property
    def exported(self) -> Mapping[str, Exported]:
        """What is exported, by name; in close(), what is not closed yet. To look at: any thread."""
        return self._exported

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
            self._server = Server(AioContext.of(), limits=self._limits, tls=self._tls)
            for iothread in self._threads:
                await to_worker(iothread.start)
        except BaseException:
            await self.close()
            raise

    async def add_export(self, config: ExportConfig) -> Exported:
        """Open a device and serve it from the next IOThread in turn.

        UsageError or BlockError if the device cannot be opened: nothing has changed then.
        """
        server = self.server
        self._check_new(config)             # before an image is made
        iothread = self._threads[self._next_thread % len(self._threads)]
        self._next_thread += 1
        device = await _open(config, iothread)
        exported = Exported(device=device, iothread=iothread)
        try:
            self._check_new(config)         # somebody else may have been faster
            await server.add_export(config.name, device, context=iothread.context, description=config.description)
        except BaseException:
            await iothread.run(device.close())
            raise
        self._exported[config.name] = exported
        return exported

    def _check_new(self, config: ExportConfig) -> None:
        if config.name in self._exported:
            raise UsageError(f"there is an export named {config.name!r} already")
        try:
            pack_string(config.name, "export name")
            pack_string(config.description, "description")
        except ValueError as error:
            raise UsageError(str(error)) from error

    async def listen(self, where: ListenConfig) -> None:
        """Let clients in. OSError if nobody can listen there; UsageError for an address that makes no sense."""
        if where.port is not None:
            host = where.host or "localhost"
            try:
                await self.server.listen((host, where.port))
            except (socket.gaierror, UnicodeError) as error:
                # getaddrinfo() does not say for which host, nor has it an errno. A name that IDNA cannot encode
                # is a UnicodeError.
                text = error.strerror if isinstance(error, OSError) else str(error)
                raise OSError(errno.EADDRNOTAVAIL, f"cannot find the host {host!r}: {text}") from error
            return
        path = where.socket
        if path is None:
            self._folder = await to_worker(tempfile.mkdtemp, "", "homeloop-")
            path = os.path.join(self._folder, "nbd.sock")
        await self.server.listen(path)

    async def close(self) -> None:
        """Listen no more; drain, flush and close every device; end the IOThreads. Twice is fine.

        Exports end side by side: one whose device hangs does not keep the others from being flushed. Raises a
        BlockError that names each export that could not be flushed and closed.
        """
        failures: list[tuple[str, Exception]] = []
        if self._server is not None:
            # In this order: all of it begins in one turn of the loop, so no client is told that an export is
            # unknown when it is the server that ends.
            await asyncio.gather(
                *(self._close_export(name, failures) for name in list(self._exported)), self._server.close()
            )
        await asyncio.gather(*(to_worker(iothread.stop) for iothread in self._threads))
        self.remove_folder()
        if failures:
            number = next((exc.errno for _name, exc in failures if isinstance(exc, BlockError)), errno.EIO)
            text = "; ".join(f"export {name!r}: {_text_of(exc)}" for name, exc in failures)
            raise BlockError(number, text) from failures[0][1]

    async def _close_export(self, name: str, failures: list[tuple[str, Exception]]) -> None:
        exported = self._exported[name]
        try:
            await self.server.remove_export(name)
            await exported.iothread.run(exported.device.close())
        except Exception as exc:            # the others must still be flushed
            failures.append((name, exc))
        del self._exported[name]

    def remove_folder(self) -> None:
        """Remove the private socket and its folder, if there is one. Any thread; for who cannot wait for close()."""
        if self._folder is not None:
            with contextlib.suppress(OSError):      # whatever it is: nobody can do anything about it
                os.unlink(os.path.join(self._folder, "nbd.sock"))
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)


async def _open(config: ExportConfig, iothread: IOThread) -> Device:
    """Open a device in a worker; cancelled, or with a filter that does not fit, it is closed again."""
    opened: list[Device] = []
    filters = [parse_filter(text) for text in config.filters]
    # Nothing is written through it: so others may read the image meanwhile, and it may be one that we may not write.
    covered = any(spec.name == "cow" for spec in filters)
    if covered and config.read_only:
        filters.append(parse_filter("readonly"))

    def opening() -> None:
        read_only = config.read_only or covered
        opened.append(
            open_device(config.source, read_only=read_only, size=config.size, create=config.size is not None)
        )
        for spec in filters:
            opened[0] = apply_filters(opened[0], [spec])    # one by one: what is here by now is closed if one fails

    try:
        await to_worker(opening)
    except BaseException:
        for device in opened:
            await iothread.run(device.close())
        raise
    return opened[0]


def _text_of(error: Exception) -> str:
    return error.text if isinstance(error, BlockError) else str(error) or type(error).__name__
