"""The examples of docs/filters.md run, and it names every filter and option that there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from homeloop.block.filters.specs import option_names

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "filters.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- run by tests/block/filters/test_docs.py -->\n```python\n(.*?)```", TEXT, re.DOTALL)
LIMIT_S = 50.0


@pytest.mark.parametrize("code", EXAMPLES, ids=["use", "own"])
def test_examples(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True,
        text=True, timeout=LIMIT_S, check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_filter_and_option_is_there() -> None:
    rows = {row.split("`")[1].lower(): row for row in TEXT.splitlines() if row.startswith("| `")}
    assert rows.keys() == option_names().keys()
    for name, options in option_names().items():
        told = re.findall(r"`([a-z-]+)=", rows[name])
        assert sorted(told) == sorted(options), name
