"""Semaphore, SharedResource, Event, OneShot, Barrier and Condition: state machines against sequential models.

As tests/sync/test_models.py. Waiters are cancelled while they wait, and between what wakes them and their turn.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from homeloop.errors import BarrierBroken, WouldBlock, WrongState
from homeloop.sync import Barrier, Condition, Event, OneShot, Semaphore, SharedResource
from tests.sync.machines import SETTINGS, OnOneLoop, awaited

Task = asyncio.Task[Any]


def ended(task: Task) -> bool:
    return task.done() and not task.cancelled()


class SemaphoreMachine(OnOneLoop):
    """Model: a number that may be negative once the limit was made smaller, and a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.semaphore = Semaphore(2, limit=3)
        self.free, self.limit = 2, 3
        self.line: list[Task] = []
        self.granted: list[Task] = []

    def move(self) -> None:
        while self.line and self.free > 0:
            self.free -= 1
            self.granted.append(self.line.pop(0))

    @rule()
    def acquire(self) -> None:
        self.line.append(self.start(awaited(self._acquire())))
        self.move()
        self.settle()

    async def _acquire(self) -> Any:
        return await self.semaphore.acquire()

    @rule(limit=st.integers(0, 5))
    def resize(self, limit: int) -> None:
        self.semaphore.resize(limit)
        self.free += limit - self.limit
        self.limit = limit
        self.move()
        self.settle()

    @rule(n=st.integers(1, 3))
    def release(self, n: int) -> None:
        if self.free + n > self.limit:
            with pytest.raises(WrongState):
                self.semaphore.release(n)
            return
        self.semaphore.release(n)
        self.free += n
        self.move()
        self.settle()

    @rule()
    def nowait(self) -> None:
        if self.free > 0 and not self.line:
            self.semaphore.acquire_nowait()
            self.free -= 1
        else:
            with pytest.raises(WouldBlock):
                self.semaphore.acquire_nowait()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.line))
        self.line.remove(who)
        who.cancel()
        self.settle()

    @precondition(lambda self: self.line and 0 <= self.free < self.limit)
    @rule()
    def release_and_cancel_who_got_it(self) -> None:
        self.cancel_before_its_turn(self.line.pop(0), self.semaphore.release)
        self.free += 1
        self.move()
        self.settle()

    @invariant()
    def agrees(self) -> None:
        assert all(ended(task) for task in self.granted)
        assert not any(task.done() for task in self.line)
        assert self.semaphore.value == self.free
        assert len(self.semaphore.waiters()) == len(self.line)
        assert self.semaphore.locked() == (self.free <= 0)


class SharedResourceMachine(OnOneLoop):
    """Model: units that are free, and a queue of requests whose head is next; the total moves."""

    def __init__(self) -> None:
        super().__init__()
        self.resource = SharedResource(4)
        self.total = self.free = 4
        self.line: list[tuple[int, Task]] = []
        self.taken: list[tuple[int, Task]] = []
        self.refused: list[Task] = []

    def move(self) -> None:
        while self.line and (self.line[0][0] <= self.free or self.line[0][0] > self.total):
            units, task = self.line.pop(0)
            if units > self.total:
                self.refused.append(task)
            else:
                self.free -= units
                self.taken.append((units, task))

    async def _acquire(self, units: int) -> Any:
        return await self.resource.acquire(units)

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        units = data.draw(st.integers(1, self.total))
        self.line.append((units, self.start(self._acquire(units))))
        self.move()
        self.settle()

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.taken))
        self.taken.remove(who)
        self.resource.release(who[0])
        self.free += who[0]
        self.move()
        self.settle()

    @precondition(lambda self: self.taken and self.line)
    @rule(data=st.data())
    def release_and_cancel_the_head(self, data: st.DataObject) -> None:
        giver = data.draw(st.sampled_from(self.taken))
        self.taken.remove(giver)
        _, task = self.line.pop(0)
        self.cancel_before_its_turn(task, lambda: self.resource.release(giver[0]))
        self.free += giver[0]
        self.move()
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.line))
        self.line.remove(who)
        who[1].cancel()
        self.move()
        self.settle()

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        total = data.draw(st.integers(1, 8))
        self.resource.resize(total)
        self.free += total - self.total
        self.total = total
        self.move()
        self.settle()

    @invariant()
    def agrees(self) -> None:
        assert all(ended(task) and task.result() for _, task in self.taken)
        assert all(isinstance(task.exception(), WrongState) for task in self.refused)
        assert not any(task.done() for _, task in self.line)
        assert self.resource.available == self.free
        assert self.resource.total == self.total
        assert len(self.resource.waiters()) == len(self.line)


