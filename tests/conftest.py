"""What holds for every test: foreign programs are named, order is shuffled, threads are not left behind.

HOMELOOP_SEED repeats a run: it orders the tests and feeds the `seed` fixture. CI (any value) turns a missing
foreign program from a skip into a failure.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Iterator

import pytest

SEED = int(os.environ.get("HOMELOOP_SEED") or random.SystemRandom().randrange(2**32))
THREADS_END_WITHIN_S = 3.0

# Where Debian keeps them: what to install is part of the message.
PACKAGE_OF = {
    "fio": "fio",
    "certtool": "gnutls-bin",
    "e2fsck": "e2fsprogs",
    "fstrim": "util-linux",
    "fusermount3": "fuse3",
    "losetup": "mount",
    "mke2fs": "e2fsprogs",
    "mount": "mount",
    "nbd-client": "nbd-client",
    "nbd-server": "nbd-server",
    "nbdcopy": "libnbd-bin",
    "nbddump": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nbdsh": "python3-libnbd",
    "openssl": "openssl",
    "qemu-img": "qemu-utils",
    "sfdisk": "fdisk",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
}


def pytest_report_header() -> str:
    return f"seed: HOMELOOP_SEED={SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle the files, and the tests within each file: no test may lean on the one before it."""
    shuffle = random.Random(SEED)
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.nodeid.partition("::")[0], []).append(item)
    files = list(by_file.values())
    shuffle.shuffle(files)
    for file in files:
        shuffle.shuffle(file)
    items[:] = [item for file in files for item in file]


def pytest_runtest_setup(item: pytest.Item) -> None:
    commands = [name for mark in item.iter_markers("foreign") for name in mark.args]
    missing = [name for name in commands if shutil.which(name) is None]
    if not missing:
        return
    named = ", ".join(f"{name} (Debian: {PACKAGE_OF.get(name, '?')})" for name in missing)
    if os.environ.get("CI"):
        pytest.fail(f"in CI these must be installed: {named}", pytrace=False)
    pytest.skip(f"not installed: {named}")


@pytest.fixture
def seed() -> int:
    """The seed of this run; pytest shows it with a failure."""
    print(f"HOMELOOP_SEED={SEED}")
    return SEED


@pytest.fixture(autouse=True)
def no_threads_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves threads behind (leaves_threads("why") where a wider fixture ends them)."""
    before = set(threading.enumerate())
    yield
    if request.node.get_closest_marker("leaves_threads") is not None:
        return
    deadline = time.monotonic() + THREADS_END_WITHIN_S
    # Dummies stand for threads that Python did not start; nobody can join those.
    dummy = threading._DummyThread      # type: ignore[attr-defined]
    started = [t for t in threading.enumerate() if t not in before and not isinstance(t, dummy)]
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread.name for thread in started if thread.is_alive()]
    if left:
        named = ", ".join(left)
        pytest.fail(f"threads still run {THREADS_END_WITHIN_S:.0f} s after the test: {named}", pytrace=False)
