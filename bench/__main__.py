"""The command: python -m bench [--quick] [--only PATTERN] [--markdown], and compare A.json B.json."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import (
    machine,
    report,
    rows_beside,
    rows_call,
    rows_copy,
    rows_loop,
    rows_memory,
    rows_nbd,
    rows_python,
    rows_run,
    rows_sync,
    rows_wake,
)
from bench.measure import Plan, Row, RowResult, measure
from bench.rows_nbd import NbdPlan

RESULTS = Path(__file__).parent / "results"
FULL = Plan(rounds=11, round_s=0.08, program_rounds=7)
QUICK = Plan(rounds=5, round_s=0.03, program_rounds=3)
NBD_FULL = NbdPlan(size=1 << 30, fio_size=256 << 20, fio_s=2.0)
NBD_QUICK = NbdPlan(size=128 << 20, fio_size=64 << 20, fio_s=0.3)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a look, not a result")
    parser.add_argument("--only", metavar="PATTERN", help="only rows whose name matches this regular expression")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--markdown", action="store_true", help="end with the table for docs/performance.md")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON file (bench/results/<date>.json)")
    commands = parser.add_subparsers(dest="command", metavar="")
    compare = commands.add_parser("compare", help="what changed between two runs")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    show = commands.add_parser("show", help="a run's tables again")
    show.add_argument("result", type=Path)
    show.add_argument("--markdown", action="store_true", dest="show_markdown")
    return parser.parse_args(arguments)


def rows_of(options: argparse.Namespace) -> list[Row]:
    rows = [
        *rows_call.rows(),
        *rows_wake.rows(),
        *rows_run.rows(),
        *rows_loop.rows(),
        *rows_sync.rows(),
        *rows_memory.rows(),
        *rows_nbd.rows(NBD_QUICK if options.quick else NBD_FULL),
        *rows_python.rows(NBD_QUICK if options.quick else NBD_FULL),
        *rows_beside.rows(NBD_QUICK if options.quick else NBD_FULL),
        *rows_copy.rows((NBD_QUICK if options.quick else NBD_FULL).size),
    ]
    return [row for row in rows if options.only is None or re.search(options.only, row.name, re.IGNORECASE)]


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    rows = rows_of(options)
    if options.list or not rows:
        say(row.name for row in rows or rows_of(argparse.Namespace(quick=options.quick, only=None)))
        return 0 if rows else 2
    now = datetime.datetime.now().astimezone()
    versions = machine.versions()
    say(f"{name} {version}" for name, version in (machine.describe() | versions).items())
    results: list[RowResult] = []
    for row in rows:
        result = measure(row, QUICK if options.quick else FULL)
        say(["", *report.row_lines(result)])
        results.append(result)
    made = report.Report(
        date=now.isoformat(sep=" ", timespec="minutes"),
        options=" ".join(["python -m bench", *arguments]),
        machine=machine.describe(),
        versions=versions,
        rows=results,
    )
    output = options.output or RESULTS / f"{now:%Y-%m-%dT%H%M%S}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report.to_json(made), encoding="utf-8")
    say(["", *report.ratio_lines(made), "", f"written to {output}"])
    if options.markdown:
        say(["", *report.markdown_lines(made)])
    return 0


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.command == "compare":
        say(report.compare_lines(report.from_json(options.before), report.from_json(options.after)))
        return 0
    if options.command == "show":
        shown = report.from_json(options.result)
        lines = report.markdown_lines if options.show_markdown else report.ratio_lines
        say(lines(shown))
        return 0
    return run(options, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
