"""The runner of our peers' suites, on a suite that is made up: no network, no environment but this one.

A folder with a source distribution of its own stands for the download, and this interpreter for the environment.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.peers import runner
from tests.peers.runner import CannotRun, Place
from tests.peers.suites import SUITES, Suite
from tests.peers.verdicts import parse_list

TESTS = '''
import asyncio
import os
import pathlib
import signal

import pytest

import made_up

OURS = not type(asyncio.new_event_loop()).__module__.startswith("asyncio")


def test_passes():
    async def main():
        return type(asyncio.get_running_loop()).__module__.startswith("homeloop")

    assert asyncio.run(main()) is OURS


def test_fails_on_both():
    raise OSError("no network")


def test_fails_on_ours():
    assert not OURS


def test_fails_on_stock():
    assert OURS


@pytest.mark.skip(reason="never")
def test_skipped():
    pass


def test_fails_once():
    first = pathlib.Path("seen")
    if OURS and not first.exists():
        first.touch()
        raise AssertionError("the machine was busy")


def test_last():
    if OURS and "made_up_dies" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
'''
HANGS = """
import os
import threading


def test_hangs():
    os.environ["HOMELOOP_PEERS_STOCK"] or threading.Event().wait()
"""
PLAIN = tuple(word for plugin in ("hypothesispytest", "asyncio", "anyio") for word in ("-p", f"no:{plugin}"))
SUITE = Suite(name="made_up", version="1.0", package="made_up", arguments=PLAIN, limit_s=60)
ID = "tests/test_it.py::test_"
LISTED = f"{ID}fails_on_ours\n    it is made up\n"


class World:
    """A source distribution of the made-up suite, and a runner that takes it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.place = Place(SUITE, folder / ".peers")
        self._expected = folder / "here" / "expected" / "made_up.txt"
        self._expected.parent.mkdir(parents=True)
        for linked in ("inside", "requirements"):
            (folder / "here" / linked).symlink_to(runner.HERE / linked)
        monkeypatch.setattr(runner, "HERE", folder / "here")
        monkeypatch.setattr(runner, "Place", lambda suite: Place(suite, folder / ".peers"))
        monkeypatch.setattr(runner, "make_environment", self._take_this_environment)
        monkeypatch.setattr(runner, "AGAIN", 1)
        self.distribute({"tests/test_it.py": TESTS, "made_up/__init__.py": "raise ImportError('hides the installed')"})
        self.expect(LISTED)
        installed = folder / "installed"
        installed.mkdir()
        (installed / "made_up.py").write_text("")

    def _take_this_environment(self, place: Place) -> None:
        place.python.parent.mkdir(parents=True, exist_ok=True)
        place.python.unlink(missing_ok=True)
        installed = f"{self.folder}/installed"
        place.python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{installed}" exec {sys.executable} "$@"')
        place.python.chmod(0o755)

    def distribute(self, files: dict[str, str]) -> None:
        self.place.downloads.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.place.downloads / "made_up-1.0.tar.gz", "w:gz") as tar:
            for name, text in files.items():
                entry = tarfile.TarInfo(f"made_up-1.0/{name}")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text.encode()))

    def expect(self, text: str) -> None:
        self._expected.write_text(text)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "src").symlink_to(Path(__file__).resolve().parent.parent.parent / "src")
    (tmp_path / "tests").symlink_to(Path(__file__).resolve().parent.parent)
    return World(tmp_path, monkeypatch)


