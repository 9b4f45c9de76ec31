"""homeloop's loop in other people's hands: pytest-asyncio's hook, anyio's loop_factory, sniffio (rule 18).

The plugins are not loaded here (pyproject.toml: -p no:...): the example projects run in a pytest of their own.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import homeloop
from homeloop.core.coroutine import CoroutineState
from tests.core.bounded import LIMIT_S, in_plain_thread, until
from tests.core.places import in_coroutine, returned

ROOT = Path(__file__).resolve().parent.parent.parent


def run_project(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a pytest of its own on a folder; warnings are errors, nothing is left there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={folder}", "-p", "no:cacheprovider",
         "-q", "-W", "error", *arguments, str(folder)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=5 * LIMIT_S, check=False,
    )


def check_passed(run: subprocess.CompletedProcess[str], count: int) -> None:
    assert run.returncode == 0, run.stdout
    assert f"\n{count} passed in" in run.stdout, run.stdout


def test_rule18_pytest_asyncio_loop_factories_hook() -> None:
    pytest.importorskip("pytest_asyncio", reason="pytest-asyncio is not installed")
    run = run_project(ROOT / "examples" / "with_pytest_asyncio", "-p", "no:anyio",
                      "-o", "asyncio_default_fixture_loop_scope=function")
    check_passed(run, 1)


def test_rule18_pytest_asyncio_without_the_hook_is_not_ours(tmp_path: Path) -> None:
    """What the test above shows is the hook's doing."""
    pytest.importorskip("pytest_asyncio", reason="pytest-asyncio is not installed")
    (tmp_path / "test_it.py").write_text((ROOT / "examples" / "with_pytest_asyncio" / "test_it.py").read_text())
    run = run_project(tmp_path, "-p", "no:anyio", "-o", "asyncio_default_fixture_loop_scope=function")
    assert run.returncode == 1, run.stdout
    assert "NoRuntime" in run.stdout


def test_rule18_anyio_loop_factory() -> None:
    """By its pytest plugin, and by anyio.run()."""
    pytest.importorskip("anyio", reason="anyio is not installed")
    check_passed(run_project(ROOT / "examples" / "with_anyio", "-p", "no:asyncio"), 2)


def in_task(context: homeloop.AioContext, fn: Callable[[], Any]) -> Any:
    async def body() -> Any:
        return await asyncio.ensure_future(returned(fn))

    return context.spawn(body()).result(LIMIT_S)


async def awoken(fn: Callable[[], Any]) -> Any:
    await homeloop.park()
    return fn()


def woken_under_the_lock(rt: homeloop.Runtime, fn: Callable[[], Any]) -> Any:
    """A wake() that runs the coroutine on the stack of a plain thread."""
    co = rt.main.spawn(awoken(fn))
    until(lambda: co.state is CoroutineState.PARKED, co)

    def wake() -> Any:
        with rt.big_lock:
            assert co.wake()
            assert co.done()
        return co.result(LIMIT_S)

    return in_plain_thread(wake)


def test_rule18_sniffio_says_asyncio() -> None:
    """In coroutines and tasks of both kinds of contexts, and in call()s that their caller drives."""
    sniffio = pytest.importorskip("sniffio", reason="sniffio is not installed")
    ask = sniffio.current_async_library
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        for context in (rt.main, io.context):
            assert in_coroutine(context, ask) == "asyncio"
            assert in_task(context, ask) == "asyncio"
        assert in_plain_thread(rt.call, returned(lambda: (ask(), threading.get_ident())))[0] == "asyncio"
        assert rt.call(returned(threading.get_ident)) == threading.get_ident(), "it was driven"
        assert woken_under_the_lock(rt, ask) == "asyncio"
        assert rt.main.spawn(io.run(returned(ask))).result(LIMIT_S) == "asyncio"
        with pytest.raises(sniffio.AsyncLibraryNotFoundError):
            ask()
        with rt.big_lock, pytest.raises(sniffio.AsyncLibraryNotFoundError):
            ask()               # a thread with the big lock is the loop's home, but no coroutine


def test_rule18_sniffio_on_a_loop_of_another_make() -> None:
    sniffio = pytest.importorskip("sniffio", reason="sniffio is not installed")
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    for factory in (uvloop.new_event_loop, asyncio.SelectorEventLoop):
        with homeloop.IOThread(loop_factory=factory) as io:
            assert io.call(returned(sniffio.current_async_library)) == "asyncio"
            assert in_task(io.context, sniffio.current_async_library) == "asyncio"
