"""Where a run was made: numbers without the machine and the versions are worth nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("homeloop", "uvloop", "anyio", "asgiref", "aiologic", "culsans", "janus")
COMMANDS = ("nbdkit", "qemu-nbd", "nbdcopy", "fio")
MISSING = "not installed"


def describe() -> dict[str, str]:
    """Plain values for the report and the JSON file."""
    return {
        "cpu": cpu_model(),
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        # Before the first row: on a machine that others use, two threads land on one core or on two by chance, and
        # a hand-over between threads costs 30 or 140 µs by that alone.
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}, {gil()}",
    }


def versions() -> dict[str, str]:
    """Every peer, the missing ones too."""
    found = {name: package_version(name) for name in PACKAGES}
    return found | {name: command_version(name) for name in COMMANDS}


def cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return model[1] if model else platform.machine()


def gil() -> str:
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    return "with the GIL" if enabled else "without the GIL"


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def command_version(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return MISSING
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    number = re.search(r"\d+(\.\d+)+", said)
    return number[0] if number else "?"
