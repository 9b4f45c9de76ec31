"""RwLock: many readers or one writer, in the order of their tickets (QEMU's CoRwlock)."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from homeloop.errors import WouldBlock, WouldDeadlock, WrongState
from homeloop.sync.waiting import LoopWaiter, Owned, Waiter, caller, name_of, plain_thread

__all__ = ["RwLock", "RwLockSide"]

_READ, _WRITE = "read", "write"


class RwLock(Owned):
    """A lock with two sides: `async with lock.read`, `async with lock.write`; in threads `with`.

    Tickets are served strictly in order: a writer who waits keeps new readers out, readers in a row go together.
    Owners are coroutines or threads, none of them twice (WouldDeadlock). A waiter who is cancelled or timed out
    leaves the line, and those behind it go if they may. What never waits is for any thread, but no signal handler.
    """

    __slots__ = ("_readers", "_writer")

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._readers: set[Any] = set()         # under _lock: owners
        self._writer: Any = None                # under _lock: the owner

    @property
    def read(self) -> RwLockSide:
        """The side of the readers."""
        return RwLockSide(self, _READ)

    @property
    def write(self) -> RwLockSide:
        """The side of the writers."""
        return RwLockSide(self, _WRITE)

    @property
    def readers(self) -> int:
        """How many readers have it. Any thread."""
        return len(self._readers)

    @property
    def writer(self) -> Any:
        """The coroutine, task or thread ident that has it for writing, or None. Any thread."""
        return self._writer

    def release(self) -> None:
        """Give up what the caller has, be it for reading or for writing; WrongState if it has neither."""
        me = caller()
        with self._lock:
            if me in self._readers:
                self._readers.discard(me)
            elif self._writer is not None and self._writer == me:
                self._writer = None
            else:
                raise WrongState(f"release of {self!r} by {name_of(me)}, which does not own it")
            woken = self._grant_locked() if self._line else ()
        self._wake(woken)

    def downgrade(self) -> None:
        """Make the caller's write lock a read lock; nobody writes in between. Never waits.

        Readers at the head of the line join. WrongState if the caller has it not for writing.
        """
        me = caller()
        with self._lock:
            if self._writer is None or self._writer != me:
                raise WrongState(f"downgrade of {self!r} by {name_of(me)}, which does not own it for writing")
            self._writer = None
            self._readers.add(me)
            woken = self._grant_locked()
        self._wake(woken)

    def upgrade(self) -> Any:
        """Make the caller's read lock a write lock. In a coroutine to be awaited.

        True: at once, what was read still holds. False: the read lock was given up and the caller stood in line for
        writing, so others may have written: read again. Two who upgrade do not deadlock therefore. Cancelled while
        it waits it is a reader again, which may take a while, before CancelledError is raised.
        """
        return self._either(None, self._upgrade, self._upgrade_blocking)

    def __repr__(self) -> str:
        if self._writer is not None:
            return self._describe(f"written by {name_of(self._writer)}")
        return self._describe(f"readers={len(self._readers)}")

    # -- inside -----------------------------------------------------------------------------------------

    def _owners_that_keep_out(self, waiter: Waiter) -> list[Any]:
        writer = self._writer
        if writer is not None:
            return [writer]
        return _settled(self._readers) if waiter.wants is _WRITE else []

    def _before(self, waiter: Waiter) -> list[Waiter]:
        line = _settled(self._line)
        return line[:line.index(waiter)] if waiter in line else []

    def _check_not_mine(self, me: Any) -> None:
        if me in self._readers or (self._writer is not None and self._writer == me):
            raise WouldDeadlock(f"{self!r} is not recursive: {name_of(me)} has it and would wait for itself")

    async def _acquire(self, side: str) -> bool:
        me = caller()
        self._check_not_mine(me)
        waiter = LoopWaiter(me, side, side)
        if not self._line_up(waiter):
            await self._sleep(waiter)
        return True

    def _acquire_blocking(self, side: str, timeout: float | None) -> bool:
        waiter = self._thread_waiter(side, side)
        self._check_not_mine(waiter.owner)
        return self._line_up(waiter) or self._block(waiter, timeout)

    def _acquire_nowait(self, side: str) -> None:
        me = caller()
        self._check_not_mine(me)
        with self._lock:
            if self._line or not self._admit_locked(me, side):
                raise WouldBlock(f"{self!r} cannot be had for {side} now")

    async def _upgrade(self) -> bool:
        me = caller()
        if self._try_upgrade(me):
            return True
        try:
            await self._acquire(_WRITE)
        except BaseException as error:
            await self._be_reader_again(me, error)
            raise
        return False

    async def _be_reader_again(self, me: Any, error: BaseException) -> None:
        """The caller is inside `async with lock.read`: cancelled as often as you like, it gets that back."""
        if isinstance(error, GeneratorExit):    # may not wait; nobody goes on behind it
            return
        while me not in self._readers:
            try:
                await self._acquire(_READ)
            except BaseException as again:
                if isinstance(again, GeneratorExit | WouldDeadlock):
                    raise

    def _upgrade_blocking(self, _timeout: None) -> bool:
        plain_thread(self, "upgrade")
        me = caller()
        if self._try_upgrade(me):
            return True
        try:
            self._acquire_blocking(_WRITE, None)
        except BaseException:                   # Ctrl-C
            self._acquire_blocking(_READ, None)
            raise
        return False

    def _try_upgrade(self, me: Any) -> bool:
        with self._lock:
            if me not in self._readers:
                raise WrongState(f"upgrade of {self!r} by {name_of(me)}, which does not own it for reading")
            self._readers.discard(me)
            at_once = not self._readers and not self._line
            if at_once:
                self._writer = me
            woken = self._grant_locked()
        self._wake(woken)
        return at_once

    def _admit_locked(self, owner: Any, side: str) -> bool:
        if self._writer is not None or (side is _WRITE and self._readers):
            return False
        if side is _WRITE:
            self._writer = owner
        else:
            self._readers.add(owner)
        return True

    def _grant_locked(self) -> Sequence[Waiter]:
        woken = []
        while self._line:
            head = next(iter(self._line))
            if not self._admit_locked(head.owner, head.wants):
                break
            woken.append(self._pop_locked())
        return woken

    def _undo_locked(self, waiter: Waiter) -> Sequence[Waiter]:
        if waiter.wants is _WRITE:
            self._writer = None
        else:
            self._readers.discard(waiter.owner)
        return self._grant_locked()


def _settled(changing: Any) -> list[Any]:
    """The members of a set or line that others may change meanwhile; none if they did."""
    try:
        return list(changing)
    except RuntimeError:                        # changed size during iteration
        return []


class RwLockSide:
    """One side of an RwLock: a lock like Mutex, for readers or for the writer. Any thread, as the RwLock."""

    __slots__ = ("_lock", "_side")

    def __init__(self, lock: RwLock, side: str) -> None:
        self._lock = lock
        self._side = side

    def acquire(self, timeout: float | None = None) -> Any:
        """Take this side. In a coroutine to be awaited, True. In a thread: True, or False after `timeout` seconds."""
        return self._lock._either(timeout, self._acquire, self._acquire_blocking)

    def acquire_nowait(self) -> None:
        """Take it if that needs no waiting; else WouldBlock. Any thread."""
        self._lock._acquire_nowait(self._side)

    def release(self) -> None:
        """RwLock.release: what the caller has, of either side."""
        self._lock.release()

    def held(self) -> bool:
        """Has the caller got this side?"""
        me = caller()
        if self._side is _READ:
            return me in self._lock._readers
        return self._lock._writer is not None and self._lock._writer == me

    async def __aenter__(self) -> RwLock:
        await self._lock._acquire(self._side)
        return self._lock

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()                    # the other side, after upgrade() or downgrade()

    def __enter__(self) -> RwLock:
        self._lock._acquire_blocking(self._side, None)
        return self._lock

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def __repr__(self) -> str:
        return f"<{self._side} side of {self._lock!r}>"

    async def _acquire(self) -> bool:
        return await self._lock._acquire(self._side)

    def _acquire_blocking(self, timeout: float | None) -> bool:
        return self._lock._acquire_blocking(self._side, timeout)
