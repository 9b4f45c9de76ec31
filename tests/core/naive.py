"""The naive ways to wake a coroutine, which the behaviours are held against: a test that cannot fail proves nothing."""

from __future__ import annotations

import asyncio
import selectors
import threading
import types
from collections.abc import Coroutine, Generator
from typing import Any

import homeloop


class RunsWhereWoken:
    """Whoever wakes it runs it, on his own thread and stack.

    So did QEMU before June 2021, where every thread without a context took itself for the main thread.
    """

    def __init__(self, coro: Coroutine[Any, Any, Any]) -> None:
        self._coro = coro
        self._ended = False
        self.wake()

    def wake(self) -> bool:
        if self._ended:
            return False
        try:
            self._coro.send(None)
        except StopIteration:
            self._ended = True
        return True

    @staticmethod
    @types.coroutine
    def park() -> Generator[None, None, None]:
        yield


class AlwaysScheduled:
    """Every wake goes through the loop, as with call_soon_threadsafe(): right, and two thread switches long."""

    def __init__(self, co: homeloop.Coroutine[Any]) -> None:
        self._co = co

    def wake(self) -> bool:
        return self._co.schedule()


class SetsAFuture:
    """A future set by whoever wakes: what programs on asyncio do, and what hangs them.

    There is no permit: a wake before the park finds no future. A second one finds it done.
    """

    def __init__(self) -> None:
        self.waiter: asyncio.Future[None] | None = None

    async def park(self) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter

    def wake(self) -> None:
        if self.waiter is not None:
            self.waiter.set_result(None)


class SaysWhenItSleeps(selectors.DefaultSelector):
    """For asyncio's own loop: an event for the sleep that only a wake can end."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeping = threading.Event()

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            self.sleeping.set()
        return super().select(timeout)
