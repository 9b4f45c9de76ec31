"""Devices written in Python against nbdkit's Python plugin, and files that the page cache does not have.

The device is a bytearray in every case: bench/python_devices.py and bench/nbdkit_device.py. Served over one connection
on a unix socket, read and written by fio in blocks of 4 KiB.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from bench.measure import PER_SECOND, Contender, Missing, Round, Row
from bench.nbd_servers import homeloop_server, make_image, nbdkit_server, need_command, running, scratch
from bench.rows_nbd import NbdPlan, fio_per_s, need_fio

HERE = Path(__file__).resolve().parent
DEVICE_BYTES = 64 << 20
SLOW_DEPTH = 256

Start = Callable[[Path], AbstractContextManager[str]]               # folder -> URI
Serve = Callable[[Path, Path], AbstractContextManager[str]]         # image, folder -> URI


def ours(kind: str, folder: Path) -> AbstractContextManager[str]:
    path = folder / "homeloop.sock"
    return running([sys.executable, "-m", "bench.python_devices", kind, str(path)], path)


def theirs(model: str, folder: Path, *, threads: int = 16, latency: float = 0) -> AbstractContextManager[str]:
    plugin = ["-t", str(threads), "python", str(HERE / "nbdkit_device.py"), f"model={model}", f"latency={latency}"]
    return nbdkit_server(plugin, folder)


@contextlib.contextmanager
def requests(start: Start, kind: str, depth: int, size: int, plan: NbdPlan) -> Iterator[Round]:
    need_fio()
    with scratch() as folder, start(folder) as uri:
        yield lambda count: count / fio_per_s(uri, kind, depth, size, plan.fio_s)


def device_row(methods: str, kind: str, depth: int, plan: NbdPlan) -> Row:
    def contender(name: str, start: Start, *, is_ours: bool = False) -> Contender:
        opening = functools.partial(requests, start, kind, depth, DEVICE_BYTES, plan)
        return Contender(name=name, open=opening, ours=is_ours)

    models = ("async",) if methods == "async" else ("serialised", "parallel")
    target = 2.0 if methods == "async" else 3.0
    return Row(
        name=f"NBD 4k {kind}, trivial Python device, {methods} methods, depth {depth} (fio)",
        unit=PER_SECOND,
        count=1,
        contenders=[
            *(contender(f"homeloop {model}", functools.partial(ours, model), is_ours=True) for model in models),
            contender("nbdkit serialised", functools.partial(theirs, "serialize_requests")),
            contender("nbdkit parallel", functools.partial(theirs, "parallel")),
        ],
        targets={"nbdkit serialised": target, "nbdkit parallel": target},
    )


def slow_row(plan: NbdPlan) -> Row:
    def contender(name: str, start: Start, *, is_ours: bool = False) -> Contender:
        opening = functools.partial(requests, start, "randread", SLOW_DEPTH, DEVICE_BYTES, plan)
        return Contender(name=name, open=opening, ours=is_ours)

    return Row(
        name=f"NBD 4k randread, Python device of 5 ms, depth {SLOW_DEPTH} (fio)",
        unit=PER_SECOND,
        count=1,
        contenders=[
            contender("homeloop async", functools.partial(ours, "slow-async"), is_ours=True),
            contender("homeloop parallel", functools.partial(ours, "slow-parallel")),
            contender("nbdkit parallel -t64", functools.partial(theirs, "parallel", threads=64, latency=0.005)),
        ],
        targets={"nbdkit parallel -t64": 2.5},
    )


@contextlib.contextmanager
def cold_reads(serve: Serve, depth: int, plan: NbdPlan) -> Iterator[Round]:
    """Random reads of a file on a disk; the page cache forgets it before each round."""
    need_fio()
    size = min(plan.size, 256 << 20)
    with tempfile.TemporaryDirectory(prefix="homeloop-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        image = make_image(folder / "cold.img", size)
        with serve(image, folder) as uri:

            def round_(count: int) -> float:
                forget(image)
                return count / fio_per_s(uri, "randread", depth, size, plan.fio_s)

            yield round_


def forget(image: Path) -> None:
    """Drop the file's pages from the cache."""
    if not hasattr(os, "posix_fadvise"):
        raise Missing("no posix_fadvise here: the page cache cannot be told to forget")
    fd = os.open(image, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def homeloop_image(image: Path, folder: Path) -> AbstractContextManager[str]:
    return homeloop_server(str(image), folder)


def nbdkit_image(image: Path, folder: Path) -> AbstractContextManager[str]:
    need_command("nbdkit")
    return nbdkit_server(["file", str(image)], folder)


def cold_row(depth: int, plan: NbdPlan) -> Row:
    return Row(
        name=f"NBD 4k randread, file that is not cached, depth {depth} (fio)",
        unit=PER_SECOND,
        count=1,
        contenders=[
            Contender(name="homeloop", open=functools.partial(cold_reads, homeloop_image, depth, plan), ours=True),
            Contender(name="nbdkit", open=functools.partial(cold_reads, nbdkit_image, depth, plan)),
        ],
        targets={"nbdkit": 0.8},
    )


def rows(plan: NbdPlan) -> list[Row]:
    devices = [
        device_row(methods, kind, depth, plan)
        for methods in ("plain", "async") for kind in ("randread", "randwrite") for depth in (16, 64)
    ]
    return [*devices, slow_row(plan), cold_row(16, plan)]
