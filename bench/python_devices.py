"""The devices of rows_python.py, served by us: python -m bench.python_devices KIND SOCKET; and of rows_beside.py.

All keep their bytes in one bytearray; what differs is how their methods are written. nbdkit_device.py is the same for
nbdkit's Python plugin.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import homeloop
from bench.nbd_servers import EXPORT
from homeloop import nbd
from homeloop.block.driver import Driver

SIZE = 64 << 20
LATENCY_S = 5e-3
BURN_S = 20e-3


class Serialised:
    """Plain methods, one at a time: what thread_model is unless a driver says otherwise."""

    size = SIZE

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def read(self, offset: int, length: int) -> bytes | bytearray:
        return self.data[offset : offset + length]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Do nothing."""


class Parallel(Serialised):
    """The same, several at a time."""

    thread_model = "parallel"


class Async:
    """The same as coroutines that do not wait."""

    size = SIZE

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        return self.data[offset : offset + length]

    async def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        """Do nothing."""


class SlowParallel(Parallel):
    """Each read takes its time, on a worker thread."""

    def read(self, offset: int, length: int) -> bytes | bytearray:
        time.sleep(LATENCY_S)
        return super().read(offset, length)


class SlowAsync(Async):
    """Each read takes its time, on the home thread."""

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        await asyncio.sleep(LATENCY_S)
        return self.data[offset : offset + length]


class Sleeping(SlowParallel):
    """The neighbour of rows_beside.py that sleeps: its requests hold worker threads and nothing else."""


class Burning(Serialised):
    """The neighbour that burns CPU: Python code on a worker thread that never lets the GIL go by itself."""

    def read(self, offset: int, length: int) -> bytes | bytearray:
        until = time.perf_counter() + BURN_S
        while time.perf_counter() < until:
            pass
        return super().read(offset, length)


KINDS: dict[str, Callable[[], Driver]] = {
    "serialised": Serialised,
    "parallel": Parallel,
    "async": Async,
    "slow-parallel": SlowParallel,
    "slow-async": SlowAsync,
}


async def serve(kind: str, path: str) -> None:
    async with nbd.serve(KINDS[kind](), name=EXPORT, socket=path):
        await asyncio.Event().wait()


if __name__ == "__main__":
    homeloop.run(serve(*sys.argv[1:]))
