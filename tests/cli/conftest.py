"""Fixtures: homeloop processes that end with the test, and the signals of this one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.cli.running import Running


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """start("serve", "memory:1M") runs the command; killed at the end of the test."""
    started: list[Running] = []

    def start(*arguments: str, **options: object) -> Running:
        started.append(Running(*arguments, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.fixture
def running_server(start: Callable[..., Running]) -> Callable[..., tuple[Running, str]]:
    """running_server("memory:1M", "--name", "x") -> the process, and its first export's URI once clients may come."""

    def running_server(*arguments: str, **options: object) -> tuple[Running, str]:
        running = start("serve", *arguments, **options)
        return running, running.uri()

    return running_server


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """main() keeps the signals that `serve` takes over; the test run wants them back."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