def test_suite_is_as_it_should_be(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """One test of each kind: on both loops, on one of them, not at all, and once only."""
    assert runner.run_suite(SUITE, None)
    said = capfd.readouterr().out
    assert "made_up: asyncio's loop  2 failed, 4 passed, 1 skipped" in said
    assert "made_up: our loop        3 failed, 3 passed, 1 skipped" in said
    assert "1 fail on both: OSError: no network" in said
    assert f"fails on asyncio's loop only: {ID}fails_on_stock" in said
    assert f"unsteady: {ID}fails_once: AssertionError: the machine was busy" in said
    assert f"fails as expected: {ID}fails_on_ours" in said
    assert "made_up: good" in said


def test_unexpected_failure_is_one(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.expect("")
    assert not runner.run_suite(SUITE, "fails_on_ours")
    said = capfd.readouterr().out
    assert f"FAILS ON OUR LOOP ONLY: {ID}fails_on_ours" in said
    assert "assert not OURS" in said, "its text is shown"
    assert "fails_on_both" not in said, "the pattern left it out"


def test_unexpected_pass_is_a_failure(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.expect(f"{ID}passes\n    we thought so\n")
    assert not runner.run_suite(SUITE, "test_passes")
    assert f"PASSES NOW, take it off the list: {ID}passes" in capfd.readouterr().out


def test_suite_that_dies_is_a_failure(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("made_up_dies", "1")
    assert not runner.run_suite(SUITE, "passes or last")
    said = capfd.readouterr().out
    assert "PROVES NOTHING: the run on our loop did not come to its end" in said
    assert f"RAN ON ASYNCIO'S LOOP ONLY: {ID}last" in said
    assert "made_up: ours.log ends:\n" in said
    assert "stock.log" not in said


def test_file_that_cannot_be_collected(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.distribute({"tests/test_it.py": TESTS, "tests/test_bad.py": "import nowhere_to_be_found", "made_up/x.py": ""})
    assert not runner.run_suite(SUITE, "passes")
    said = capfd.readouterr().out
    assert "PROVES NOTHING: on our loop pytest could not collect tests/test_bad.py: ModuleNotFoundError" in said


def test_suite_that_hangs_is_ended(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.distribute({"tests/test_it.py": HANGS, "made_up/x.py": ""})
    world.expect("")
    assert not runner.run_suite(replace(SUITE, limit_s=3), None)
    said = capfd.readouterr().out
    assert said.count("made_up: ended after 3 s") == 1
    assert "PROVES NOTHING: the run on our loop did not come to its end" in said


def test_suite_that_comes_without_tests(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Said, if we know; else an error, and one too if there are some after all."""
    known = replace(SUITE, without_tests="the author keeps them")
    with pytest.raises(CannotRun, match="comes with its tests after all"):
        runner.run_suite(known, None)
    world.distribute({"made_up/x.py": ""})
    assert runner.run_suite(known, None)
    assert "made_up: not run: the author keeps them" in capfd.readouterr().out
    with pytest.raises(CannotRun, match="comes without its tests"):
        runner.run_suite(SUITE, None)


def test_download_that_fails_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.place.downloads / "made_up-1.0.tar.gz").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CannotRun, match=r"(?s)download of made_up-1\.0\.tar\.gz failed.*made_up==1\.0"):
        runner.download(world.place)


def test_only_names_suites() -> None:
    assert runner.chosen(None) == SUITES
    assert [suite.name for suite in runner.chosen("websockets,anyio")] == ["websockets", "anyio"]
    with pytest.raises(CannotRun, match="--only nobody: the suites are anyio, uvicorn"):
        runner.chosen("nobody")


def test_suites_are_pinned() -> None:
    """Each has its list; each that runs has what it needs, the package itself included, to the version."""
    for suite in SUITES:
        parse_list((runner.HERE / "expected" / f"{suite.name}.txt").read_text())
        if suite.without_tests:
            continue
        lines = (runner.HERE / "requirements" / f"{suite.name}.txt").read_text().split()
        assert f"{suite.name}=={suite.version}" in lines
        assert all(line.count("==") == 1 for line in lines), lines
        assert not any(line.startswith("uvloop") for line in lines), "they would choose it for themselves"
    files = {path.stem for path in (runner.HERE / "expected").iterdir()}
    assert files == {suite.name for suite in SUITES}, os.listdir(runner.HERE / "expected")
