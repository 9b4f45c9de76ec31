"""What the runs of a suite mean: pure; reports and lists in, a verdict out.

A test that fails on our loop is asyncio's or the machine's if it fails on asyncio's own loop too, in the same
environment a moment before; expected if the list names it; else ours. Strict: what the list names must fail on ours
and pass on asyncio's; but for a reason that begins with "sometimes:", which is for races in the suite itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

FAILED, PASSED, SKIPPED = "failed", "passed", "skipped"
SOMETIMES = "sometimes:"
_ADDRESS = re.compile(r"0x[0-9a-f]+|\d+")


class BadList(Exception):
    """A list of expected failures that cannot be read; the text names the line."""


@dataclass(slots=True)
class Report:
    """What one run of a suite said of itself."""

    loop: str = ""                      # the module of the loop that asyncio.new_event_loop() made
    loops: int = 0                      # loops of ours that were made
    ended: bool = False                 # did the run come to its end?
    uncollected: list[str] = field(default_factory=list)        # files whose tests could not be found
    outcomes: dict[str, str] = field(default_factory=dict)      # by test: the worst of its phases
    texts: dict[str, str] = field(default_factory=dict)         # by failed test


@dataclass(slots=True)
class Verdict:
    """The outcome of a suite, by kind; each a list of test ids or of texts."""

    ours: list[str] = field(default_factory=list)               # fails on our loop only, and no list says so
    passes: list[str] = field(default_factory=list)             # on the list, but passes
    stale: list[str] = field(default_factory=list)              # on the list, but not ours, or not there
    lost: list[str] = field(default_factory=list)               # ran on asyncio's loop, and not on ours
    broken: list[str] = field(default_factory=list)             # texts: a run that proves nothing
    expected: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)        # fails on asyncio's own loop too
    better: list[str] = field(default_factory=list)             # fails on asyncio's loop only

    @property
    def good(self) -> bool:
        return not (self.ours or self.passes or self.stale or self.lost or self.broken)


def parse_list(text: str) -> dict[str, str]:
    """Read a list of expected failures: a test id at the start of a line, its reason indented below.

    Lines that start with # are comments. BadList for an id twice or without a reason, or a reason without an id.
    """
    reasons: dict[str, str] = {}
    test = ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line[0].isspace():
            if not test:
                raise BadList(f"line {number}: a reason without a test id above it")
            reasons[test] = f"{reasons[test]} {line.strip()}".lstrip()
            continue
        if test and not reasons[test]:
            raise BadList(f"line {number}: no reason for {test}")
        test = line.rstrip()
        if test in reasons:
            raise BadList(f"line {number}: {test} is named twice")
        reasons[test] = ""
    if test and not reasons[test]:
        raise BadList(f"no reason for {test}")
    return reasons


def parse_report(text: str) -> Report:
    """Read what the plugin wrote: one JSON object a line, the last perhaps cut off with the process."""
    report = Report()
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        report.loop = said.get("loop", report.loop)
        report.loops = said.get("loops", report.loops)
        report.ended = said.get("ended", report.ended)
        if "test" not in said:
            continue
        test, outcome = said["test"], said["outcome"]
        if said["when"] == "collect":
            report.uncollected.append(f"{test}: {last_line(said['text'])}")
            continue
        if outcome == FAILED:
            report.texts[test] = f"{report.texts.get(test, '')}{said['text']}\n"
        if report.outcomes.get(test) != FAILED:
            report.outcomes[test] = outcome
    return report


def judge(
    ours: Report, stock: Report, expected: dict[str, str], *, whole: bool = True, at_least: int = 1
) -> Verdict:
    """Compare a suite's run on our loop with the one on asyncio's.

    whole: no part of the suite was left out, so at_least so many tests have passed.
    """
    verdict = Verdict()
    for name, report in (("our", ours), ("asyncio's", stock)):
        if not report.ended:
            last = [*report.outcomes][-1:]
            verdict.broken.append(f"the run on {name} loop did not come to its end; the last test was {last}")
        verdict.broken += [f"on {name} loop pytest could not collect {text}" for text in report.uncollected]
        passed = sum(outcome == PASSED for outcome in report.outcomes.values())
        if passed < (at_least if whole else 1):
            verdict.broken.append(f"only {passed} tests passed on {name} loop")
    if not ours.loop.startswith("homeloop") or not ours.loops:
        verdict.broken.append(f"not on our loop: {ours.loops} loops of ours, new_event_loop() is {ours.loop!r}'s")
    if stock.loop.startswith("homeloop") or stock.loops:
        verdict.broken.append("the run on asyncio's loop was on ours")
    strict = {test for test, reason in expected.items() if not reason.startswith(SOMETIMES)}
    for test, outcome in ours.outcomes.items():
        on_stock = stock.outcomes.get(test)
        if outcome == FAILED:
            kind = (verdict.expected if test in expected and on_stock != FAILED
                    else verdict.environment if on_stock == FAILED else verdict.ours)
            kind.append(test)
        elif outcome == PASSED and test in strict:
            verdict.passes.append(test)
        elif on_stock == FAILED:
            verdict.better.append(test)
        elif on_stock == PASSED and outcome == SKIPPED:
            verdict.lost.append(test)
    verdict.lost += [test for test in stock.outcomes if test not in ours.outcomes]
    verdict.stale += [test for test in expected if whole and test not in ours.outcomes]
    verdict.stale += [test for test in verdict.environment if test in strict]
    return verdict


def last_line(text: str) -> str:
    """The error of a failure's text, without what differs from run to run: to count those that are alike."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return _ADDRESS.sub("N", errors[-1]) if errors else "(no text)"
