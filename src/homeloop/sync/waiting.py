"""The one place of homeloop.sync where anybody waits: waiters of every kind, and the line they stand in.

A waiter is a coroutine or task of any asyncio loop, a thread, or a thread that holds a big lock. A primitive has
one plain lock and one or more lines. It decides under its lock who may go on, takes him out of the line and marks
him `granted`; he already has what he waited for then. The wake comes behind the lock, through the waiter's own loop
or gate, and only tells him. So nobody can come in between (no barging), and a wake has to be passed on only by a
waiter who was granted something and will not take it: cancelled in the same turn, or his loop has ended.

Lock order: a primitive's lock is a leaf, held for a few lines; no callback, wake or loop is called under it. Not for
signal handlers and finalizers: they may run in the middle of those lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from typing import Any

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.current import thread
from homeloop.core.loop import HomeLoop, current_task, running_loop
from homeloop.core.waitgraph import AnyOf, Hop, Sleep, begin_await, count_owner_wait, end_await, needs_of_owner
from homeloop.core.waiting import kick, wait_while
from homeloop.errors import WouldBlockLoop

__all__ = [
    "NOBODY",
    "HolderWaiter",
    "Line",
    "LoopWaiter",
    "Owned",
    "OwnerWait",
    "ThreadWaiter",
    "Turn",
    "Waitable",
    "Waiter",
    "caller",
    "deadlocks_refused",
    "in_coroutine",
    "name_of",
    "plain_thread",
]

get_ident = threading.get_ident
allocate_lock = threading.Lock


class Waiter:
    """One wait of one waiter. `granted`, `line` and `value` are under the primitive's lock."""

    __slots__ = ("granted", "line", "owner", "reason", "since", "value", "wants")

    def __init__(self, owner: Any, reason: str, wants: Any = None) -> None:
        self.owner = owner                      # who waits: see caller()
        self.reason = reason                    # for people
        self.since = time.monotonic()           # for people: seconds
        self.wants = wants                      # what the primitive needs to know: units, an item, read or write
        self.granted = False                    # it has what it waits for
        self.value: Any = None                  # what came with the grant
        self.line: Line | None = None           # where it stands, or stood

    def wake(self) -> bool:
        """Tell it that it was granted. Any thread, no lock held. False: its loop has ended, nobody will come."""
        raise NotImplementedError

    def __repr__(self) -> str:
        state = "granted" if self.granted else f"{time.monotonic() - self.since:.3f} s"
        return f"<{name_of(self.owner)} waits for {self.reason}, {state}>"


Line = OrderedDict[Waiter, None]        # first in, first out, and who leaves early does so in constant time
NOBODY: Line = OrderedDict()            # shared by all that nobody waits for: an idle primitive is small


class Turn:
    """What a Coroutine awaits until it is its turn: as much of a future as who drives it asks for.

    A wake from another thread enters the coroutine directly, where a future would have it wait for the loop's next
    iteration. A wake at home does not: the caller's code would be interrupted by the waiter's. Home thread only.
    """

    __slots__ = ("_asyncio_future_blocking", "_awaited", "_cancelled_by", "_co", "_done")

    def __init__(self, co: Coroutine[Any]) -> None:
        self._asyncio_future_blocking = False
        self._co = co
        self._awaited = False                   # the coroutine has suspended on it
        self._done = False
        self._cancelled_by: tuple[Any, ...] | None = None       # the arguments for CancelledError

    def __await__(self) -> Generator[Any, Any, None]:
        if not self._done:
            self._asyncio_future_blocking = True
            yield self
        if self._cancelled_by is not None:
            raise asyncio.CancelledError(*self._cancelled_by)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._co.context.loop

    def add_done_callback(self, _step: Any, *, context: Any = None) -> None:
        self._awaited = True
        if self._done:
            self._co.context.queue(self._co)

    def done(self) -> bool:
        return self._done

    def set_result(self, _result: None) -> None:
        """Its turn: in the next iteration."""
        self._done = True
        if self._awaited:
            self._co.context.queue(self._co)

    def enter(self) -> None:
        """Its turn: now, if nothing of the context is on the stack."""
        context = self._co.context
        if not self._awaited or context.runs_something():
            self.set_result(None)
            return
        self._done = True
        context.run_chain(self._co)

    def cancel(self, msg: Any = None) -> bool:
        """End the wait by CancelledError. False if it is the coroutine's turn: it is thrown then in its place."""
        if self._done:
            return False
        self._cancelled_by = () if msg is None else (msg,)
        self.set_result(None)
        return True


