"""Runs one module of CPython's own asyncio tests with homeloop's loop in the place of asyncio's.

    python -m tests.conformance.runner test_events [--only PATTERN] [--stock]

A process of its own per module: asyncio's names are replaced before the module loads. The last line of
standard output is a JSON object: how many tests ran, which were skipped, which failed and how, and how many
loops of ours were made (0 would mean that nothing was tested). --stock leaves asyncio alone: what fails then
too is not homeloop's.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import sys
import time
import unittest
import unittest.mock
from typing import Any

from tests.conformance.replacing import SelectorEventLoop, made, replace_loops

HANG_S = 240                # then every thread's stack is printed, and the process ends
SLOW_S = 2.0                # tests that take longer are named
NEED_MOCKS = {"test_selector_events", "test_unix_events"}     # they ask a mock which readers it has


def replace_mocks(module: Any) -> None:
    """Let tests that run on a mock of a loop, for no reason of their own, run on ours."""
    test_case: Any = importlib.import_module("test.test_asyncio.utils").TestCase
    of_its_own = test_case.new_test_loop

    def new_test_loop(case: Any, gen: Any = None) -> Any:
        if gen is not None:             # the test drives the clock
            return of_its_own(case, gen)
        loop = SelectorEventLoop()
        case.set_event_loop(loop)
        return loop

    def new_loop(case: Any) -> Any:     # test_runners
        loop = SelectorEventLoop()
        loop.shutdown_ag_run = False

        async def shutdown_asyncgens() -> None:
            loop.shutdown_ag_run = True
            await type(loop).shutdown_asyncgens(loop)

        loop.shutdown_asyncgens = shutdown_asyncgens
        return loop

    test_case.new_test_loop = new_test_loop
    if module.__name__.endswith("test_runners"):
        module.BaseTest.new_loop = new_loop


def replace_selector_loop(module: Any) -> None:
    """Let test_selector_events ask a loop of ours what it does with a mock of a selector.

    Its other classes test transports, which are asyncio's own, on mocks of loops; they run as they are.
    """
    def on_ours(selector: Any) -> Any:
        selector.glance.return_value = []           # what ours calls in the place of select()
        selector.sleep.return_value = []
        selector.polling = None
        loop = SelectorEventLoop()
        loop._selector.close()
        loop._selector = selector
        for end in (loop._ssock, loop._csock):
            end.close()
        loop._ssock, loop._csock = unittest.mock.Mock(), unittest.mock.Mock()
        loop._close_self_pipe = lambda: None
        return loop

    module.TestBaseSelectorEventLoop = on_ours


class Gathering(unittest.TextTestResult):
    """A result that keeps (test id, kind, text) of all that did not pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bad: dict[str, str] = {}
        self.slow: dict[str, float] = {}
        self._begun = 0.0

    def startTest(self, test: unittest.TestCase) -> None:
        self._begun = time.monotonic()
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        took = time.monotonic() - self._begun
        if self._begun and took > SLOW_S:
            self.slow[test.id()] = round(took, 1)
        self._begun = 0.0               # a skipped class stops without a start
        super().stopTest(test)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self.bad[test.id()] = self.errors[-1][1]

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self.bad[test.id()] = self.failures[-1][1]

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.bad[test.id()] = "".join(text for _, text in (self.errors + self.failures)[-1:])

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        super().addUnexpectedSuccess(test)
        self.bad[test.id()] = "passed, though CPython's suite expects a failure"


def run_module(name: str, only: str | None, stock: bool) -> dict[str, Any]:
    """Run test.test_asyncio.<name> (tests whose id has `only` in it); return what happened."""
    module = importlib.import_module(f"test.test_asyncio.{name}")
    if not stock and name not in NEED_MOCKS:
        replace_mocks(module)
    if not stock and name == "test_selector_events":
        replace_selector_loop(module)
    loader = unittest.TestLoader()
    if only is not None:
        loader.testNamePatterns = [f"*{only}*"]
    suite = loader.loadTestsFromModule(module)
    runner = unittest.TextTestRunner(stream=sys.stderr, verbosity=2, resultclass=Gathering, warnings="default")
    result: Any = runner.run(suite)
    prefix = f"test.test_asyncio.{name}."
    return {
        "ran": result.testsRun,
        "skipped": len(result.skipped),
        "loops": len(made),
        "bad": {test.removeprefix(prefix): text for test, text in sorted(result.bad.items())},
        "slow": {test.removeprefix(prefix): took for test, took in result.slow.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("--only", metavar="PATTERN")
    parser.add_argument("--stock", action="store_true")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    if not options.stock:
        replace_loops()
    # A line of its own: a test that was killed half-way may have left an unfinished one.
    print("\n" + json.dumps(run_module(options.module, options.only, options.stock)))


if __name__ == "__main__":
    main()
