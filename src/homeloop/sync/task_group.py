"""TaskGroup: tasks that begin and end with a block, each at home in a context of its own choice.

All that the group decides it decides at home of its parent, the task that entered the block: the end of a child comes
there as a message, whichever thread it ended in. Only who is in the group is shared, so that a child of any thread can
bring in another: that, and the two flags that refuse it, are under a lock.

The rules for errors and cancellation are those of asyncio.TaskGroup (as of Python 3.13, on every Python).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Coroutine as CoroutineABC
from types import TracebackType
from typing import Any, TypeVar

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.loop import HomeLoop, current_task, running_loop
from homeloop.errors import ContextClosed, WrongState

__all__ = ["TaskGroup"]

T = TypeVar("T")
_Child = Coroutine[Any] | asyncio.Task[Any]


class TaskGroup:
    """asyncio.TaskGroup whose children live on chosen contexts; `async with` it in a task of any asyncio loop.

    Leaving the block waits for all children. The first that fails has the others cancelled, in whichever thread they
    are, and the block too; when all have ended their errors are raised as an ExceptionGroup. KeyboardInterrupt and
    SystemExit of a child are raised as they are. A cancelled parent cancels the children and waits for them. A child
    that is cancelled by others, or because its context ends, leaves quietly. spawn(): any thread; the block: its task.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()                   # a leaf
        self._children: set[_Child] = set()             # under _lock: those whose end the parent has not heard of
        self._exiting = False                           # under _lock: with no child left it is finished
        self._aborting = False                          # under _lock
        self._loop: asyncio.AbstractEventLoop | None = None     # the parent's, set once
        self._parent: Any = None                        # set once
        # For the parent's home only:
        self._errors: list[BaseException] = []
        self._base_error: BaseException | None = None   # SystemExit, KeyboardInterrupt
        self._parent_cancel_requested = False
        self._completed: asyncio.Future[None] | None = None     # what the parent awaits while there are children

    def __repr__(self) -> str:
        words = [f"tasks={len(self._children)}"] if self._children else []
        words += [f"errors={len(self._errors)}"] if self._errors else []
        words += ["cancelling"] if self._aborting else ["entered"] if self._parent is not None else []
        return f"<{' '.join(['TaskGroup', *words])}>"

    # -- children: any thread, never waits ---------------------------------------------------------------

    def spawn(
        self, coro: CoroutineABC[Any, Any, T], *, context: AioContext | None = None, name: str | None = None
    ) -> Coroutine[T]:
        """Start coro as a child at home in `context`; return its Coroutine at once. Any thread.

        context: None, the one of the caller (the context of its loop, of whatever make). contextvars go along.
        WrongState if the group was not entered, is being cancelled or has finished; ContextClosed; NoRuntime in a
        thread without a loop that names no context. coro is closed then, and the group goes on.
        """
        try:
            self._check_open()
            home = AioContext.of() if context is None else context
        except BaseException:
            coro.close()
            raise
        child = home.create(coro, name=name)
        try:
            self._add(child)
        except BaseException:
            child.abandon_unborn()
            raise
        child.when_done(self._tell)
        if not child.schedule() and home.closed:        # since create(); open: the group has cancelled it already
            raise ContextClosed(f"{home.name} has ended")
        return child

    def create_task(
        self,
        coro: CoroutineABC[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **options: Any,
    ) -> asyncio.Task[T]:
        """As asyncio.TaskGroup's: a child that is an asyncio.Task, in the loop that runs in the calling thread.

        `context` is asyncio's here, the contextvars. For a child in another context there is spawn().
        """
        loop = running_loop()
        try:
            self._check_open()
            if loop is None:
                raise WrongState("create_task() in a thread without a loop: spawn(coro, context=...) is for any thread")
        except BaseException:
            coro.close()
            raise
        if context is not None:
            options["context"] = context
        child: asyncio.Task[T] = loop.create_task(coro, name=name, **options)
        try:
            self._add(child)
        except BaseException:                           # of another thread: it has finished meanwhile
            child.cancel()
            raise
        child.add_done_callback(self._settle if loop is self._loop else self._tell)
        try:
            return child
        finally:
            del child                                   # no cycle through the frame of an exception

    def _check_open(self) -> None:
        with self._lock:
            self._check_open_locked()
            if self._aborting:
                raise WrongState(f"{self!r} is shutting down")

    def _check_open_locked(self) -> None:
        if self._parent is None:
            raise WrongState(f"{self!r} has not been entered")
        if self._exiting and not self._children:
            raise WrongState(f"{self!r} is finished")

    def _add(self, child: _Child) -> None:
        with self._lock:
            self._check_open_locked()
            self._children.add(child)
            aborting = self._aborting
        if aborting:                                    # since _check_open(): whoever set it did not see the child
            self._cancel(child)

    def _tell(self, child: _Child) -> None:
        """A child has ended: let the parent's home know. The child's thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):         # closed: nobody waits there any more
            self._loop.call_soon_threadsafe(self._settle, child)

    # -- the block: the parent's home --------------------------------------------------------------------

    async def __aenter__(self) -> TaskGroup:
        if self._parent is not None:
            raise WrongState(f"{self!r} has already been entered")
        self._loop = asyncio.get_running_loop()
        parent = current_task(self._loop)
        if parent is None:
            raise WrongState(f"{self!r} cannot determine the parent task")
        self._parent = parent
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._exiting = True
        if _is_base_error(value) and self._base_error is None:
            self._base_error = value
        cancelled: BaseException | None = value if isinstance(value, asyncio.CancelledError) else None
        if value is not None:
            self._abort()
        if isinstance(value, GeneratorExit):            # closed from outside: it may not wait
            return
        try:
            cancelled = await self._wait(cancelled)
            # Whatever comes next: the parent must not leave with more cancellations than others have asked for.
            if self._parent_cancel_requested and self._parent.uncancel() == 0:
                cancelled = None
            if self._base_error is not None:
                raise self._base_error
            if cancelled is not None and not self._errors:
                raise cancelled
            if value is not None and not isinstance(value, asyncio.CancelledError):
                self._errors.append(value)
            if self._errors:
                self._raise_errors()
        finally:
            self._errors = []                           # exceptions are heavy, and hold frames
            self._base_error = None
            del value, cancelled

    async def _wait(self, cancelled: BaseException | None) -> BaseException | None:
        """Wait for all children; return the cancellation of the parent by others, if there was one."""
        assert self._loop is not None
        while self._children:
            if self._completed is None:
                self._completed = self._loop.create_future()
            try:
                await self._completed
            except asyncio.CancelledError as error:
                if not self._aborting:
                    cancelled = error
                    self._abort()
            except GeneratorExit:
                self._abort()
                raise
            self._completed = None
        try:
            return cancelled
        finally:
            del cancelled

    def _raise_errors(self) -> None:
        if self._parent.cancelling():
            # By others too. The error goes first, and the cancellation is thrown again at the next wait.
            self._parent.uncancel()
            self._parent.cancel()
        raise BaseExceptionGroup("unhandled errors in a TaskGroup", self._errors) from None

    def _abort(self) -> None:
        with self._lock:
            if self._aborting:
                return
            self._aborting = True
            children = list(self._children)
        for child in children:
            self._cancel(child)

    def _cancel(self, child: _Child) -> None:           # any thread
        if child.done():
            return
        loop = child.get_loop()
        if isinstance(child, Coroutine) or loop is running_loop():
            child.cancel()
        else:
            with contextlib.suppress(RuntimeError):     # closed
                loop.call_soon_threadsafe(child.cancel)
        if loop.is_closed() and not isinstance(loop, HomeLoop):     # which ends all that is in it
            if isinstance(child, Coroutine):
                child.close_unborn()
            self._tell(child)                           # its loop was closed under it: it will never end

    def _settle(self, child: _Child) -> None:
        """A child has ended."""
        with self._lock:
            if child not in self._children:
                return
            self._children.discard(child)
            left = bool(self._children)
        if not left and self._completed is not None and not self._completed.done():
            self._completed.set_result(None)
        error = _error_of(child)
        if error is None:
            return
        assert self._loop is not None
        if self._parent.done():                         # it was closed, and did not wait
            self._loop.call_exception_handler(
                {"message": f"{child!r} failed, and its group's parent {self._parent!r} has ended", "exception": error}
            )
            return
        self._errors.append(error)
        if self._base_error is None and _is_base_error(error):
            self._base_error = error
        if not self._aborting and not self._parent_cancel_requested:
            self._abort()
            # The parent may be anywhere in the block. __aexit__ takes this back.
            self._parent_cancel_requested = True
            self._parent.cancel()


def _error_of(child: _Child) -> BaseException | None:
    if not child.done():
        return ContextClosed(f"{child!r} cannot go on: its loop was closed")
    return None if child.cancelled() else child.exception()


def _is_base_error(error: BaseException | None) -> bool:
    return isinstance(error, SystemExit | KeyboardInterrupt)