class EventMachine(OnOneLoop):
    """Model: a flag, and who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.event = Event()
        self.flag = False
        self.line: list[Task] = []
        self.gone: list[Task] = []

    async def _wait(self) -> Any:
        return await self.event.wait()

    @rule()
    def wait(self) -> None:
        (self.gone if self.flag else self.line).append(self.start(self._wait()))
        self.settle()

    @rule()
    def set(self) -> None:
        self.event.set()
        self.flag = True
        self.gone += self.line
        self.line.clear()
        self.settle()

    @rule()
    def set_and_clear(self) -> None:
        self.event.set()
        self.event.clear()
        self.flag = False
        self.gone += self.line
        self.line.clear()
        self.settle()

    @rule()
    def clear(self) -> None:
        self.event.clear()
        self.flag = False

    @precondition(lambda self: self.line)
    @rule(data=st.data(), set_first=st.booleans())
    def cancel(self, data: st.DataObject, set_first: bool) -> None:
        who = data.draw(st.sampled_from(self.line))
        self.line.remove(who)
        if set_first:
            self.cancel_before_its_turn(who, self.event.set)
            self.flag = True
            self.gone += self.line
            self.line.clear()
        else:
            who.cancel()
        self.settle()
        assert who.cancelled()

    @invariant()
    def agrees(self) -> None:
        assert all(task.result() is True for task in self.gone)
        assert not any(task.done() for task in self.line)
        assert self.event.is_set() == self.flag
        assert len(self.event.waiters()) == len(self.line)


class OneShotMachine(OnOneLoop):
    """Model: nothing yet, or what came first."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: OneShot[int] = OneShot()
        self.came: int | Exception | None = None
        self.waiting: list[Task] = []

    @rule()
    def wait(self) -> None:
        self.waiting.append(self.start(awaited(self.answer)))
        self.settle()

    @rule(number=st.integers(1), fails=st.booleans())
    def set(self, number: int, fails: bool) -> None:
        value = OSError(number) if fails else number
        put: Any = self.answer.set_exception if fails else self.answer.set_result
        if self.came is None:
            put(value)
            self.came = value
            self.settle()
        else:
            with pytest.raises(WrongState):
                put(value)

    @precondition(lambda self: self.came is None and self.waiting)
    @rule(data=st.data(), set_first=st.booleans())
    def cancel(self, data: st.DataObject, set_first: bool) -> None:
        who = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(who)
        if set_first:
            self.came = 5
            self.cancel_before_its_turn(who, lambda: self.answer.set_result(5))
        else:
            who.cancel()
        self.settle()
        assert who.cancelled()

    @invariant()
    def agrees(self) -> None:
        assert self.answer.done() == (self.came is not None)
        for task in self.waiting:
            assert task.done() == (self.came is not None)
            if isinstance(self.came, Exception):
                assert task.exception() is self.came
            elif self.came is not None:
                assert task.result() == self.came
        assert len(self.answer.waiters()) == (0 if self.came is not None else len(self.waiting))


class BarrierMachine(OnOneLoop):
    """Model: who stands there, less than there are parties; broken or not."""

    parties = 3

    def __init__(self) -> None:
        super().__init__()
        self.barrier = Barrier(self.parties)
        self.line: list[Task] = []
        self.broken = False
        self.passed: list[list[Task]] = []
        self.refused: list[Task] = []

    async def _wait(self) -> Any:
        return await self.barrier.wait()

    @rule()
    def come(self) -> None:
        task = self.start(self._wait())
        if self.broken:
            self.refused.append(task)
        else:
            self.line.append(task)
            if len(self.line) == self.parties:
                self.passed.append(self.line)
                self.line = []
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.line))
        self.line.remove(who)
        who.cancel()
        self.settle()
        assert who.cancelled()

    @rule(for_good=st.booleans())
    def give_up(self, for_good: bool) -> None:
        (self.barrier.abort if for_good else self.barrier.reset)()
        self.broken = for_good
        self.refused += self.line
        self.line = []
        self.settle()

    @invariant()
    def agrees(self) -> None:
        for group in self.passed:
            assert [task.result() for task in group] == list(range(self.parties))
        assert all(isinstance(task.exception(), BarrierBroken) for task in self.refused)
        assert not any(task.done() for task in self.line)
        assert self.barrier.n_waiting == len(self.line)
        assert self.barrier.broken == self.broken


class ConditionMachine(OnOneLoop):
    """Model: who waits, in order; a notification goes to the first, and to the next if that one is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = Condition()
        self.line: list[Task] = []
        self.gone: list[Task] = []

    async def _wait(self) -> bool:
        async with self.condition:
            notified: bool = await self.condition.wait()
            assert self.condition.lock.held()
            return notified

    def notify_now(self, n: int) -> None:
        """In a callback, as the owner of the lock, which is free: nobody keeps it over a turn."""
        self.condition.lock.acquire_nowait()
        self.condition.notify(n)
        self.condition.release()

    @rule()
    def wait(self) -> None:
        self.line.append(self.start(self._wait()))
        self.settle()

    @rule(n=st.integers(0, 3))
    def notify(self, n: int) -> None:
        self.loop.call_soon(self.notify_now, n)
        self.gone += self.line[:n]
        del self.line[:n]
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.line))
        self.line.remove(who)
        who.cancel()
        self.settle()
        assert who.cancelled()

    @precondition(lambda self: self.line)
    @rule()
    def notify_and_cancel_whom_it_was_for(self) -> None:
        first = self.line.pop(0)
        self.cancel_before_its_turn(first, lambda: self.notify_now(1))
        self.gone += self.line[:1]
        del self.line[:1]
        self.settle()
        assert first.cancelled()

    @invariant()
    def agrees(self) -> None:
        assert all(task.result() is True for task in self.gone)
        assert not any(task.done() for task in self.line)
        assert len(self.condition.waiters()) == len(self.line)
        assert not self.condition.lock.locked()     # type: ignore[attr-defined]


for _machine in (SemaphoreMachine, SharedResourceMachine, EventMachine, OneShotMachine, BarrierMachine,
                 ConditionMachine):
    _machine.TestCase.settings = SETTINGS
TestSemaphore = SemaphoreMachine.TestCase
TestSharedResource = SharedResourceMachine.TestCase
TestEvent = EventMachine.TestCase
TestOneShot = OneShotMachine.TestCase
TestBarrier = BarrierMachine.TestCase
TestCondition = ConditionMachine.TestCase
