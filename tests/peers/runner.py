"""Runs the suites of our peers on our loop and on asyncio's, and judges what failed: `make peers`.

    python -m tests.peers.runner [--only anyio,aiohttp] [-k PATTERN]

Each suite comes from its source distribution and runs in an environment of its own, both pinned (suites.py,
requirements/). First on asyncio's loop: what fails there is the environment's, be it no network or no IPv6. Then on
ours. What failed on ours alone and is not in expected/ runs twice more by itself, on both loops; if it passes then,
it is named as unsteady. See verdicts.py for the rest. Everything is kept in .peers/ beside this repository's
environments: packages, environments, reports, logs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

from tests.peers.suites import OPTIONS, SUITES, Suite
from tests.peers.verdicts import FAILED, Report, Verdict, judge, last_line, parse_list, parse_report

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
CACHE = ROOT / ".peers"
TAG = ".".join(map(str, sys.version_info[:3])) + sys.abiflags
AGAIN = 2                   # more runs of what failed on our loop alone
AGAIN_MAX = 25              # ... unless it is so many that something else is wrong
LOG_TAIL = 2_000            # characters that are shown of a run that did not come to its end
PIP = ("pip", "--disable-pip-version-check", "--no-input", "--quiet")


class CannotRun(Exception):
    """Something that a suite needs could not be had; the text says what."""


def command(what: str, *arguments: str | Path) -> None:
    """Run a command; CannotRun with its output if it fails."""
    done = subprocess.run(arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise CannotRun(f"{what} failed with {done.returncode}:\n{done.stdout[-4000:]}")


class Place:
    """The folders of one suite, under the cache."""

    def __init__(self, suite: Suite, cache: Path = CACHE) -> None:
        self.suite = suite
        self.downloads = cache / "downloads"
        self.own = cache / TAG / suite.name
        self.source = self.own / f"{suite.name}-{suite.version}"
        self.venv = self.own / "venv"
        self.python = self.venv / "bin" / "python"

    def report(self, which: str) -> Path:
        return self.own / f"{which}.jsonl"


def download(place: Place) -> Path:
    """The source distribution, from the package index unless it is here."""
    suite = place.suite
    wanted = place.downloads / f"{suite.name}-{suite.version}.tar.gz"
    if not wanted.exists():
        print(f"{suite.name}: downloads {wanted.name}", flush=True)
        command(
            f"download of {wanted.name}", sys.executable, "-m", *PIP, "download", "--no-deps", "--no-binary", ":all:",
            "--dest", place.downloads, f"{suite.name}=={suite.version}",
        )
    if not wanted.exists():
        there = sorted(path.name for path in place.downloads.iterdir())
        raise CannotRun(f"{wanted.name} is not what was downloaded: {there}")
    return wanted


def unpack(place: Place, archive: Path) -> bool:
    """Unpack it anew, without the code that would hide the installed package. Has it tests?"""
    shutil.rmtree(place.source, ignore_errors=True)
    place.own.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(place.own, filter="data")
    if place.suite.package:
        shutil.rmtree(place.source / place.suite.package)
    return (place.source / "tests").is_dir()


def make_environment(place: Place) -> None:
    """A virtual environment with what requirements/ names, made anew when that changes."""
    requirements = HERE / "requirements" / f"{place.suite.name}.txt"
    state = hashlib.sha256(requirements.read_bytes() + TAG.encode()).hexdigest()
    stamp = place.venv / ".ready"
    if stamp.exists() and stamp.read_text() == state:
        return
    print(f"{place.suite.name}: makes its environment", flush=True)
    command("the virtual environment", "sh", ROOT / ".ci" / "make-venv", sys.executable, place.venv)
    command(f"installing {requirements.name}", place.python, "-m", *PIP, "install", "-r", requirements)
    stamp.write_text(state)


def selection(suite: Suite, pattern: str | None) -> tuple[str, ...]:
    """pytest's -k, which counts only once, for what the suite leaves out and the caller asks for."""
    parts = [f"({part})" for part in (suite.select, pattern) if part]
    return ("-k", " and ".join(parts)) if parts else ()


def run(place: Place, which: str, *, stock: bool, arguments: tuple[str, ...]) -> Report:
    """Run the tests that arguments select or name, on one of the two loops; what they reported."""
    report, log = place.report(which), place.own / f"{which}.log"
    report.unlink(missing_ok=True)
    code = [ROOT / "src", HERE / "inside", ROOT / "tests" / "conformance"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, code)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOMELOOP_PEERS_REPORT": str(report),
        "HOMELOOP_PEERS_STOCK": "1" if stock else "",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [place.python, "-m", "pytest", "-p", "homeloop_peers", *OPTIONS, *place.suite.arguments, *arguments],
            cwd=place.source, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(place.suite.limit_s)
        except subprocess.TimeoutExpired:
            print(f"{place.suite.name}: ended after {place.suite.limit_s} s", flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)          # and the processes that a failed test left
            process.wait()
    said = parse_report(report.read_text(encoding="utf-8") if report.exists() else "")
    if not said.ended:
        print(f"{place.suite.name}: {log.name} ends:\n{log.read_text(errors='replace')[-LOG_TAIL:]}", flush=True)
    return said


