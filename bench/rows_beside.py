"""How long the slowest requests of an export take while its neighbour in the same daemon is a bad one.

The export is memory; the neighbour is a Python device that sleeps, or that burns CPU. Each has an IOThread. What is
shown is the 99th percentile of 4 KiB reads, one at a time, as fio sees it; alone is the same daemon with its neighbour
idle. The client of the neighbour shares the processors too, and on two of them that is part of the figure.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Better, Contender, Round, Row, Unit
from bench.nbd_servers import running, scratch
from bench.python_devices import SIZE
from bench.rows_nbd import FIO_SLACK_S, NbdPlan, fio_command, fio_job, need_fio

__all__ = ["rows"]

P99 = Unit("µs at p99", Better.LOWER, lambda seconds: seconds * 1e6)
NEIGHBOUR_DEPTH = 16
# No more than 1.5 times as long as alone.
ASLEEP = 1 / 1.5
BURNING_LIMIT_S = 2e-3


@contextlib.contextmanager
def served(neighbour: str, folder: Path) -> Iterator[tuple[str, str]]:
    """The daemon with both exports: the URI of the one that is measured and of its neighbour."""
    path = folder / "homeloop.sock"
    sources = [f"memory:{SIZE}", f"python:bench.python_devices:{neighbour}"]
    command = [sys.executable, "-m", "homeloop", "serve", *sources, "--iothreads", "2", "--socket", str(path)]
    with running(command, path):
        yield f"nbd+unix:///memory?socket={path}", f"nbd+unix:///{neighbour}?socket={path}"


@contextlib.contextmanager
def loaded(uri: str, seconds: float) -> Iterator[None]:
    """Requests to the neighbour, until the block ends."""
    command = fio_command(uri, "randread", NEIGHBOUR_DEPTH, SIZE, seconds)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the neighbour's fio ended early, with {process.returncode}")
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def slowest(neighbour: str, busy: bool, plan: NbdPlan) -> Iterator[Round]:
    need_fio()
    with scratch() as folder, served(neighbour, folder) as (uri, beside):

        def round_(count: int) -> float:
            load = loaded(beside, plan.fio_s + FIO_SLACK_S) if busy else contextlib.nullcontext()
            with load:
                job = fio_job(uri, "randread", 1, SIZE, plan.fio_s)
            return count * float(job["read"]["clat_ns"]["percentile"]["99.000000"]) / 1e9

        yield round_


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[Round]:
    """Not measured: what must not be passed, as a contender to be compared with."""
    yield lambda count: count * seconds


def asleep_row(plan: NbdPlan) -> Row:
    return Row(
        name="NBD p99 beside an export whose device sleeps (fio)",
        unit=P99,
        count=1,
        contenders=[
            Contender(name="beside", open=functools.partial(slowest, "Sleeping", True, plan), ours=True),
            Contender(name="alone", open=functools.partial(slowest, "Sleeping", False, plan)),
        ],
        targets={"alone": ASLEEP},
    )


def burning_row(plan: NbdPlan) -> Row:
    return Row(
        name="NBD p99 beside an export whose device burns CPU (fio)",
        unit=P99,
        count=1,
        contenders=[
            Contender(name="beside", open=functools.partial(slowest, "Burning", True, plan), ours=True),
            Contender(name="alone", open=functools.partial(slowest, "Burning", False, plan)),
            Contender(name="the limit, 2 ms", open=functools.partial(limit, BURNING_LIMIT_S)),
        ],
        targets={"the limit, 2 ms": 1.0},
    )


def rows(plan: NbdPlan) -> list[Row]:
    return [asleep_row(plan), burning_row(plan)]
