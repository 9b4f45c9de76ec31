"""`homeloop copy` against nbdcopy and qemu-img convert: whole images between a file and an nbdkit server.

Each copies the same image without holes from or to a server of its own, of the same kind, with its own defaults; the
time is the whole program's, its start included. Files are in memory (tmpfs).
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.measure import Contender, Missing, Round, Row, mib_per_second
from bench.nbd_servers import COPY_WITHIN_S, copy, make_image, nbdkit_server, need_command, scratch

__all__ = ["rows"]

# The command line of one copy: source and target in, words out.
Command = Callable[[str, str], list[str]]


def homeloop_copy(source: str, target: str) -> list[str]:
    return [sys.executable, "-m", "homeloop", "copy", source, target]


def nbdcopy(source: str, target: str) -> list[str]:
    return [need_command("nbdcopy"), source, target]


def qemu_img(source: str, target: str) -> list[str]:
    # -n: the target is there, an export always is; a file must then be there as well.
    return [need_command("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", source, target]


def seconds_of(command: list[str]) -> float:
    # Ours runs as it does when it is installed: with its bytecode.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COPY_WITHIN_S, check=False, env=environment
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise Missing(f"{' '.join(command)} exited with {done.returncode}: {said}")
    return seconds


@contextlib.contextmanager
def copies(command: Command, into: bool, size: int) -> Iterator[Round]:
    """A running server that has the image, and the image."""
    with scratch() as folder, nbdkit_server(["memory", str(size)], folder) as uri:
        image = str(make_image(Path(folder) / "image", size))
        copy(image, uri)
        source, target = (image, uri) if into else (uri, image)
        command(source, target)         # who is missing says so before the first round
        yield lambda count: sum(seconds_of(command(source, target)) for _ in range(count))


def copy_row(into: bool, size: int) -> Row:
    opening = functools.partial(functools.partial, copies, into=into, size=size)
    return Row(
        name=f"homeloop copy, {size >> 20} MiB {'into' if into else 'out of'} nbdkit memory",
        unit=mib_per_second(size),
        count=1,
        contenders=[
            Contender(name="homeloop", open=opening(homeloop_copy), ours=True),
            Contender(name="nbdcopy", open=opening(nbdcopy)),
            Contender(name="qemu-img convert", open=opening(qemu_img)),
        ],
        targets={"nbdcopy": 0.8, "qemu-img convert": 0.8},
    )


def rows(size: int) -> list[Row]:
    return [copy_row(into, size) for into in (True, False)]
