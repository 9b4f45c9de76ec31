"""Channel: items from coroutines and threads to coroutines and threads, in order, bounded."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from time import monotonic
from typing import Any, Final, Generic, TypeVar

from homeloop.core.loop import current_task, running_loop
from homeloop.errors import ChannelClosed, UsageError, WouldBlock
from homeloop.sync.waiting import NOBODY, Line, LoopWaiter, ThreadWaiter, Waitable, Waiter, caller, plain_thread

__all__ = ["UNBOUNDED", "Channel"]

T = TypeVar("T")

UNBOUNDED: Final = math.inf
"""A capacity of a Channel: send() never waits, and nothing limits the memory."""

_RECEIVE = object()                     # what a receiver wants; a sender wants to send: that is his item, in a tuple
_CLOSED = object()                      # what a receiver gets at the end
_TAKEN = object()                       # what a sender gets whose item receive_nowait() took


class Channel(Waitable, Generic[T]):
    """A queue with two ends, each for coroutines of any context or asyncio loop, and for plain threads.

    capacity: items that send() may leave there; 0, send() returns when a receiver has the item; UNBOUNDED.
    An item whose send() returned is received once, unless nobody receives again; one whose send() raised, never
    (but see receive_nowait). A receiver who is cancelled as an item comes leaves it to the next.
    Items of one sender are received in the order of his sends; waiting senders and receivers are served in order.
    What never waits is for any thread, but no signal handler.
    """

    # A waiting sender is granted a place, not relieved of his item: he puts it there himself when he runs. A sender
    # that is cancelled has therefore not sent. A waiting receiver is promised an item, not given it: he takes the head
    # of the buffer when he runs. One that is cancelled has had nothing in his hands, and no item is ever put back, so
    # that the order is kept. A waiting receiver counts as a place: capacity 0 needs no code.

    __slots__ = ("_buffer", "_closed", "_promised", "_reason", "_receivers", "_reserved", "capacity")

    def __init__(self, capacity: float, *, name: str = "") -> None:
        if capacity < 0 or (capacity != UNBOUNDED and capacity != int(capacity)):
            raise UsageError(f"a channel's capacity is 0 or more items or UNBOUNDED, not {capacity!r}")
        super().__init__(name)
        self.capacity = capacity
        self._buffer: deque[T] = deque()        # under _lock
        self._receivers: Line = NOBODY          # under _lock; senders stand in _line
        self._promised = 0                      # under _lock: items of receivers that were granted and did not run yet
        self._reserved = 0                      # under _lock: places of senders that were granted and did not run yet
        self._closed = False                    # under _lock
        self._reason: BaseException | str | None = None     # under _lock

    # -- asking: any thread, never waits -----------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Was it closed? What it still has can be received."""
        return self._closed

    def qsize(self) -> int:
        """How many items were sent and not received."""
        return len(self._buffer)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        capacity = "unbounded" if self.capacity == UNBOUNDED else self.capacity
        return self._describe(f"{state} items={len(self._buffer)} capacity={capacity}")

    # -- sending -----------------------------------------------------------------------------------------

    def send(self, item: T, timeout: float | None = None) -> Any:
        """Send an item; wait for a place. In a coroutine: `await channel.send(item)`.

        ChannelClosed if it is or gets closed; TimeoutError in a thread after `timeout` seconds. Not sent then.
        """
        loop = running_loop()
        if loop is None:
            return self._send_blocking(item, timeout)
        if timeout is None and current_task(loop) is not None:      # in_coroutine(), without asking again
            return self._send(item)
        return self._send_serving(item, timeout)

    def send_nowait(self, item: T) -> None:
        """Send an item if there is a place and nobody waits for one; else WouldBlock. Any thread."""
        with self._lock:
            self._check_open_locked()
            woken = self._try_send_locked(item)
        if woken is None:
            raise WouldBlock(f"{self!r} has no place")
        self._wake(woken)

    def close(self, reason: BaseException | str | None = None) -> None:
        """No more items. Any thread, never waits; what counts is the first time.

        Who waits to send gets ChannelClosed; receivers get what was sent, then ChannelClosed. Iteration ends there
        quietly, unless there is a reason.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._reason = reason
            woken = list(self._grant_locked())
            while self._receivers:
                woken.append(self._pop_receiver_locked(_CLOSED))
        self._wake(woken)

    # -- receiving ---------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Any:
        """Receive the next item; wait for it. In a coroutine: `await channel.receive()`.

        ChannelClosed at the end; TimeoutError in a thread after `timeout` seconds.
        """
        loop = running_loop()
        if loop is None:
            return self._receive_blocking(timeout)
        if timeout is None and current_task(loop) is not None:
            return self._receive()
        return self._receive_serving(timeout)

    def receive_nowait(self) -> T:
        """Receive the next item if there is one; else WouldBlock, at the end ChannelClosed. Any thread.

        At capacity 0 it takes the item of a waiting sender, which cannot be undone if that is cancelled just then:
        the one case in which a send() that raised has sent.
        """
        with self._lock:
            if len(self._buffer) > self._promised:
                item = self._buffer.popleft()
                woken = self._grant_locked()
            elif self._line and not self._closed:
                sender = self._pop_locked()
                sender.value = _TAKEN
                (item,) = sender.wants
                woken = (sender,)
            else:
                self._check_open_locked()
                raise WouldBlock("the channel has no item")
        self._wake(woken)
        return item

    def __aiter__(self) -> AsyncIterator[T]:
        return self._iterate()

    def __iter__(self) -> Iterator[T]:
        plain_thread(self, "iteration")
        return self._iterate_blocking()

    async def _iterate(self) -> AsyncIterator[T]:
        while True:
            try:
                item = await self._receive()
            except ChannelClosed as closed:
                if closed.reason is None:
                    return
                raise
            yield item

    def _iterate_blocking(self) -> Iterator[T]:
        while True:
            try:
                item = self._receive_blocking(None)
            except ChannelClosed as closed:
                if closed.reason is None:
                    return
                raise
            yield item

    # -- inside ------------------------------------------------------------------------------------------

    async def _send(self, item: T) -> None:
        waiter: LoopWaiter | None = None
        while True:
            granted = waiter
            if granted is None:
                with self._lock:
                    if not (self._line or self._receivers or self._closed) and (    # as in _send_blocking
                            len(self._buffer) - self._promised + self._reserved < self.capacity):
                        self._buffer.append(item)
                        return
                    self._check_open_locked()
                    woken = self._try_send_locked(item)
                if woken is not None:
                    self._wake(woken)
                    return
            waiter = LoopWaiter(caller(), "send", (item,))
            if self._send_or_join(waiter, granted):
                return
            await self._sleep(waiter)

    def _send_serving(self, item: T, timeout: float | None) -> None:
        plain_thread(self, "send")
        self._send_blocking(item, timeout)

    def _send_blocking(self, item: T, timeout: float | None) -> None:
        with self._lock:
            # What the two calls below do where nobody waits at either end: without them an item costs 15 % less.
            if not (self._line or self._receivers or self._closed) and (
                    len(self._buffer) - self._promised + self._reserved < self.capacity):
                self._buffer.append(item)
                return
            self._check_open_locked()
            woken = self._try_send_locked(item)
        if woken is not None:
            self._wake(woken)
            return
        end = None if timeout is None else monotonic() + timeout
        granted: ThreadWaiter | None = None
        while True:
            waiter = self._thread_waiter("send", (item,))
            if self._send_or_join(waiter, granted):
                return
            if not self._block(waiter, None if end is None else end - monotonic()):
                raise TimeoutError(f"{self!r} had no place for {timeout} s")
            granted = waiter

    def _send_or_join(self, waiter: Waiter, granted: Waiter | None) -> bool:
        """Send what the waiter wants to, or have it stand in line. `granted`: its earlier wait, which has ended."""
        woken: Sequence[Waiter] | None
        with self._lock:
            if granted is not None:
                if granted.value is _TAKEN:
                    return True
                self._reserved -= 1
            self._check_open_locked()
            (item,) = waiter.wants
            woken = self._put_locked(item) if granted and self._room_locked() > 0 else self._try_send_locked(item)
            if woken is None:
                self._join_locked(waiter)
                if granted is not None:         # the receiver that it was for has left
                    self._line.move_to_end(waiter, last=False)
        if woken is None:
            return False
        self._wake(woken)
        return True

    async def _receive(self) -> T:
        waiter = None
        with self._lock:
            if len(self._buffer) > self._promised:
                item = self._buffer.popleft()
                woken = self._grant_locked() if self._line else ()
            else:
                self._check_open_locked()
                waiter = LoopWaiter(caller(), "receive", _RECEIVE)
                woken = self._join_receivers_locked(waiter)
        if woken:
            self._wake(woken)
        if waiter is None:
            return item
        await self._sleep(waiter)
        return self._received(waiter)

    def _receive_serving(self, timeout: float | None) -> T:
        plain_thread(self, "receive")
        return self._receive_blocking(timeout)

    def _receive_blocking(self, timeout: float | None) -> T:
        waiter = None
        with self._lock:
            if len(self._buffer) > self._promised:
                item = self._buffer.popleft()
                woken = self._grant_locked() if self._line else ()
            else:
                self._check_open_locked()
                waiter = self._thread_waiter("receive", _RECEIVE)
                woken = self._join_receivers_locked(waiter)
        if woken:
            self._wake(woken)
        if waiter is None:
            return item
        if not self._block(waiter, timeout):
            raise TimeoutError(f"{self!r} had no item for {timeout} s")
        return self._received(waiter)

    def _join_receivers_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        if self._receivers is NOBODY:
            self._receivers = OrderedDict()
        self._receivers[waiter] = None
        waiter.line = self._receivers
        return self._grant_locked() if self._line else ()

    def _received(self, waiter: Waiter) -> T:
        if waiter.value is _CLOSED:
            raise self._closed_error()
        with self._lock:
            self._promised -= 1
            return self._buffer.popleft()

    def _closed_error(self) -> ChannelClosed:
        return ChannelClosed(f"channel{f' {self.name!r}' if self.name else ''} is closed", self._reason)

    def _check_open_locked(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _room_locked(self) -> float:
        return self.capacity + len(self._receivers) + self._promised - len(self._buffer) - self._reserved

    def _try_send_locked(self, item: T) -> Sequence[Waiter] | None:
        """Put the item if there is room and nobody is before us; else None."""
        return None if self._line or self._room_locked() <= 0 else self._put_locked(item)

    def _put_locked(self, item: T) -> Sequence[Waiter]:
        self._buffer.append(item)
        return self._promise_locked()

    def _promise_locked(self) -> Sequence[Waiter]:
        """There is an item more that nobody has been promised."""
        if not self._receivers:
            return ()
        self._promised += 1
        return (self._pop_receiver_locked(None),)

    def _pop_receiver_locked(self, value: Any) -> Waiter:
        waiter, _ = self._receivers.popitem(last=False)
        waiter.granted = True
        waiter.value = value
        return waiter

    def _grant_locked(self) -> Sequence[Waiter]:
        woken = []
        while self._line and (self._closed or self._room_locked() > 0):
            woken.append(self._pop_locked())
            self._reserved += 1
        return woken

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        if waiter.wants is not _RECEIVE:
            if waiter.value is _TAKEN:
                return ()
            self._reserved -= 1
            return self._grant_locked()
        if waiter.value is _CLOSED:
            return ()
        self._promised -= 1
        return self._promise_locked()

    def _everybody_locked(self) -> list[Waiter]:
        return [*self._line, *self._receivers]

    def _count(self) -> int:
        return len(self._line) + len(self._receivers)