class LoopWaiter(Waiter):
    """A coroutine or task of any asyncio loop. Also an entry of a homeloop context's inbox."""

    __slots__ = ("_home", "_loop", "future")

    _cancelled = False                          # as an entry: never struck out
    _source_traceback = None

    def __init__(self, owner: Any, reason: str, wants: Any = None) -> None:
        super().__init__(owner, reason, wants)
        loop = running_loop()
        assert loop is not None, "made in a coroutine only"
        self._loop = loop
        self._home = loop if isinstance(loop, HomeLoop) else None
        # Settled, cancelled and awaited in the loop's thread.
        self.future: Any = Turn(owner) if isinstance(owner, Coroutine) and self._home else loop.create_future()

    def wake(self) -> bool:
        home = self._home
        if running_loop() is self._loop and (home is None or home.gate is None or home.gate.held()):
            # With a big lock the thread alone says too little: the home may be in released().
            if not self.future.done():
                self.future.set_result(None)
            return True
        try:
            if home is not None:
                home.inbox.put(self)
            else:
                self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:                    # closed
            return False
        return True

    def _run(self) -> None:
        """At home, from another thread's wake."""
        future = self.future
        if future.done():
            return                              # cancelled, and its task will pass the grant on
        if type(future) is Turn:
            future.enter()
        else:
            future.set_result(None)


class ThreadWaiter(Waiter):
    """A thread without a loop: sleeps on a lock of its own."""

    __slots__ = ("_gate", "link")

    def __init__(self, owner: Any, reason: str, wants: Any = None) -> None:
        super().__init__(owner, reason, wants)
        self._gate = allocate_lock()            # taken; the grant opens it
        self._gate.acquire()
        self.link: OwnerWait | None = None      # the thread's: if others may look who waits for whom

    def wake(self) -> bool:
        self._gate.release()
        return True

    def sleep(self, timeout: float | None) -> bool:
        """Sleep until woken, at most `timeout` seconds; False if they are over first."""
        if self.link is None:
            return self._gate.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
        sleep = Sleep(self.link)
        try:
            sleep.begin()
            return self._gate.acquire()
        finally:
            sleep.end()


class HolderWaiter(ThreadWaiter):
    """A thread that holds a big lock: the main loop is served meanwhile (rule 11)."""

    __slots__ = ("_context", "_open")

    def __init__(self, owner: Any, reason: str, wants: Any, context: AioContext) -> None:
        super().__init__(owner, reason, wants)
        self._context = context
        self._open = False

    def wake(self) -> bool:
        self._open = True
        kick()
        return True

    def sleep(self, timeout: float | None) -> bool:
        return wait_while(self._context, lambda: not self._open, timeout, self.link)


# Who calls


def caller() -> Any:
    """Who calls, as an owner: the coroutine or task that runs, else the thread (its ident); never both."""
    loop = running_loop()
    return get_ident() if loop is None else current_task(loop) or get_ident()


def in_coroutine() -> bool:
    """Is the caller in a coroutine or task, so that what it gets may be awaited?"""
    loop = running_loop()
    return loop is not None and current_task(loop) is not None


def name_of(owner: Any) -> str:
    """An owner, for people."""
    if owner is None:
        return "nobody"
    if isinstance(owner, int):
        known = [t.name for t in threading.enumerate() if t.ident == owner]
        return f"thread {known[0] if known else owner!r}"
    get_name = getattr(owner, "get_name", None)
    return f"coroutine {get_name() if get_name is not None else owner!r}"


