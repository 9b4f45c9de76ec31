"""The pytest plugin in runs of pytest of its own: docs/faults.md, beside pytest-asyncio and anyio, and unused."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 50.0
EXAMPLE = re.compile(r"<!-- run by tests/testing/test_pytest_plugin.py:(.*?)-->\n```python\n(.*?)```", re.DOTALL)


ALONE = ["-p", "no:anyio", "-p", "no:asyncio"]
FUSE = {"/dev/fuse"}                                    # not in every container, and not ours to demand
SCOPE = ["-o", "asyncio_default_fixture_loop_scope=function"]


def run_pytest(folder: Path, text: str, options: list[str] = ALONE) -> subprocess.CompletedProcess[str]:
    """Run pytest over one file, in a folder without any configuration; our plugin comes by its entry point."""
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(ROOT / "src")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_it.py"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def passed(done: subprocess.CompletedProcess[str], count: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} passed" in done.stdout


def examples() -> list[tuple[list[str], str]]:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    return [(needs.split(), code) for needs, code in EXAMPLE.findall(text)]


def is_here(need: str) -> bool:
    """A program, or a device that may be opened."""
    if not need.startswith("/"):
        return shutil.which(need) is not None
    try:
        os.close(os.open(need, os.O_RDWR))
    except OSError:
        return False
    return True


def test_entry_point() -> None:
    found = {point.name: point.value for point in importlib.metadata.entry_points(group="pytest11")}
    assert found["homeloop"] == "homeloop_pytest"


def test_the_examples_of_the_docs(tmp_path: Path) -> None:
    """All that can be run here; those that need what is not here are left out, by name."""
    ready, left_out = [], []
    for needs, code in examples():
        missing = [need for need in needs if not is_here(need)]
        (left_out if missing else ready).append((missing, code))
    assert len(ready) + len(left_out) == 7
    if os.environ.get("CI"):
        assert {need for missing, _ in left_out for need in missing} <= FUSE, left_out
    print(f"left out for want of: {[missing for missing, _ in left_out]}")
    text = "\n\n".join(code for _, code in ready)
    more = 2 * ("parametrize(\"copy" in text)            # that one runs three times
    passed(run_pytest(tmp_path, text), len(ready) + more)


def test_unused_it_imports_nothing(tmp_path: Path) -> None:
    text = """
import sys
def test_nothing():
    assert "homeloop_pytest" in sys.modules
    assert [name for name in sys.modules if name.partition(".")[0] == "homeloop"] == []
"""
    passed(run_pytest(tmp_path, text), 1)


def test_a_device_that_does_not_close_well_is_an_error_of_the_test(tmp_path: Path) -> None:
    text = """
from homeloop.block import Memory
class Bad(Memory):
    def close(self):
        raise OSError(5, "broken")
def test_it(nbd_server):
    nbd_server(Bad(4096))
"""
    done = run_pytest(tmp_path, text)
    assert done.returncode == 1
    assert "did not close well: EIO: Bad.close: OSError" in done.stdout
    assert "1 passed, 1 error" in done.stdout


ASYNC = """
import pytest
from homeloop.block import Memory
from homeloop.errors import BlockError
from homeloop.nbd import connect
{marks}
async def test_asynchronous(nbd_device, nbd_server, faults):
    disk = nbd_device("1M")
    disk.faults.on("write", nth=2).error("ENOSPC")
    other = nbd_server(faults.over(Memory(4096)))
    faults.on("read").delay(0.001)
    async with connect(disk.uri) as client, connect(other) as slow:
        await client.write(0, b"data")
        with pytest.raises(BlockError, match="ENOSPC"):
            await client.write(0, b"more")
        assert bytes(await slow.read(0, 4)) == bytes(4)
    assert disk.read(0, 4) == b"data"

def test_synchronous(nbd_device):
    assert nbd_device(4096).read(0, 1) == bytes(1)
"""


@pytest.mark.parametrize(("marks", "options"), [
    ("@pytest.mark.asyncio", ["-p", "no:anyio", *SCOPE]),
    ("", ["-p", "no:anyio", "-o", "asyncio_mode=auto", *SCOPE]),
    ("@pytest.mark.parametrize('anyio_backend', ['asyncio'])\n@pytest.mark.anyio", ["-p", "no:asyncio"]),
    ("@pytest.mark.asyncio", SCOPE),
], ids=["asyncio", "asyncio-auto", "anyio", "both"])
def test_beside_the_plugins_of_others(tmp_path: Path, marks: str, options: list[str]) -> None:
    passed(run_pytest(tmp_path, ASYNC.replace("{marks}", marks), options), 2)
