"""`homeloop bench`: runs what the checkout has; says so where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from homeloop.cli import bench as command
from homeloop.cli.main import main
from tests.cli.running import ROOT


def test_it_runs_the_checkouts_benchmarks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that follows goes to them, options too; sys.path is as before."""
    before = list(sys.path)
    assert command.checkout() == ROOT
    assert main(["bench", "--quick", "--only", "call\\(noop\\)", "--list"]) == 0
    assert "call(noop)" in capsys.readouterr().out
    assert sys.path == before


def test_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_an_installed_package_has_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit 2 and a sentence, also where some other package named `bench` could be imported."""
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert main(["bench"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("homeloop bench: the benchmarks are not part of the package: run it in a source checkout")
    assert errors.count("\n") == 1
