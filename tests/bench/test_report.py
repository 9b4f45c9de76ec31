"""bench.report: what is written can be read again, and a comparison tells noise from change."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.measure import Better, Figures, Ratio, RowResult
from bench.report import (
    Report,
    change,
    compare_lines,
    from_json,
    markdown_lines,
    number,
    ratio_lines,
    row_lines,
    to_json,
)

ROW = RowResult(
    name="call(noop)",
    unit="µs",
    better=Better.LOWER,
    figures={"homeloop": Figures(values=[2.0, 3.0, 4.0]), "asyncio": Figures(values=[90.0, 100.0, 120.0])},
    missing={"uvloop": "uvloop is not installed"},
    ratios=[Ratio(ours="homeloop", against="asyncio", value=33.3, target=25.0)],
)
REPORT = Report(
    date="2026-01-02 03:04+00:00",
    options="python -m bench",
    machine={
        "cpu": "a CPU",
        "cpus": "2",
        "load": "0.1 0.2 0.3",
        "system": "Linux 6",
        "python": "CPython 3.13.0, with the GIL",
    },
    versions={"uvloop": "not installed"},
    rows=[ROW],
)


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(to_json(REPORT), encoding="utf-8")
    assert from_json(path) == REPORT


def test_text_names_what_is_missing() -> None:
    text = "\n".join(row_lines(ROW))
    assert "missing: uvloop is not installed" in text
    assert "[2.5 to 3.5]" in text


def test_ratio_table_judges() -> None:
    text = "\n".join(ratio_lines(REPORT))
    assert "33.30x     25x  pass" in text
    assert text.endswith("1 of 1 targets reached")


def test_markdown_has_machine_date_and_every_contender() -> None:
    text = "\n".join(markdown_lines(REPORT))
    assert "2026-01-02" in text
    assert "a CPU, 2 CPUs" in text
    assert "| | *homeloop* | 3 | 2.5 to 3.5 |  |  |  |" in text
    assert "| | asyncio | 100 | 95 to 110 | 33.30x | 25x | pass |" in text
    assert "| | uvloop | missing: uvloop is not installed |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {8}


@pytest.mark.parametrize(
    ("before", "after", "better", "word"),
    [
        ([1.0, 1.1, 1.2], [1.1, 1.2, 1.3], Better.LOWER, "~"),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], Better.LOWER, "WORSE"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], Better.LOWER, "better"),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], Better.HIGHER, "better"),
    ],
)
def test_change(before: list[float], after: list[float], better: Better, word: str) -> None:
    assert change(Figures(values=before), Figures(values=after), better).endswith(word)


def test_compare_names_rows_of_one_run_only() -> None:
    other = Report(date="later", options="", machine=REPORT.machine, versions={}, rows=[])
    assert "call(noop): only before" in list(compare_lines(REPORT, other))
    assert "call(noop): only after" in list(compare_lines(other, REPORT))


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (2.0, "2"), (99.94, "99.9"), (100.4, "100"), (164174.2, "164,174")]
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_command_shows_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(to_json(REPORT), encoding="utf-8")
    assert main(["show", str(path), "--markdown"]) == 0
    assert "| **call(noop)**" in capsys.readouterr().out
    assert main(["compare", str(path), str(path)]) == 0
    assert "1.00x  ~" in capsys.readouterr().out
