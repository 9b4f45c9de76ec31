"""docs/migrating.md: each pair of examples/migrating/ does the same before and after, and the page shows both.

A "before" whose library is not installed is skipped by name; its "after" runs all the same.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "migrating"
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
AFTER = sorted(FOLDER.glob("*_after.py"))
RUN_LIMIT_S = 40        # each runs for less than a second; the rest is for a busy machine


def before(after: Path) -> Path:
    return after.with_name(after.name.replace("_after", "_before"))


def missing_libraries(path: Path) -> Iterator[str]:
    """The libraries that a file imports and that are not installed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            if top != "homeloop" and importlib.util.find_spec(top) is None:
                yield top


def started(path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    if "_after" in path.name:           # the libraries of others may warn of what they like
        environment["PYTHONWARNINGS"] = "error"
    return subprocess.Popen(
        [sys.executable, str(path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output_of(run: subprocess.Popen[str]) -> str:
    try:
        printed, errors = run.communicate(timeout=RUN_LIMIT_S)
    finally:
        run.kill()
        run.wait()
    assert (run.returncode, errors) == (0, "")
    return printed


@pytest.mark.parametrize("after", AFTER, ids=lambda path: path.stem.removesuffix("_after"))
def test_after_prints_what_before_did(after: Path) -> None:
    missing = sorted({*missing_libraries(before(after))})
    assert not set(missing_libraries(after))
    runs = [started(after)] if missing else [started(after), started(before(after))]
    printed = [output_of(run) for run in runs]
    assert printed[0]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; only the example after the change was run")
    assert printed[0] == printed[1]


def test_every_pair_is_whole_and_on_the_page() -> None:
    names = {path.name for path in FOLDER.glob("*.py")}
    pairs = {name for after in AFTER for name in (after.name, before(after).name)}
    assert names == pairs
    shown = re.findall(r"^<!-- examples/migrating/(\S+) -->$", PAGE, re.MULTILINE)
    assert sorted(shown) == sorted(names)
