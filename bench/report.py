"""A run as text, Markdown and JSON; and the comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Better, Figures, Ratio, RowResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run: when and where it was made, with what, and what came out."""

    date: str
    options: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    rows: Sequence[RowResult]


def number(value: float) -> str:
    """Three significant digits, thousands in full: what a reader can compare."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(figures: Figures) -> str:
    low, high = figures.quartiles
    return f"{number(low)} to {number(high)}"


def verdict(ratio: Ratio) -> str:
    return {None: "", True: "pass", False: "MISS"}[ratio.passed]


def target(ratio: Ratio) -> str:
    return "" if ratio.target is None else f"{ratio.target:g}x"


def arrow(row: RowResult) -> str:
    return f"{row.unit}, {row.better.value} is better"


# Text


def row_lines(row: RowResult) -> Iterator[str]:
    """One row as it is measured: figures, then what is missing and why."""
    yield f"{row.name}   ({arrow(row)})"
    for name, figures in row.figures.items():
        yield f"    {name:18} {number(figures.median):>10}   [{spread(figures)}]"
    for name, why in row.missing.items():
        yield f"    {name:18}    missing: {why}"


def ratio_lines(report: Report) -> Iterator[str]:
    """The table of ratios: above 1 homeloop is the better one."""
    width = max((len(row.name) for row in report.rows), default=0)
    yield f"{'ratios':{width}}  {'ours':18} {'against':10} {'ratio':>8} {'target':>7}"
    for row in report.rows:
        for ratio in row.ratios:
            yield (f"{row.name:{width}}  {ratio.ours:18} {ratio.against:10} {ratio.value:7.2f}x "
                   f"{target(ratio):>7}  {verdict(ratio)}").rstrip()
    judged = [ratio.passed for row in report.rows for ratio in row.ratios if ratio.passed is not None]
    yield f"{sum(judged)} of {len(judged)} targets reached"


# Markdown


def markdown_lines(report: Report) -> Iterator[str]:
    machine = report.machine
    yield (f"Measured {report.date} with `{report.options}` on {machine['cpu']}, {machine['cpus']} CPUs, "
           f"load {machine['load']}, {machine['system']}, {machine['python']}.")
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items()) + "."
    yield ""
    yield "| row | | median | quartiles | homeloop is | target | |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for row in report.rows:
        yield f"| **{row.name}** ({arrow(row)}) | | | | | | |"
        ours = {ratio.ours for ratio in row.ratios} or {"homeloop"}
        for name, figures in row.figures.items():
            ratios = [ratio for ratio in row.ratios if ratio.against == name]
            said = " / ".join(f"{ratio.value:.2f}x" for ratio in ratios)
            passed = " / ".join(verdict(ratio) for ratio in ratios)
            wanted = target(ratios[0]) if ratios else ""
            shown = f"*{name}*" if name in ours else name
            cells = (shown, number(figures.median), spread(figures), said, wanted, passed)
            yield f"| | {' | '.join(cells)} |"
        for name, why in row.missing.items():
            yield f"| | {name} | missing: {why} | | | | |"


# JSON


def to_json(report: Report) -> str:
    def row_value(row: RowResult) -> dict[str, Any]:
        return {
            "name": row.name,
            "unit": row.unit,
            "better": row.better.value,
            "figures": {
                name: {"median": figures.median, "quartiles": list(figures.quartiles), "values": figures.values}
                for name, figures in row.figures.items()
            },
            "missing": dict(row.missing),
            "ratios": [
                {"ours": r.ours, "against": r.against, "value": r.value, "target": r.target, "passed": r.passed}
                for r in row.ratios
            ],
        }

    value = {
        "date": report.date,
        "options": report.options,
        "machine": dict(report.machine),
        "versions": dict(report.versions),
        "rows": [row_value(row) for row in report.rows],
    }
    return json.dumps(value, indent=1, ensure_ascii=False)


def from_json(path: Path) -> Report:
    value = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        RowResult(
            name=row["name"],
            unit=row["unit"],
            better=Better(row["better"]),
            figures={name: Figures(values=figures["values"]) for name, figures in row["figures"].items()},
            missing=row["missing"],
            ratios=[
                Ratio(ours=r["ours"], against=r["against"], value=r["value"], target=r["target"])
                for r in row["ratios"]
            ],
        )
        for row in value["rows"]
    ]
    return Report(date=value["date"], options=value["options"], machine=value["machine"],
                  versions=value["versions"], rows=rows)


# Two runs


def compare_lines(before: Report, after: Report) -> Iterator[str]:
    """What changed between two runs; `~` where the quartiles overlap: perhaps nothing did."""
    yield f"before: {before.date}, {before.machine['cpu']}, {before.machine['python']}"
    yield f"after:  {after.date}, {after.machine['cpu']}, {after.machine['python']}"
    old_rows = {row.name: row for row in before.rows}
    for row in after.rows:
        old = old_rows.get(row.name)
        if old is None:
            yield f"{row.name}: only after"
            continue
        yield f"{row.name}   ({arrow(row)})"
        for name, figures in row.figures.items():
            if name in old.figures:
                yield f"    {name:18} {change(old.figures[name], figures, row.better)}"
    gone = old_rows.keys() - {row.name for row in after.rows}
    for name in sorted(gone):
        yield f"{name}: only before"


def change(before: Figures, after: Figures, better: Better) -> str:
    ratio = before.median / after.median if better is Better.LOWER else after.median / before.median
    (old_low, old_high), (new_low, new_high) = before.quartiles, after.quartiles
    overlap = old_low <= new_high and new_low <= old_high
    word = "~" if overlap else "better" if ratio > 1 else "WORSE"
    return f"{number(before.median):>10} -> {number(after.median):>10}   {ratio:5.2f}x  {word}"
