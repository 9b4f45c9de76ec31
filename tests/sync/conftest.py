"""`parties`: every test that takes it runs over all kinds of loops and threads. `run`, `homes`: for task groups."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator

import pytest

import homeloop
from tests.sync import parties as kinds
from tests.sync.task_groups import PARENTS, Run


@pytest.fixture(params=kinds.CASES)
def parties(request: pytest.FixtureRequest) -> Iterator[kinds.Parties]:
    with kinds.parties(request.param) as found:
        yield found


@pytest.fixture(params=PARENTS)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs the parent, in each kind of place."""
    return PARENTS[request.param]


@pytest.fixture
def homes() -> Iterator[list[homeloop.AioContext | None]]:
    """Contexts for children: the parent's own, two IOThreads, a main context, and uvloop where it is installed."""
    try:
        factory = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        factory = asyncio.SelectorEventLoop
    with (homeloop.IOThread("a") as a, homeloop.IOThread("b") as b, homeloop.Runtime() as rt,
          homeloop.IOThread("foreign", loop_factory=factory) as foreign):
        yield [None, a.context, b.context, rt.main, foreign.context]
