"""CPython's own asyncio tests, with homeloop's loop in the place of asyncio's (rule 18).

They come with the interpreter (package `test`; Debian keeps it in libpython3-testsuite). Each module runs in a
process of its own, see runner.py. All of them take about 90 s, so an ordinary test run has the quick ones only;
HOMELOOP_CONFORMANCE=1 runs all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE_S = 240              # runner.py prints every thread's stack then; the loaded machine of a CI is slow

QUICK = ["test_locks", "test_server", "test_timeouts", "test_waitfor"]
MODULES = [
    "test_base_events", "test_buffered_proto", "test_context", "test_eager_task_factory", "test_events",
    "test_free_threading", "test_futures", "test_futures2", "test_graph", "test_locks", "test_queues", "test_runners",
    "test_selector_events", "test_sendfile", "test_server", "test_sock_lowlevel", "test_ssl", "test_sslproto",
    "test_staggered", "test_streams", "test_subprocess", "test_taskgroups", "test_tasks", "test_threads",
    "test_timeouts", "test_unix_events", "test_waitfor",
]
# Those that rule 18 is about: not to be moved to NOT_RUN.
NAMED = [
    "test_base_events", "test_buffered_proto", "test_eager_task_factory", "test_events", "test_futures", "test_locks",
    "test_queues", "test_runners", "test_selector_events", "test_sendfile", "test_server", "test_sock_lowlevel",
    "test_ssl", "test_sslproto", "test_streams", "test_subprocess", "test_taskgroups", "test_tasks", "test_timeouts",
    "test_unix_events", "test_waitfor",
]
NOT_RUN = {
    "test_ensure_future": "makes no loop",
    "test_pep492": "makes no loop, or one of its own",
    "test_proactor_events": "the event loop of Windows, on mocks",
    "test_protocols": "makes no loop",
    "test_transports": "makes no loop",
    "test_tools": "a command that reads another process",
    "test_windows_events": "Windows",
    "test_windows_utils": "Windows",
}

# Test id, or its beginning: why it must fail on our loop. Strict: one that passes is taken off the list.
EXPECTED: dict[str, dict[str, str]] = {}


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"test.test_asyncio.{name}") is not None
    except ModuleNotFoundError:         # no package `test` at all
        return False


RUN = [name for name in (MODULES if os.environ.get("HOMELOOP_CONFORMANCE") else QUICK) if has_module(name)]


@pytest.fixture(autouse=True)
def suite_is_installed() -> None:
    if not has_module("test_events"):
        what = f"test.test_asyncio of Python {sys.version.split()[0]} (Debian: libpython3-testsuite)"
        if os.environ.get("CI"):
            pytest.fail(f"in CI this must be installed: {what}", pytrace=False)
        pytest.skip(f"not installed: {what}")


def run_module(name: str) -> dict[str, Any]:
    """What runner.py says of one module; fails when it says nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.conformance.runner", name], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True, env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )
    try:
        out, errors = process.communicate(timeout=MODULE_S + 10)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{name} did not end in {MODULE_S + 10} s", pytrace=False)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)          # and the processes that a failed test left
        process.communicate()
    last = out.strip().rpartition("\n")[2]
    if process.returncode != 0 or not last.startswith("{"):
        pytest.fail(f"{name} died with {process.returncode}:\n{errors[-8000:]}", pytrace=False)
    answer: dict[str, Any] = json.loads(last)
    return answer


def compared(bad: dict[str, str], expected: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """What failed and is not expected to, with its text; what is expected to fail, and did not."""
    unexpected = {test: text for test, text in bad.items() if not test.startswith(tuple(expected))}
    return unexpected, [start for start in expected if not any(test.startswith(start) for test in bad)]


@pytest.mark.timeout(MODULE_S + 30)
@pytest.mark.parametrize("name", RUN or QUICK)
def test_rule18_asyncio_suite(name: str) -> None:
    """Every test passes, but for those that are listed, which fail."""
    answer = run_module(name)
    print(f"{name}: {answer['ran']} ran, {answer['skipped']} skipped, on {answer['loops']} loops of ours")
    unexpected, passed = compared(answer["bad"], EXPECTED.get(name, {}))
    assert not unexpected, "\n\n".join(f"{name}.{test}\n{text}" for test, text in unexpected.items())
    assert not passed, f"these pass now: take them off EXPECTED: {passed}"
    assert answer["ran"] > 0
    assert answer["loops"] > 0 or answer["ran"] == answer["skipped"], "not one loop of ours: nothing was tested"


def test_expected_failures_are_strict() -> None:
    """The list is empty; one day it may not be."""
    bad = {"A.test_x": "text of x", "B.test_y": "text of y"}
    assert compared(bad, {}) == (bad, [])
    assert compared(bad, {"A.test_x": "why", "B.": "why"}) == ({}, [])
    assert compared(bad, {"A.": "why"}) == ({"B.test_y": "text of y"}, [])
    assert compared({}, {"A.": "why"}) == ({}, ["A."])
    assert compared({}, {}) == ({}, [])


def test_every_module_is_accounted_for() -> None:
    """A new module of a new Python is either run, or there is a reason why not."""
    spec = importlib.util.find_spec("test.test_asyncio")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    there = {path.stem for path in folder.glob("test_*.py")}
    assert there <= {*MODULES, *NOT_RUN}
    assert {*NAMED} <= {*MODULES}
    assert not {*MODULES} & {*NOT_RUN}
    assert {*QUICK} <= {*MODULES}
