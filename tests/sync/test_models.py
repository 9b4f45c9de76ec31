"""Mutex, RwLock, Channel: state machines against sequential models. Hypothesis chooses who comes, gives up, lets go.

All waiters are tasks of one loop that runs until nothing more is ready after each step; cancellation comes between
a grant and its waiter's turn too (the `hasty` steps do not let the loop run in between).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from homeloop.errors import WouldBlock
from homeloop.sync import Channel, Mutex, RwLock
from tests.sync.machines import SETTINGS, OnOneLoop


class Holder:
    """A task that takes a lock, keeps it until told, and gives it back."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lock: Any, kind: str = "") -> None:
        self.kind = kind
        self.let_go = asyncio.Event()
        self.has_it = False
        self.task = loop.create_task(self._main(lock))

    async def _main(self, lock: Any) -> None:
        async with lock:
            self.has_it = True
            await self.let_go.wait()
            self.has_it = False


class MutexMachine(OnOneLoop):
    """Model: a queue whose head owns the mutex."""

    def __init__(self) -> None:
        super().__init__()
        self.mutex = Mutex()
        self.queue: list[Holder] = []

    @rule()
    def come(self) -> None:
        self.queue.append(Holder(self.loop, self.mutex))
        self.settle()

    @precondition(lambda self: self.queue)
    @rule()
    def release(self) -> None:
        self.queue.pop(0).let_go.set()
        self.settle()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.queue))
        self.queue.remove(who)
        who.task.cancel()
        self.settle()

    @precondition(lambda self: len(self.queue) > 1)
    @rule()
    def hasty_release_and_cancel_of_the_next(self) -> None:
        first, second = self.queue[:2]
        del self.queue[:2]
        self.loop.call_soon(first.let_go.set)
        # The first runs in the next turn, and hands over; the second is cancelled in that turn, before its own.
        self.loop.call_soon(lambda: self.loop.call_soon(second.task.cancel))
        self.settle()

    @rule()
    def nowait(self) -> None:
        if self.queue:
            with pytest.raises(WouldBlock):
                self.mutex.acquire_nowait()
        else:
            self.mutex.acquire_nowait()
            self.mutex.release()

    @invariant()
    def the_head_owns_it(self) -> None:
        assert [who.has_it for who in self.queue] == [number == 0 for number in range(len(self.queue))]
        assert self.mutex.owner is (self.queue[0].task if self.queue else None)
        assert self.mutex.locked() == bool(self.queue)
        assert len(self.mutex.waiters()) == max(0, len(self.queue) - 1)


class RwLockMachine(OnOneLoop):
    """Model: who came, in order; those have it before whom nobody is who excludes them."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = RwLock()
        self.inside: list[Holder] = []
        self.line: deque[Holder] = deque()

    def admit(self) -> None:
        while self.line:
            head = self.line[0]
            if self.inside and (head.kind == "write" or self.inside[0].kind == "write"):
                return
            self.inside.append(self.line.popleft())

    @rule(kind=st.sampled_from(["read", "write"]))
    def come(self, kind: str) -> None:
        self.line.append(Holder(self.loop, getattr(self.lock, kind), kind))
        self.admit()
        self.settle()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.inside))
        self.inside.remove(who)
        who.let_go.set()
        self.admit()
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(list(self.line)))
        self.line.remove(who)
        who.task.cancel()
        self.admit()
        self.settle()

    @invariant()
    def those_inside_have_it(self) -> None:
        assert all(who.has_it for who in self.inside)
        assert not any(who.has_it for who in self.line)
        writers = [who for who in self.inside if who.kind == "write"]
        assert self.lock.readers == len(self.inside) - len(writers)
        assert self.lock.writer is (writers[0].task if writers else None)
        assert len(self.lock.waiters()) == len(self.line)


class ChannelMachine(OnOneLoop):
    """Model: items that were sent, senders in line, receivers in line."""

    capacity = 2

    def __init__(self) -> None:
        super().__init__()
        self.channel: Channel[int] = Channel(self.capacity)
        self.items: deque[int] = deque()
        self.senders: deque[tuple[int, asyncio.Task[None]]] = deque()
        self.receivers: deque[asyncio.Task[int]] = deque()
        self.expected: list[tuple[asyncio.Task[int], int]] = []
        self.number = 0

    def move(self) -> None:
        while True:
            if self.receivers and self.items:
                self.expected.append((self.receivers.popleft(), self.items.popleft()))
            elif self.senders and len(self.items) < self.capacity + len(self.receivers):
                self.items.append(self.senders.popleft()[0])
            else:
                return

    @rule()
    def send(self) -> None:
        self.number += 1
        self.senders.append((self.number, self.loop.create_task(_send(self.channel, self.number))))
        self.move()
        self.settle()

    @rule()
    def receive(self) -> None:
        self.receivers.append(self.loop.create_task(_receive(self.channel)))
        self.move()
        self.settle()

    @precondition(lambda self: self.senders)
    @rule(data=st.data())
    def cancel_sender(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(list(self.senders)))
        self.senders.remove(who)
        who[1].cancel()
        self.settle()

    @precondition(lambda self: self.receivers)
    @rule(data=st.data())
    def cancel_receiver(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(list(self.receivers)))
        self.receivers.remove(who)
        who.cancel()
        self.settle()

    @rule()
    def receive_nowait(self) -> None:
        if self.items:
            assert self.channel.receive_nowait() == self.items.popleft()
        elif self.senders:
            assert self.channel.receive_nowait() == self.senders.popleft()[0]
        else:
            with pytest.raises(WouldBlock):
                self.channel.receive_nowait()
        self.move()
        self.settle()

    @rule()
    def send_nowait(self) -> None:
        self.number += 1
        if not self.senders and len(self.items) < self.capacity + len(self.receivers):
            self.channel.send_nowait(self.number)
            self.items.append(self.number)
            self.move()
        else:
            with pytest.raises(WouldBlock):
                self.channel.send_nowait(self.number)
        self.settle()

    @invariant()
    def agrees(self) -> None:
        for task, item in self.expected:
            assert task.result() == item
        self.expected.clear()
        assert self.channel.qsize() == len(self.items)
        assert len(self.channel.waiters()) == len(self.senders) + len(self.receivers)


class RendezvousMachine(ChannelMachine):
    """The same without places."""

    capacity = 0


async def _send(channel: Channel[int], item: int) -> None:
    await channel.send(item)


async def _receive(channel: Channel[int]) -> int:
    received: int = await channel.receive()
    return received


for _machine in (MutexMachine, RwLockMachine, ChannelMachine, RendezvousMachine):
    _machine.TestCase.settings = SETTINGS
TestMutex = MutexMachine.TestCase
TestRwLock = RwLockMachine.TestCase
TestChannel = ChannelMachine.TestCase
TestRendezvous = RendezvousMachine.TestCase
