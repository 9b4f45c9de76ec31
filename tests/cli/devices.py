"""The command with devices for tests: python -m tests.cli.devices serve stuck:1M ...

    stuck:FIFO      reads at 0 wait on a worker until somebody opens FIFO for writing; 1 MiB
    loop:FIFO       the same on the IOThread's own loop: nothing of the export goes on meanwhile
    log:IMAGE       a file whose requests take 2 ms each; beside it, IMAGE.log has a line for each flush and close
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from homeloop.block.device import Device
from homeloop.block.driver import BytesLike
from homeloop.block.file import File
from homeloop.block.opening import open_device
from homeloop.cli import serve
from homeloop.cli.main import main
from homeloop.daemon import exporting

SLOW_S = 0.002


class Stuck:
    """Reads of its first block are answered when somebody writes to the FIFO."""

    size = 1 << 20
    thread_model = "parallel"

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, offset: int, length: int) -> BytesLike:
        if offset == 0:
            self._wait()
        return bytes(length)

    def _wait(self) -> None:
        sys.stderr.write("stuck\n")
        sys.stderr.flush()
        with open(self._path, "rb") as fifo:
            fifo.read(1)

    def write(self, offset: int, data: BytesLike) -> None:
        pass

    def flush(self) -> None:
        sys.stderr.write("flushed\n")
        sys.stderr.flush()


class StuckLoop(Stuck):
    """Its loop is what waits."""

    async def read(self, offset: int, length: int) -> BytesLike:     # type: ignore[override]
        return Stuck.read(self, offset, length)


class Logged:
    """A file that takes its time, and notes what must not be forgotten."""

    def __init__(self, path: str) -> None:
        self._file = File(path)
        self._log = open(f"{path}.log", "a", buffering=1)        # noqa: SIM115 - closed by close()
        self.size = self._file.size

    async def read(self, offset: int, length: int) -> BytesLike:
        await asyncio.sleep(SLOW_S)     # tidy: allow sleep: what a disk takes
        return self._file.read(offset, length)

    async def write(self, offset: int, data: BytesLike) -> None:
        await asyncio.sleep(SLOW_S)     # tidy: allow sleep: what a disk takes
        self._file.write(offset, data)
        self._log.write(f"write {offset}\n")

    async def flush(self) -> None:
        self._file.flush()
        self._log.write("flush\n")

    def close(self) -> None:
        self._file.close()
        self._log.write("close\n")
        self._log.close()


KINDS = {"stuck": Stuck, "loop": StuckLoop, "log": Logged}


def open_test_device(spec: str, **options: Any) -> Device:
    kind, _colon, rest = spec.partition(":")
    return Device(KINDS[kind](rest), name=kind) if kind in KINDS else open_device(spec, **options)


if __name__ == "__main__":
    exporting.open_device = open_test_device        # type: ignore[attr-defined]
    serve.STATUS_EVERY_S = float(os.environ.get("STATUS_EVERY_S", "1"))
    raise SystemExit(main())