def run_again(place: Place, verdict: Verdict) -> list[str]:
    """Run what failed on our loop alone by itself; take what then passes, or fails on both, off the verdict."""
    unsteady: list[str] = []
    if not 0 < len(verdict.ours) <= AGAIN_MAX:
        return unsteady
    suspects = tuple(verdict.ours)
    for number in range(AGAIN):
        stock = run(place, f"stock-again-{number}", stock=True, arguments=suspects)
        ours = run(place, f"ours-again-{number}", stock=False, arguments=suspects)
        steady = {test for test in suspects if ours.outcomes.get(test) == FAILED != stock.outcomes.get(test)}
        steady |= {test for test in suspects if test not in ours.outcomes}
        unsteady += [test for test in suspects if test not in steady]
        suspects = tuple(test for test in suspects if test in steady)
        if not suspects:
            break
    verdict.ours[:] = suspects
    return unsteady


def tell(place: Place, verdict: Verdict, reports: tuple[Report, Report], unsteady: list[str]) -> None:
    """Print what came out: counts, then each finding with its text."""
    ours, stock = reports
    name = place.suite.name
    for kind, report in (("asyncio's loop", stock), ("our loop", ours)):
        counts = Counter(report.outcomes.values())
        print(f"{name}: {kind:15}", ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    for why, count in Counter(last_line(ours.texts[test]) for test in verdict.environment).most_common():
        print(f"{name}: {count} fail on both: {why}")
    for test in verdict.better:
        print(f"{name}: fails on asyncio's loop only: {test}: {last_line(stock.texts[test])}")
    for test in unsteady:
        print(f"{name}: unsteady: {test}: {last_line(ours.texts[test])}")
    for test in verdict.expected:
        print(f"{name}: fails as expected: {test}")
    for test in verdict.ours:
        print(f"\n{name}: FAILS ON OUR LOOP ONLY: {test}\n{ours.texts[test]}")
    for what, tests in (
        ("PASSES NOW, take it off the list", verdict.passes), ("STALE, take it off the list", verdict.stale),
        ("RAN ON ASYNCIO'S LOOP ONLY", verdict.lost), ("PROVES NOTHING", verdict.broken),
    ):
        for text in tests:
            print(f"{name}: {what}: {text}")
    print(f"{name}: {'good' if verdict.good else 'NOT GOOD'}; logs in {place.own.relative_to(ROOT)}", flush=True)


def run_suite(suite: Suite, pattern: str | None) -> bool:
    """Run one suite on both loops, print what came out; is it as it should be?"""
    place = Place(suite)
    expected = parse_list((HERE / "expected" / f"{suite.name}.txt").read_text(encoding="utf-8"))
    has_tests = unpack(place, download(place))
    if suite.without_tests:
        if has_tests:
            raise CannotRun(f"{suite.name} {suite.version} comes with its tests after all: run them")
        print(f"{suite.name}: not run: {suite.without_tests}")
        return True
    if not has_tests:
        raise CannotRun(f"{suite.name} {suite.version} comes without its tests")
    make_environment(place)
    arguments = selection(suite, pattern)
    began = time.monotonic()
    stock = run(place, "stock", stock=True, arguments=arguments)
    between = time.monotonic()
    ours = run(place, "ours", stock=False, arguments=arguments)
    print(f"{suite.name}: {between - began:.0f} s on asyncio's loop, {time.monotonic() - between:.0f} s on ours")
    verdict = judge(ours, stock, expected, whole=pattern is None, at_least=suite.at_least)
    unsteady = run_again(place, verdict)
    tell(place, verdict, (ours, stock), unsteady)
    return verdict.good


def chosen(only: str | None) -> list[Suite]:
    """The suites that --only names, all without it. CannotRun for a name that is none."""
    if only is None:
        return SUITES
    by_name = {suite.name: suite for suite in SUITES}
    unknown = [name for name in only.split(",") if name not in by_name]
    if unknown:
        raise CannotRun(f"--only {','.join(unknown)}: the suites are {', '.join(by_name)}")
    return [by_name[name] for name in only.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PEER[,PEER...]")
    parser.add_argument("-k", metavar="PATTERN", help="only tests whose names match, as with pytest")
    options = parser.parse_args()
    try:
        results = {suite.name: run_suite(suite, options.k) for suite in chosen(options.only)}
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    bad = [name for name, good in results.items() if not good]
    print("not as it should be:" if bad else "all as it should be:", ", ".join(bad or results))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
