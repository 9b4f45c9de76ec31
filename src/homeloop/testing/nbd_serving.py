"""Devices served over NBD to whoever is under test: from plain synchronous code, each test on its own.

The server runs in a Runtime on a background thread, the devices are at home in an IOThread; both begin with the first
device. The pytest plugin's fixtures are these objects; they need no pytest.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import tempfile
from asyncio import iscoroutine
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Final, TypeVar

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.block.fault_filter import FaultFilter, Script
from homeloop.block.faults import Faults
from homeloop.block.memory import Memory
from homeloop.block.sizes import parse_size
from homeloop.block.zeroes import ZEROES
from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.runtime import Runtime
from homeloop.errors import BlockError, UsageError
from homeloop.nbd.server import Server

__all__ = ["NbdServing", "ServedDevice"]

T = TypeVar("T")

_LIMIT_S: Final = 20.0          # for what the test thread waits for
_PIECE: Final = 1 << 20


class ServedDevice:
    """A device that is served, with its faults; the test's thread, or any other without a loop.

    uri: for clients. faults: rules for what they ask. device: what is served. The methods here reach below the faults:
    what they read and write is what the medium has.
    """

    def __init__(self, uri: str, device: Device, faults: Faults, below: Device, iothread: IOThread) -> None:
        self.uri = uri
        self.device = device
        self.faults = faults
        self.size = device.size
        self._below = below
        self._iothread = iothread

    def __repr__(self) -> str:
        return f"<ServedDevice {self.uri} {self.device!r} {self.faults!r}>"

    def read(self, offset: int, length: int) -> bytes:
        """What the medium has. BlockError as the driver raises it."""
        return bytes(_wait_for(self._iothread.context, _ask(self._below, "read", offset, length)))

    def write(self, offset: int, data: bytes) -> None:
        """Change the medium."""
        _wait_for(self._iothread.context, _ask(self._below, "write", offset, data))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Fill the medium from a file, from its first byte on; zeroes are not written."""
        with open(path, "rb") as file:
            offset = 0
            while piece := file.read(_PIECE):
                if piece != ZEROES[: len(piece)]:
                    self.write(offset, piece)
                offset += len(piece)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the medium to a file, sparse where it reads as zeroes."""
        with open(path, "wb") as file:
            file.truncate(self.size)
            for offset in range(0, self.size, _PIECE):
                piece = self.read(offset, min(_PIECE, self.size - offset))
                if piece != ZEROES[: len(piece)]:
                    file.seek(offset)
                    file.write(piece)


class NbdServing:
    """A server for tests. One thread without a loop; call it to serve a device. A context manager, or close() it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._server: Server | None = None                  # from the first device on
        self._runtime: Runtime | None = None
        self._iothread: IOThread | None = None
        self._served: dict[str, Device] = {}                # by the names of their exports
        self._faults: list[Script] = []                     # of these devices, as far as they are known
        self._number = 0

    def __enter__(self) -> NbdServing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, device: Device | Driver, *, name: str | None = None, read_only: bool = False) -> str:
        """Serve a device, or a driver; return its URI. It is closed with the server.

        name: of its export; None: "" for the first, and then one after the other. Faults over the driver are cleared
        before the end, so that nothing stalls it.
        """
        if isinstance(device, FaultFilter):
            self._faults.append(device.faults)
        if not isinstance(device, Device):
            device = Device(device)
        runtime, server, iothread = self._parts()
        self._number += 1
        if name is None:
            name = "" if self._number == 1 else f"device-{self._number}"
        if name in self._served:
            raise UsageError(f"{name!r} is served already")

        async def add() -> str:
            await server.add_export(name, device, iothread.context, read_only=read_only)
            return server.uri(name)

        uri = _wait_for(runtime.main, add())
        self._served[name] = device
        return uri

    def device(
        self, what: int | str | Driver | Device = "64M", *, faults: Faults | None = None, volatile: bool = False,
        seed: int = 0, name: str | None = None,
    ) -> ServedDevice:
        """Serve so much memory (bytes, or a size such as "64M"), or a driver, with faults over it.

        faults: None for its own, made with `volatile` and `seed`: see Faults.
        """
        driver = Memory(parse_size(what) if isinstance(what, str) else what) if isinstance(what, int | str) else what
        faults = Faults(seed=seed, volatile=volatile) if faults is None else faults
        over = faults.over(driver)
        device = Device(over, name="device")
        self._faults.append(faults)
        uri = self(device, name=name)
        assert self._iothread is not None, "served without an IOThread"
        return ServedDevice(uri, device, faults, over.inner, self._iothread)

    def close(self) -> None:
        """Clear the faults, cut the clients off, close the devices. Twice is fine.

        Raises AssertionError for a device that does not end, with what is in flight, or whose driver fails to.
        """
        failures: list[str] = []
        for faults in self._faults:
            faults.clear()
        if self._runtime is not None:
            for name, device in self._served.items():
                failures += self._end(name, device)
        self._served.clear()
        self._stack.close()
        self._server = self._runtime = self._iothread = None
        if failures:
            raise AssertionError("; ".join(failures))

    def _end(self, name: str, device: Device) -> Iterator[str]:
        runtime, server, iothread = self._parts()

        async def end() -> None:
            await server.remove_export(name, hard=True)
            await iothread.run(device.close())

        try:
            _wait_for(runtime.main, end())
        except TimeoutError:
            yield f"{device!r} did not end in {_LIMIT_S:g} s"
        except BlockError as error:
            yield f"{device!r} did not close well: {error}"

    def _parts(self) -> tuple[Runtime, Server, IOThread]:
        if self._server is None:
            folder = tempfile.mkdtemp(prefix="homeloop-")       # short: a unix socket's path may have 107 bytes
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._runtime = self._stack.enter_context(Runtime(name="nbd_server"))
            self._iothread = self._stack.enter_context(IOThread("nbd_device"))
            server = self._server = Server(self._runtime.main)
            runtime = self._runtime
            self._stack.callback(lambda: _wait_for(runtime.main, server.close()))
            _wait_for(runtime.main, server.listen(os.path.join(folder, "s")))
        assert self._runtime is not None
        assert self._iothread is not None
        return self._runtime, self._server, self._iothread


def _wait_for(context: AioContext, coro: Coroutine[Any, Any, T]) -> T:
    """Run it there and wait, in whatever thread this is. TimeoutError if it takes too long: it is cancelled.

    Not call(): that refuses a thread whose loop would stand still meanwhile. Here it may, as what is waited for needs
    nothing of it, and an asynchronous test is not better off for awaiting a look at the medium.
    """
    ended: concurrent.futures.Future[T] = concurrent.futures.Future()

    async def run() -> None:
        try:
            ended.set_result(await coro)
        except BaseException as error:
            ended.set_exception(error)

    running = context.spawn(run())
    try:
        return ended.result(_LIMIT_S)
    except TimeoutError:
        running.cancel()
        raise


async def _ask(device: Device, method: str, *args: Any) -> Any:
    answer = getattr(device, method)(*args)
    return await answer if iscoroutine(answer) else answer
