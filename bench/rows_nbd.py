"""The daemon against nbdkit, nbd-server and qemu-nbd: random requests with fio, whole copies with nbdcopy.

Every server is a process of its own on a unix socket and serves the same image without holes. memory: the memory
devices of homeloop and nbdkit, filled by nbdcopy; the others have none and serve a file in memory (tmpfs). Files
are in tmpfs too, one copy for each server. Clients run with their defaults, but for what the row's name says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import PER_SECOND, Contender, Missing, Round, Row, mib_per_second
from bench.nbd_servers import (
    copy,
    homeloop_server,
    make_image,
    nbd_server,
    nbdkit_server,
    need_command,
    qemu_nbd_server,
    scratch,
)

FIO_SLACK_S = 60.0


@dataclass(frozen=True, slots=True)
class NbdPlan:
    """How much is served, and how long fio works."""

    size: int           # bytes that are copied, a multiple of 1 MiB
    fio_size: int       # likewise, for random requests: one copy for each server, all at once
    fio_s: float


# A server to start: with the image that it is to serve (read only) and a folder of its own.
Start = Callable[[Path, Path], AbstractContextManager[str]]


def homeloop_memory(image: Path, folder: Path) -> AbstractContextManager[str]:
    return homeloop_server(f"memory:{image.stat().st_size}", folder)


def nbdkit_memory(image: Path, folder: Path) -> AbstractContextManager[str]:
    return nbdkit_server(["memory", str(image.stat().st_size)], folder)


def homeloop_file(image: Path, folder: Path) -> AbstractContextManager[str]:
    return homeloop_server(str(make_image(folder / "homeloop.img", image.stat().st_size)), folder)


def nbdkit_file(image: Path, folder: Path) -> AbstractContextManager[str]:
    return nbdkit_server(["file", str(make_image(folder / "nbdkit.img", image.stat().st_size))], folder)


def qemu_file(image: Path, folder: Path) -> AbstractContextManager[str]:
    return qemu_nbd_server(make_image(folder / "qemu.img", image.stat().st_size), folder)


def reference_file(image: Path, folder: Path) -> AbstractContextManager[str]:
    return nbd_server(make_image(folder / "nbd-server.img", image.stat().st_size), folder)


@contextlib.contextmanager
def filled(start: Start, size: int) -> Iterator[tuple[str, Path]]:
    """A running server with the image's content, and the image. Yields its URI and the image's path."""
    need_command("nbdcopy")
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        image = make_image(folder / "content.img", size)
        uri = stack.enter_context(start(image, folder))
        copy(str(image), uri)
        yield uri, image


@contextlib.contextmanager
def random_requests(start: Start, kind: str, depth: int, connections: int, plan: NbdPlan) -> Iterator[Round]:
    need_fio()
    with filled(start, plan.fio_size) as (uri, image):
        image.unlink()                  # not needed any more, and it is memory
        yield lambda count: count / fio_per_s(uri, kind, depth, plan.fio_size, plan.fio_s, connections)


@contextlib.contextmanager
def copies_out(start: Start, plan: NbdPlan) -> Iterator[Round]:
    with filled(start, plan.size) as (uri, _):
        yield lambda count: sum(copy(uri, "null:") for _ in range(count))


@contextlib.contextmanager
def copies_into(start: Start, plan: NbdPlan) -> Iterator[Round]:
    with filled(start, plan.size) as (uri, image):
        yield lambda count: sum(copy(str(image), uri) for _ in range(count))


SERVED: dict[str, tuple[Start, Start]] = {
    "memory": (homeloop_memory, nbdkit_memory),
    "a cached file": (homeloop_file, nbdkit_file),
}


def need_fio() -> None:
    fio = need_command("fio")
    engines = subprocess.run([fio, "--enghelp"], capture_output=True, text=True, check=False).stdout
    if "nbd" not in engines.split():
        raise Missing("this fio has no nbd engine")


def fio_per_s(uri: str, kind: str, depth: int, size: int, seconds: float, connections: int = 1) -> float:
    """Requests of 4 KiB a second. kind: randread or randwrite, over `size` bytes; depth: on each connection."""
    job = fio_job(uri, kind, depth, size, seconds, connections)
    iops: float = job[kind.removeprefix("rand")]["iops"]
    return iops


def fio_command(uri: str, kind: str, depth: int, size: int, seconds: float, connections: int = 1) -> list[str]:
    return [
        need_command("fio"), "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--size={size}",
        f"--rw={kind}", "--bs=4k", f"--iodepth={depth}", "--norandommap", "--thread",
        f"--numjobs={connections}", "--group_reporting",
        "--time_based", f"--runtime={round(seconds * 1000)}ms", "--ramp_time=200ms", "--output-format=json",
    ]


def fio_job(uri: str, kind: str, depth: int, size: int, seconds: float, connections: int = 1) -> Any:
    """What fio found, as its JSON says it: all connections together."""
    done = subprocess.run(
        fio_command(uri, kind, depth, size, seconds, connections),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds + FIO_SLACK_S, check=False,
    )
    # fio may print notes before the JSON.
    text = done.stdout[done.stdout.find("{"):]
    if done.returncode != 0 or not text:
        raise Missing(f"fio exited with {done.returncode}: {(done.stderr or done.stdout).strip()[:200]}")
    return json.loads(text)["jobs"][0]


def requests_row(kind: str, served: str, depth: int, connections: int, plan: NbdPlan) -> Row:
    opening = functools.partial(
        functools.partial, random_requests, kind=kind, depth=depth, connections=connections, plan=plan
    )
    ours, theirs = SERVED[served]
    over = "" if connections == 1 else f", {connections} connections"
    return Row(
        name=f"NBD 4k {kind}, {served}, depth {depth}{over} (fio)",
        unit=PER_SECOND,
        count=1,
        contenders=[
            Contender(name="homeloop", open=opening(ours), ours=True),
            Contender(name="nbdkit", open=opening(theirs)),
            Contender(name="nbd-server", open=opening(reference_file)),
            Contender(name="qemu-nbd", open=opening(qemu_file)),
        ],
        targets={"nbdkit": 0.8} if depth == 1 else {"nbdkit": 1.2, "qemu-nbd": 4.0},
    )


def copy_row(where: str, kind: str, plan: NbdPlan) -> Row:
    copies = copies_out if where == "out of" else copies_into
    opening = functools.partial(functools.partial, copies, plan=plan)
    ours, theirs = SERVED[kind]
    return Row(
        name=f"nbdcopy {plan.size >> 20} MiB {where} {kind}",
        unit=mib_per_second(plan.size),
        count=1,
        contenders=[
            Contender(name="homeloop", open=opening(ours), ours=True),
            Contender(name="nbdkit", open=opening(theirs)),
            Contender(name="qemu-nbd", open=opening(qemu_file)),
        ],
        targets={"nbdkit": 1.0},
    )


def rows(plan: NbdPlan) -> list[Row]:
    first = requests_row("randread", "memory", 1, 1, plan)
    requests = [
        requests_row(kind, served, depth, connections, plan)
        for kind in ("randread", "randwrite") for served in SERVED for depth in (16, 64) for connections in (1, 4)
    ]
    copies = [copy_row(where, kind, plan) for kind in SERVED for where in ("out of", "into")]
    return [first, *requests, *copies]
