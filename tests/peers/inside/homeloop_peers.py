"""A pytest plugin for the suites of others: our loop in the place of asyncio's, and what became of each test.

runner.py loads it (-p homeloop_peers) into the environment of the peer, where nothing of ours is installed:
it imports nothing but pytest, homeloop, and tests/conformance/replacing.py. HOMELOOP_PEERS_STOCK leaves asyncio
alone. HOMELOOP_PEERS_REPORT is the file that gets one JSON line for each outcome, written at once: what a suite
that is killed had done so far can be read.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from replacing import made, replace_loops

REPORT = Path(os.environ["HOMELOOP_PEERS_REPORT"])
STOCK = bool(os.environ.get("HOMELOOP_PEERS_STOCK"))
TEXT_MAX = 20_000           # characters of one failure

# At import, which -p makes the first of all: before a conftest.py keeps a name of asyncio's for itself.
if not STOCK:
    replace_loops()


def write(**what: Any) -> None:
    with REPORT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    loop = asyncio.new_event_loop()
    write(loop=type(loop).__module__)           # runner.py checks that the right one was tested
    loop.close()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write(test=report.nodeid or "collection", outcome="failed", when="collect", text=report.longreprtext[:TEXT_MAX])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = report.longreprtext[:TEXT_MAX] if report.failed else ""
        write(test=report.nodeid, outcome=report.outcome, when=report.when, text=text)


def pytest_sessionfinish() -> None:
    write(loops=len(made), ended=True)
