"""Serve one device from a program, in one line.

    async with serve(driver) as uri:
        ...                                     # any NBD client, in this process or another
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.server import Server, ServerLimits

__all__ = ["serve"]


@contextlib.asynccontextmanager
async def serve(
    target: Device | Driver,
    *,
    name: str = "",
    socket: str | os.PathLike[str] | None = None,
    listen: tuple[str, int] | None = None,
    iothread: IOThread | bool = True,
    read_only: bool = False,
    description: str = "",
    limits: ServerLimits | None = None,
    tls: TlsCredentials | None = None,
) -> AsyncIterator[str]:
    """Serve a device, or a driver, for the block; the value is its NBD URI. From a coroutine of any context.

    socket: a unix socket's path; listen: (host, port), port 0 for a free one; neither: a unix socket in a
    private temporary directory, which is removed in the end. iothread: where the requests run. True makes an
    IOThread for it, a running IOThread is used, False is here. tls: no client is served without TLS; the URI
    is an nbds one then. In the end requests in flight are finished and a driver is flushed and closed; a Device that
    was handed in stays open, it is the caller's.
    """
    if socket is not None and listen is not None:
        raise ValueError("serve() takes socket= or listen=, not both")
    here = AioContext.of()
    async with contextlib.AsyncExitStack() as stack:
        home = await stack.enter_async_context(_home(here, iothread))
        if isinstance(target, Device):
            device = target
        else:
            device = Device(target)
            stack.push_async_callback(_close_device, home, device)
        where: str | os.PathLike[str] | tuple[str, int]
        if listen is not None:
            where = listen
        elif socket is not None:
            where = socket
        else:
            directory = tempfile.mkdtemp(prefix="homeloop-")  # mode 0700: for this user only
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            where = os.path.join(directory, "nbd.sock")
        server = Server(here, limits=limits, tls=tls)
        stack.push_async_callback(server.close)
        await server.add_export(name, device, home, description=description, read_only=read_only)
        yield await server.listen(where, export=name)


@contextlib.asynccontextmanager
async def _home(here: AioContext, iothread: IOThread | bool) -> AsyncIterator[AioContext]:
    """The one place that decides where an export of serve() is at home."""
    if iothread is False:
        yield here
    elif iothread is not True:
        yield iothread.context
    else:
        own = IOThread("nbd")
        own.start()
        try:
            yield own.context
        finally:
            await _stopped(here, own)


async def _stopped(here: AioContext, iothread: IOThread) -> None:
    """Stop an IOThread and wait for its end, from a coroutine of any context.

    In a thread of its own: stop() blocks, and an IOThread may not wait for another (rule 11). Not a worker: those
    stay for a while, and a program that served one device would end with a thread more.
    """
    ended: asyncio.Future[None] = here.loop.create_future()

    def settle() -> None:
        if not ended.done():  # done: we were cancelled
            ended.set_result(None)

    def stop() -> None:
        try:
            iothread.stop()
        finally:
            here.try_post(settle)

    stopper = threading.Thread(target=stop, name=f"stop {iothread.context.name}")
    stopper.start()
    await ended
    stopper.join()  # after its post it has nothing more to do


async def _close_device(home: AioContext, device: Device) -> None:
    await home.run(device.close())
