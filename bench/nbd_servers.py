"""NBD servers as processes of their own, on unix sockets, each with the same content to serve."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.measure import Missing

EXPORT = "bench"
START_WITHIN_S = 15.0
STOP_WITHIN_S = 10.0
COPY_WITHIN_S = 300.0


def need_command(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise Missing(f"{name} is not installed")
    return path


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: what is measured is the server, not a disk."""
    shm = Path("/dev/shm")
    parent = shm if os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="homeloop-bench-", dir=parent) as folder:
        yield Path(folder)


def make_image(path: Path, size: int) -> Path:
    """An image without holes, no two blocks alike: nothing can be skipped or found by its pattern."""
    chunk = os.urandom(1 << 20)
    with path.open("wb") as image:
        for number in range(size >> 20):
            image.write(number.to_bytes(8, "big") + chunk[8:])
    return path


def homeloop_server(source: str, folder: Path) -> contextlib.AbstractContextManager[str]:
    """`source`: what `homeloop serve` takes: memory:SIZE or a file."""
    path = folder / "homeloop.sock"
    command = [sys.executable, "-m", "homeloop", "serve", source, "--name", EXPORT, "--socket", str(path)]
    return running(command, path)


def nbdkit_server(plugin: Sequence[str], folder: Path) -> contextlib.AbstractContextManager[str]:
    path = folder / "nbdkit.sock"
    return running([need_command("nbdkit"), "-f", "-U", str(path), *plugin], path)


def qemu_nbd_server(image: Path, folder: Path) -> contextlib.AbstractContextManager[str]:
    path = folder / "qemu.sock"
    options = ["-f", "raw", "-t", "-e", "16", "-x", EXPORT, "-k", str(path)]
    return running([need_command("qemu-nbd"), *options, str(image)], path)


@contextlib.contextmanager
def nbd_server(image: Path, folder: Path) -> Iterator[str]:
    """The reference server, a process for each connection. It goes into the background, or serves but one client."""
    path, config, pid = folder / "nbd-server.sock", folder / "nbd-server.conf", folder / "nbd-server.pid"
    config.write_text(f"[generic]\nunixsock = {path}\n[{EXPORT}]\nexportname = {image}\n", encoding="utf-8")
    command = [need_command("nbd-server"), "-C", str(config), "-p", str(pid)]
    # It closes what it inherited; only its first process is waited for.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        if process.wait(START_WITHIN_S):
            raise Missing(f"nbd-server exited with {process.returncode}")
        wait_connected(path)
        yield f"nbd+unix:///{EXPORT}?socket={path}"
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid.read_text(encoding="utf-8")), signal.SIGTERM)


def wait_connected(path: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.02)
    raise Missing(f"does not accept on its socket after {START_WITHIN_S:.0f} s")


@contextlib.contextmanager
def running(command: Sequence[str], path: Path) -> Iterator[str]:
    """Start a server, wait until it accepts, yield its URI, end it with SIGTERM."""
    log_path = path.with_suffix(".log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_accepting(process, path, log_path)
        yield f"nbd+unix:///{EXPORT}?socket={path}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_accepting(process: subprocess.Popen[bytes], path: Path, log_path: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log_path.read_text(errors="replace").strip().splitlines()
            last = said[-1][-80:] if said else "without a word"
            raise Missing(f"exited with {process.returncode}: {last}")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.02)
    raise Missing(f"does not accept on its socket after {START_WITHIN_S:.0f} s")


def copy(source: str, target: str) -> float:
    """nbdcopy with its own choice of connections and requests; the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [need_command("nbdcopy"), source, target],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=COPY_WITHIN_S, check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise Missing(f"nbdcopy {source} {target} exited with {done.returncode}: {said}")
    return seconds
