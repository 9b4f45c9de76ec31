"""CPython's own tests of asyncio's and threading's primitives, run against ours where they apply.

They come with the interpreter (package `test`). Small adapters stand between: asyncio's and threading's locks have
no owner, their queues other names. What is listed in NOT_OURS may fail, with the reason; everything else must pass.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import signal
import sys
import unittest
from collections.abc import Callable
from collections.abc import Coroutine as CoroutineABC
from types import FrameType
from typing import Any
from unittest import mock

import pytest

from homeloop import TaskGroup
from homeloop.errors import WouldBlock, WrongState
from homeloop.sync import UNBOUNDED, Channel, Condition, Event, Mutex, Semaphore
from homeloop.testing import JumpingLoop

ONE_TEST_S = 5
LOOKS_INSIDE = re.compile(r"^AttributeError: .* has no attribute '_", re.MULTILINE)     # a test of their insides

TEXT = "asks for asyncio's or threading's own texts"
NOT_OURS = {
    "test_repr": TEXT,
    "test_lock": TEXT,
    "test_lock_doesnt_accept_loop_parameter": TEXT,
    "test_explicit_lock": "a threading.Lock is not one of our locks",
    "test_ambiguous_loops": "several loops may share ours",
    "test_acquire_fifo_order_2": "who was granted a unit has it before it runs: the order of running is another",
    "test_semaphore_value": "another error for a negative value",
    "test_constructor": "another error for a negative value",
    "ThreadCondition.test_acquire": "acquires a lock twice without waiting: ours are not recursive",
    "test_acquire_timeout": "threading's acquire(blocking, timeout)",
    "test_float_maxsize": "a capacity of 1.3 items is refused",
    "test_coro_closed_when_tg_closed": "asks for a loop that tests before it may have taken",
}


if sys.version_info < (3, 12, 4):
    # Their suites await a coroutine that was refused; since then it is closed, as ours always is.
    NOT_OURS |= dict.fromkeys(
        ("test_taskgroup_no_create_task_after_failure", "test_taskgroup_finished", "test_taskgroup_not_entered",
         "test_taskgroup_without_parent_task"), "a refused coroutine is closed, as asyncio does since 3.13",
    )


class Group(TaskGroup):
    """With the one name of their insides that a test looks at in the middle."""

    @property
    def _tasks(self) -> Any:
        return self._children


class Spawning(Group):
    """With Coroutines for children where a test asks for tasks."""

    def create_task(self, coro: CoroutineABC[Any, Any, Any], *, name: str | None = None, **options: Any) -> Any:
        if options:                             # contextvars given by hand
            return super().create_task(coro, name=name, **options)
        return self.spawn(coro, name=name)


class Ownerless(Mutex):
    """As asyncio.Lock: anybody may release."""

    def held(self) -> bool:
        return self.locked()

    def _check_not_mine(self, me: Any) -> None:
        pass

    def release(self) -> None:
        if not self.locked():
            raise WrongState("not locked")
        self._release()

    async def __aexit__(self, *_error: object) -> None:
        self.release()


class OwnerlessCondition(Condition):
    """As asyncio.Condition."""

    def __init__(self, lock: Any = None) -> None:
        super().__init__(Ownerless() if lock is None else lock)

    def locked(self) -> bool:
        locked: bool = self.lock.locked()       # type: ignore[attr-defined]
        return locked


class Queue:
    """As asyncio.Queue, as far as items come and go."""

    def __init__(self, maxsize: int = 0) -> None:
        self.maxsize = maxsize
        self._channel: Channel[Any] = Channel(maxsize if maxsize > 0 else UNBOUNDED)
        self.put, self.get = self._channel._send, self._channel._receive
        self.qsize = self._channel.qsize

    def empty(self) -> bool:
        return self.qsize() == 0

    def full(self) -> bool:
        return 0 < self.maxsize <= self.qsize()

    def put_nowait(self, item: Any) -> None:
        try:
            self._channel.send_nowait(item)
        except WouldBlock:
            raise asyncio.QueueFull from None

    def get_nowait(self) -> Any:
        try:
            return self._channel.receive_nowait()
        except WouldBlock:
            raise asyncio.QueueEmpty from None


def suite_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"not installed: {name} (Debian: libpython3-testsuite)")


def on_loop(case: type[unittest.TestCase], factory: Callable[[], asyncio.AbstractEventLoop]) -> type[unittest.TestCase]:
    """An IsolatedAsyncioTestCase whose loop is made by `factory`."""

    def set_up(self: Any) -> None:
        self._asyncioRunner = asyncio.Runner(debug=True, loop_factory=factory)

    return type(case.__name__, (case,), {"_setupAsyncioRunner": set_up})


def failures_of(cases: list[type[unittest.TestCase]]) -> tuple[int, dict[str, str]]:
    """How many ran, and what the failed ones said. Each has a few seconds: a hang is a failure."""
    result = unittest.TestResult()

    def hangs(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"did not end in {ONE_TEST_S} s")

    before = signal.signal(signal.SIGALRM, hangs)
    try:
        for case in cases:
            for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
                if not applies(".".join(test.id().split(".")[-2:])):
                    continue
                signal.alarm(ONE_TEST_S)
                test.run(result)
                signal.alarm(0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    failed = {test.id(): text for test, text in result.failures + result.errors if not LOOKS_INSIDE.search(text)}
    return result.testsRun, failed


def applies(name: str) -> bool:
    return name not in NOT_OURS and name.rpartition(".")[2] not in NOT_OURS


def check(cases: list[type[unittest.TestCase]], at_least: int) -> None:
    ran, failed = failures_of(cases)
    assert not failed, "\n\n".join(f"{test}\n{text}" for test, text in failed.items())
    assert ran >= at_least


@pytest.mark.filterwarnings("ignore")
def test_asyncio_locks() -> None:
    suite = suite_module("test.test_asyncio.test_locks")
    ours = {"Lock": Ownerless, "Event": Event, "Semaphore": Semaphore, "Condition": OwnerlessCondition}
    with mock.patch.multiple(asyncio, **ours):      # type: ignore[arg-type]
        check([suite.EventTests, suite.LockTests, suite.SemaphoreTests, suite.ConditionTests], 25)


@pytest.mark.filterwarnings("ignore")
def test_asyncio_queues() -> None:
    suite = suite_module("test.test_asyncio.test_queues")
    with mock.patch.object(asyncio, "Queue", Queue):
        check([suite.QueueGetTests, suite.QueuePutTests], 10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(120)
def test_threading_locks() -> None:
    suite = suite_module("test.lock_tests")
    events = type("ThreadEvent", (suite.EventTests,), {"eventtype": staticmethod(Event)})
    conditions = type("ThreadCondition", (suite.ConditionTests,), {"condtype": staticmethod(Condition)})
    semaphores = type("ThreadSemaphore", (suite.SemaphoreTests,), {"semtype": staticmethod(Semaphore)})
    check([events, conditions, semaphores], 15)


class JumpingStockLoop(asyncio.SelectorEventLoop):
    """asyncio's own, whose time jumps to the next timer: the suite's sleeps need not be slept."""

    _now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        timers: list[Any] = self._scheduled     # type: ignore[attr-defined]
        if timers and not self._ready:          # type: ignore[attr-defined]
            self._now_s = max(self._now_s, timers[0].when())
        super()._run_once()                     # type: ignore[misc]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", [Group, Spawning])
@pytest.mark.parametrize("loop", [JumpingStockLoop, JumpingLoop])
def test_asyncio_taskgroups(loop: Any, group: type[TaskGroup]) -> None:
    suite = suite_module("test.test_asyncio.test_taskgroups")
    cases = [case for case in vars(suite).values() if isinstance(case, type) and issubclass(case, unittest.TestCase)]
    with mock.patch.object(asyncio, "TaskGroup", group), mock.patch.object(suite.taskgroups, "TaskGroup", group):
        check([on_loop(case, loop) for case in cases], 30)
