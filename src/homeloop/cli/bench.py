"""`homeloop bench`: the benchmarks of the repository, which a package does not carry."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from homeloop.errors import UsageError

__all__ = ["bench", "checkout"]

# src/homeloop/cli/bench.py in a checkout
ROOT = Path(__file__).resolve().parents[3]


def checkout() -> Path | None:
    """The source checkout that this package runs from, or None: it is installed without one."""
    # Not whatever is importable as `bench`: many projects have one.
    here = ROOT / "src" / "homeloop" / "cli" / "bench.py"
    return ROOT if here == Path(__file__).resolve() and (ROOT / "bench" / "__main__.py").is_file() else None


def bench(options: argparse.Namespace) -> int:
    """Run the repository's benchmarks with the arguments that follow; return the exit status."""
    root = checkout()
    if root is None:
        raise UsageError("the benchmarks are not part of the package: run it in a source checkout, or `make bench`")
    sys.path.insert(0, str(root))
    try:
        run = importlib.import_module("bench.__main__").main
    finally:
        sys.path.remove(str(root))
    return int(run(options.arguments))
