"""The block-export daemon: an NBD server on the main context, each export at home in an IOThread.

    control:  command -> Daemon (main context) -> exports, devices, IOThreads
    data:     client -> connection -> device, on the export's IOThread; the daemon is not in its way

Starting and stopping a thread and opening an image block, so workers do them; the main loop goes on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Mapping
from types import TracebackType

from homeloop.block.device import Device
from homeloop.block.opening import open_device
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.workers import to_worker
from homeloop.errors import UsageError, WrongState
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
    """An NBD server, its exports and its IOThreads. All methods: a coroutine of the main context."""

    def __init__(self, *, iothreads: int = 1, limits: ServerLimits | None = None) -> None:
        if iothreads < 1:
            raise UsageError(f"{iothreads} IOThreads: there must be at least one")
        self._threads = [IOThread(f"iothread-{number}") for number in range(iothreads)]
        self._limits = limits
        self._server: Server | None = None              # from start() on
        self._exported: dict[str, Exported] = {}        # by name; in the order in which they were added
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

    async def __aenter__(self) -> Daemon:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self, listen: ListenConfig) -> None:
        """Start the IOThreads and listen. Cancelled or failed: call close()."""
        context = AioContext.of()
        for iothread in self._threads:
            await to_worker(iothread.start)
        self._server = Server(context) if self._limits is None else Server(context, limits=self._limits)
        if listen.port is not None:
            await self._server.listen((listen.host or "localhost", listen.port))
            return
        path = listen.socket
        if path is None:
            self._folder = await to_worker(tempfile.mkdtemp, "", "homeloop-")
            path = os.path.join(self._folder, "nbd.sock")
        await self._server.listen(path)

    async def add_export(self, config: ExportConfig) -> Exported:
        """Open a device and serve it from the next IOThread in turn.

        UsageError or BlockError if the device cannot be opened: nothing has changed then.
        """
        if config.name in self._exported:
            raise UsageError(f"there is an export named {config.name!r} already")
        opening = functools.partial(
            open_device,
            config.source,
            read_only=config.read_only,
            size=config.size,
            create=config.size is not None,
        )
        device = await to_worker(opening)
        iothread = self._threads[self._next_thread % len(self._threads)]
        self._next_thread += 1
        exported = Exported(device=device, iothread=iothread)
        self._exported[config.name] = exported
        await self.server.add_export(config.name, device, context=iothread.context, description=config.description)
        return exported

    @property
    def exported(self) -> Mapping[str, Exported]:
        """What is exported, by name."""
        return self._exported

    async def close(self) -> None:
        """Drain what is in flight, flush and close every device, end the IOThreads. Twice is fine."""
        failures: list[BaseException] = []
        if self._server is not None:
            await self._server.close()
        while self._exported:
            _name, exported = self._exported.popitem()
            try:
                await exported.iothread.run(exported.device.close())
            except Exception as exc:        # the others must still be flushed
                failures.append(exc)
        await asyncio.gather(*(to_worker(iothread.stop) for iothread in self._threads))
        if self._folder is not None:
            await to_worker(functools.partial(shutil.rmtree, self._folder, ignore_errors=True))
            self._folder = None
        if failures:
            raise failures[0]