def plain_thread(asked: Waitable, what: str) -> AioContext | None:
    """May the caller block? None: yes, it serves no loop. A context: it holds the big lock of that, outside any
    coroutine, and serves it while it waits (rule 11). Raises WouldBlockLoop in every other thread with a loop."""
    loop = running_loop()
    if loop is None:
        return None
    held = thread.held
    if thread.context is None and held is not None and held.held() and not held.context.runs_something():
        return held.context
    if isinstance(loop, HomeLoop):
        serves = f"context {loop.context.name!r}"
    else:
        serves = f"a {type(loop).__module__} loop"
    raise WouldBlockLoop(
        f"{what} of {asked!r} by {name_of(caller())} would block thread {threading.current_thread().name!r}, which "
        f"serves {serves}; use `await` or `async with` in a coroutine, a *_nowait form in a callback"
    )


class Waitable:
    """A primitive: one plain lock, one line or more, and what is decided under the lock.

    For subclasses. *_locked methods expect `_lock`; they return whom the caller must wake behind it.
    """

    __slots__ = ("__weakref__", "_line", "_lock", "name")

    def __init__(self, name: str = "") -> None:
        self.name = name                        # for people
        self._lock = allocate_lock()            # a leaf
        self._line: Line = NOBODY               # under _lock; may be looked at without, where a comment says why

    # -- what a primitive decides -------------------------------------------------------------------------

    def _grant_locked(self) -> Sequence[Waiter]:
        """Grant what the state allows, from the head of the line."""
        raise NotImplementedError

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        """A granted waiter will not take it: take it back, and grant what that allows."""
        raise NotImplementedError

    # -- for people ---------------------------------------------------------------------------------------

    def waiters(self) -> tuple[str, ...]:
        """Who waits, for what and how long, first come first. Any thread."""
        with self._lock:
            waiters = self._everybody_locked()
        return tuple(repr(waiter) for waiter in waiters)

    def _everybody_locked(self) -> list[Waiter]:
        return list(self._line)

    def _count(self) -> int:
        return len(self._line)

    def _describe(self, state: str) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"<{type(self).__name__}{name} {state} waiting={self._count()}>"     # waits for no lock

    # -- standing in line ---------------------------------------------------------------------------------

    def _join_locked(self, waiter: Waiter) -> None:
        if self._line is NOBODY:
            self._line = OrderedDict()
        self._line[waiter] = None
        waiter.line = self._line

    def _pop_locked(self) -> Waiter:
        waiter, _ = self._line.popitem(last=False)
        waiter.granted = True
        return waiter

    def _wake(self, waiters: Sequence[Waiter]) -> None:
        """Wake them in order. Whom nobody can wake has his grant passed on."""
        if not waiters:
            return
        pending = list(waiters)
        for waiter in pending:
            if not waiter.wake():
                with self._lock:
                    pending.extend(self._undo_locked(waiter))

    def _leave(self, waiter: Waiter) -> bool:
        """The waiter gives up. False: it had been granted, which has been undone."""
        with self._lock:
            granted = waiter.granted
            if granted:
                woken = self._undo_locked(waiter)
            else:
                if waiter.line is not None:
                    waiter.line.pop(waiter, None)
                woken = self._grant_locked()
        self._wake(woken)
        return not granted

    def _line_up(self, waiter: Waiter) -> bool:
        """Stand in line; True if it was the waiter's turn at once."""
        with self._lock:
            self._join_locked(waiter)
            woken = [other for other in self._grant_locked() if other is not waiter]
            granted = waiter.granted
        self._wake(woken)
        return granted

    async def _sleep(self, waiter: LoopWaiter) -> None:
        """Wait, in a coroutine, until granted."""
        try:
            await waiter.future
        except BaseException:
            self._leave(waiter)
            raise

    def _block(self, waiter: ThreadWaiter, timeout: float | None) -> bool:
        """Wait, in a thread, until granted; False if `timeout` seconds are over first."""
        try:
            if waiter.sleep(timeout):
                return True
        except BaseException:                   # Ctrl-C
            self._leave(waiter)
            raise
        with self._lock:
            if waiter.granted:                  # in the last moment: it is ours
                return True
            if waiter.line is not None:
                waiter.line.pop(waiter, None)
            woken = self._grant_locked()
        self._wake(woken)
        return False

    def _thread_waiter(self, what: str, wants: Any = None) -> ThreadWaiter:
        """A waiter for the calling thread. Raises WouldBlockLoop where that may not block."""
        context = plain_thread(self, what)
        if context is None:
            return ThreadWaiter(get_ident(), what, wants)
        return HolderWaiter(get_ident(), what, wants, context)

    def _either(
        self, timeout: float | None, asynchronously: Callable[..., Awaitable[Any]], blocking: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """The two faces of a method: something to await in a coroutine, else done when it returns.

        `timeout` is for threads; a coroutine has asyncio.timeout(), so that with a timeout it is a mistake.
        """
        if timeout is None and in_coroutine():
            return asynchronously(*args)
        return blocking(*args, timeout)


# What has an owner: cycles of such waits can be known


_refusing_lock = threading.Lock()       # a leaf
_refusing = 0                           # under _refusing_lock: blocks of deadlocks_refused(); looked at without


@contextlib.contextmanager
def deadlocks_refused() -> Iterator[None]:
    """In the block, a wait for a Mutex or RwLock that closes a cycle raises WouldDeadlock, in every thread.

    Outside it does so in coroutines of a loop in debug mode only; elsewhere homeloop.testing.snapshot() tells of the
    cycle. Waits of the runtime itself (call, result, await, workers, the big lock) always raise.
    """
    global _refusing
    with _refusing_lock:
        _refusing += 1
    try:
        yield
    finally:
        with _refusing_lock:
            _refusing -= 1


class OwnerWait:
    """A place in the line for what somebody owns, as a link of the wait graph."""

    __slots__ = ("__weakref__", "asked", "refuses", "waiter")

    passes_cancel = None                        # a waiter that is cancelled leaves the line

    def __init__(self, asked: Owned, waiter: Waiter, debug: bool) -> None:
        self.asked = asked
        self.waiter = waiter
        self.refuses = debug or _refusing > 0

    def pending(self) -> bool:
        return not self.waiter.granted

    def needs(self) -> Sequence[Hop | AnyOf]:
        needs: list[Hop | AnyOf] = []
        for owner in self.asked._owners_that_keep_out(self.waiter):
            needs += needs_of_owner(owner, ", held by {}")
        for other in self.asked._before(self.waiter):
            needs += needs_of_owner(other.owner, ", where {} stands before it")
        return needs

    def sought(self) -> str:
        return f"{self.waiter.reason} of {self.asked!r}"


class Owned(Waitable):
    """A primitive that has owners. It says who waits for whom; the asked methods take no lock and may see it move."""

    __slots__ = ()

    def _owners_that_keep_out(self, waiter: Waiter) -> list[Any]:
        """Whose release the waiter needs."""
        raise NotImplementedError

    def _before(self, waiter: Waiter) -> list[Waiter]:
        """Who in the line must go first, and may hold it up."""
        return []

    async def _sleep(self, waiter: LoopWaiter) -> None:
        link = OwnerWait(self, waiter, waiter._loop.get_debug())
        count_owner_wait(1)
        try:
            try:
                me = begin_await(link)
            except BaseException:
                self._leave(waiter)
                raise
            try:
                await super()._sleep(waiter)
            finally:
                end_await(me)
        finally:
            count_owner_wait(-1)

    def _block(self, waiter: ThreadWaiter, timeout: float | None) -> bool:
        if timeout is not None:                 # it ends by itself
            return super()._block(waiter, timeout)
        waiter.link = OwnerWait(self, waiter, False)
        count_owner_wait(1)
        try:
            return super()._block(waiter, timeout)
        finally:
            waiter.link = None
            count_owner_wait(-1)
