"""The device of rows_python.py for nbdkit's Python plugin: nbdkit python nbdkit_device.py model=parallel.

latency=SECONDS makes reads slow.

nbdkit embeds a Python of its own, which knows nothing of ours: nothing is imported but the standard library.
"""

from __future__ import annotations

import time
from typing import Any

import nbdkit  # type: ignore[import-not-found]

API_VERSION = 2
SIZE = 64 << 20

options = {"model": "serialize_requests", "latency": "0"}
data = bytearray(SIZE)
latency_s = 0.0


def config(key: str, value: str) -> None:
    options[key] = value


def config_complete() -> None:
    global latency_s
    latency_s = float(options["latency"])


def thread_model() -> Any:
    return getattr(nbdkit, "THREAD_MODEL_" + options["model"].upper())


def open(readonly: bool) -> Any:
    return 1


def get_size(handle: Any) -> int:
    return SIZE


def pread(handle: Any, buffer: bytearray, offset: int, flags: int) -> None:
    if latency_s:
        time.sleep(latency_s)
    buffer[:] = data[offset : offset + len(buffer)]


def pwrite(handle: Any, buffer: bytearray, offset: int, flags: int) -> None:
    data[offset : offset + len(buffer)] = buffer


def flush(handle: Any, flags: int) -> None:
    pass
