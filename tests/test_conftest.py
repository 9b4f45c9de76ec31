"""What conftest.py promises: foreign programs by name, seeds that repeat, threads that fail their test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")
PYPROJECT = CONFTEST.parent.parent / "pyproject.toml"


def run_pytest(folder: Path, body: str, **environment: str) -> str:
    """Run `body` as a test file under our conftest; the output."""
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "test_planted.py").write_text(body, encoding="utf-8")
    # The parent's CI and seed are not this run's.
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "HOMELOOP_SEED")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "-c", str(PYPROJECT),
         "--rootdir", str(folder), str(folder)],
        cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=50, check=False,
    )
    return done.stdout + done.stderr


FOREIGN = """
import pytest

@pytest.mark.foreign("python-no-such-program", "sh")
def test_peer(): pass
"""


def test_missing_program_is_a_skip_by_name_and_a_failure_in_ci(tmp_path: Path) -> None:
    assert "not installed: python-no-such-program" in run_pytest(tmp_path, FOREIGN)
    output = run_pytest(tmp_path, FOREIGN, CI="true")
    assert "in CI these must be installed: python-no-such-program" in output
    assert "1 error" in output or "1 failed" in output


def test_thread_left_behind_fails_its_test(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, """
import threading
import pytest

def test_left():
    threading.Thread(target=threading.Event().wait, args=(20,), name="left-over", daemon=True).start()

@pytest.mark.leaves_threads("ends with the process")
def test_allowed():
    threading.Thread(target=threading.Event().wait, args=(20,), daemon=True).start()

def test_joined():
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()
""")
    assert "left-over" in output
    assert "3 passed, 1 error" in output


def test_order_is_shuffled_and_repeats_with_its_seed(tmp_path: Path) -> None:
    body = "import pytest\n@pytest.mark.parametrize('n', range(30))\ndef test_n(n): pass\n"

    def order(seed: str) -> list[str]:
        output = run_pytest(tmp_path, body, HOMELOOP_SEED=seed)
        assert f"HOMELOOP_SEED={seed}" in output
        return re.findall(r"test_n\[(\d+)\]", output)

    first = order("1")
    assert len(first) == 30
    assert first == order("1")
    assert first != order("2")
