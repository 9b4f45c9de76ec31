"""What the runs of a suite mean, on reports and lists that are made up."""

from __future__ import annotations

import json

import pytest

from tests.peers.verdicts import BadList, Report, Verdict, judge, last_line, parse_list, parse_report


def report(outcomes: dict[str, str], *, ours: bool, ended: bool = True) -> Report:
    loop = "homeloop.core.loop" if ours else "asyncio.unix_events"
    return Report(loop=loop, loops=int(ours), ended=ended, outcomes=outcomes, texts=dict.fromkeys(outcomes, "E  x"))


def judged(ours: str, stock: str, *, listed: bool = False, whole: bool = True) -> Verdict:
    """The verdict on one test t beside one that passes; an empty outcome: it was not run."""
    return judge(
        report({"t": ours, "other": "passed"} if ours else {"other": "passed"}, ours=True),
        report({"t": stock, "other": "passed"} if stock else {"other": "passed"}, ours=False),
        {"t": "reason"} if listed else {}, whole=whole,
    )


@pytest.mark.parametrize(("ours", "stock", "listed", "kind", "good"), [
    ("passed", "passed", False, None, True),
    ("skipped", "skipped", False, None, True),
    ("failed", "passed", False, "ours", False),
    ("failed", "skipped", False, "ours", False),
    ("failed", "", False, "ours", False),
    ("failed", "failed", False, "environment", True),
    ("passed", "failed", False, "better", True),
    ("skipped", "failed", False, "better", True),
    ("skipped", "passed", False, "lost", False),
    ("", "passed", False, "lost", False),
    ("", "failed", False, "lost", False),
    ("passed", "", False, None, True),
    ("failed", "passed", True, "expected", True),
    ("passed", "passed", True, "passes", False),
    ("passed", "failed", True, "passes", False),
    ("failed", "failed", True, "stale", False),
    ("", "", True, "stale", False),
    ("skipped", "skipped", True, None, True),
])
def test_verdict_on_one_test(ours: str, stock: str, listed: bool, kind: str | None, good: bool) -> None:
    verdict = judged(ours, stock, listed=listed)
    assert verdict.good is good
    assert kind is None or getattr(verdict, kind) == ["t"]
    kinds = [name for name in Verdict.__slots__ if "t" in getattr(verdict, name)]
    assert set(kinds) - {"environment"} == {kind} - {None, "environment"}, "and of no other kind"


@pytest.mark.parametrize(("ours", "stock", "good"), [
    ("failed", "passed", True), ("passed", "passed", True), ("passed", "failed", True), ("failed", "failed", True),
    ("skipped", "passed", False), ("", "", False),
])
def test_verdict_on_a_race_of_the_suite(ours: str, stock: str, good: bool) -> None:
    """It may pass and may fail; but it must be there, and run."""
    runs = [report({"other": "passed"} | ({"t": outcome} if outcome else {}), ours=number == 0)
            for number, outcome in enumerate((ours, stock))]
    assert judge(*runs, {"t": "sometimes: a race"}).good is good


def test_verdict_on_a_part_of_a_suite() -> None:
    """What -k left out is not stale."""
    assert judged("", "", listed=True, whole=False).good
    assert not judged("passed", "passed", listed=True, whole=False).good


@pytest.mark.parametrize(("ours", "stock", "says"), [
    (Report(), report({"t": "passed"}, ours=False), "our loop did not come to its end"),
    (Report(loop="homeloop.core.loop", loops=1, ended=True), report({}, ours=False), "only 0 tests passed on our loop"),
    (report({"t": "failed"}, ours=True), report({"t": "failed"}, ours=False), "only 0 tests passed on asyncio's loop"),
    (report({"t": "passed"}, ours=True, ended=False), report({"t": "passed"}, ours=False), r"last test was \['t'\]"),
    (report({"t": "passed"}, ours=False), report({"t": "passed"}, ours=False), "not on our loop"),
    (report({"t": "passed"}, ours=True), report({"t": "passed"}, ours=True), "asyncio's loop was on ours"),
    (report({"t": "passed"}, ours=True), Report(), "asyncio's loop did not come to its end"),
])
def test_verdict_on_runs_that_prove_nothing(ours: Report, stock: Report, says: str) -> None:
    verdict = judge(ours, stock, {})
    assert not verdict.good
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(verdict.broken)


def test_verdict_on_a_file_that_cannot_be_collected() -> None:
    """Its tests are not there to fail: on both loops alike, and still no reason to be content."""
    said = {"test": "tests/test_x.py", "outcome": "failed", "when": "collect", "text": "E   ModuleNotFoundError: y"}
    runs = [report({"t": "passed"}, ours=ours) for ours in (True, False)]
    for run in runs:
        run.uncollected = parse_report(json.dumps(said)).uncollected
    verdict = judge(*runs, {})
    assert verdict.broken == [
        f"on {name} loop pytest could not collect tests/test_x.py: ModuleNotFoundError: y"
        for name in ("our", "asyncio's")
    ]
    assert verdict.environment == []


def test_verdict_on_too_few_tests() -> None:
    runs = [report({"t": "passed", "u": "passed"}, ours=ours) for ours in (True, False)]
    assert judge(*runs, {}, at_least=2).good
    assert judge(*runs, {}, at_least=3).broken == [
        f"only 2 tests passed on {name} loop" for name in ("our", "asyncio's")]
    assert judge(*runs, {}, at_least=3, whole=False).good, "a part was asked for"


def test_list_is_read() -> None:
    text = "# a comment\n\na.py::t[x y]\n    one\n    two # not a comment\n\na.py::u\n\tthree\n"
    assert parse_list(text) == {"a.py::t[x y]": "one two # not a comment", "a.py::u": "three"}
    assert parse_list("# nothing\n") == {}


@pytest.mark.parametrize(("text", "says"), [
    ("  lonely\n", "line 1: a reason without a test id"),
    ("a::t\na::u\n  why\n", "line 2: no reason for a::t"),
    ("a::t\n", "no reason for a::t"),
    ("a::t\n  why\na::t\n  why\n", "line 3: a::t is named twice"),
])
def test_list_that_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(BadList, match=says):
        parse_list(text)


def test_report_is_read() -> None:
    """The worst phase of a test counts, its texts are kept; a line that was cut off is no error."""
    said = [
        {"loop": "asyncio.unix_events"},
        {"test": "t", "outcome": "passed", "when": "call", "text": ""},
        {"test": "t", "outcome": "failed", "when": "teardown", "text": "E  late"},
        {"test": "u", "outcome": "failed", "when": "call", "text": "one"},
        {"test": "u", "outcome": "failed", "when": "teardown", "text": "two"},
        {"test": "v", "outcome": "passed", "when": "call", "text": ""},
        {"test": "v", "outcome": "skipped", "when": "teardown", "text": ""},
        {"loops": 3, "ended": True},
    ]
    text = "\n".join(map(json.dumps, said))
    read = parse_report(text)
    assert (read.loop, read.loops, read.ended) == ("asyncio.unix_events", 3, True)
    assert read.outcomes == {"t": "failed", "u": "failed", "v": "skipped"}
    assert read.texts["u"] == "one\ntwo\n"
    cut = parse_report(text[:-10])
    assert not cut.ended
    assert cut.outcomes == read.outcomes


def test_last_line_is_alike_for_what_is_alike() -> None:
    assert last_line("a.py:3: in f\nE   first\nE   OSError: [Errno 97] at 0x7f00 port 40123") == (
        "OSError: [Errno N] at N port N")
    assert last_line("no error line") == "(no text)"
