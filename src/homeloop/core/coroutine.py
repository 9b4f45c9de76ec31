"""Coroutine: a coroutine object with a home. Any thread may wake it; it only ever runs at home.

States and moves (the table is in states.py); `lock` is the inbox lock of the home context:

    CREATED    -> SCHEDULED                 started, or ended before it began       under lock
    SCHEDULED  -> RUNNING, DONE             in the inbox, the ready queue or the chain
    RUNNING    -> PARKED, WAITING, SCHEDULED (bare yield), DONE
    PARKED     -> SCHEDULED (woken or cancelled)                    under lock
    WAITING    -> RUNNING                   the future that it awaits is done
    DONE                                                            under lock

Only the home moves it out of every state but CREATED and PARKED, so a thread elsewhere needs to know no
more than: is it parked, has it ended, is a wake remembered. These three change under the lock.

A wake is a permit (rule 4): it is remembered until a park takes it, one at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Generator
from collections.abc import Coroutine as CoroutineABC
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from homeloop.core.aftermath import LoopCallback, Unretrieved
from homeloop.core.current import current_context
from homeloop.core.joining import wait_for_end
from homeloop.core.loop import (
    DIRECT,
    HomeLoop,
    current_task,
    enter_task,
    leave_if_current,
    leave_task,
    register_task,
    unregister_task,
)
from homeloop.core.misuse import UNBORN, bad_yield, begun_error, is_begun, sites
from homeloop.core.stacks import await_frames, stack_text, traceback_frames
from homeloop.core.states import CoroutineState
from homeloop.errors import WrongState

if TYPE_CHECKING:
    from homeloop.core.context import AioContext

__all__ = ["Coroutine", "CoroutineState", "current_coroutine", "park"]

T = TypeVar("T")


_CREATED = CoroutineState.CREATED
_SCHEDULED = CoroutineState.SCHEDULED
_RUNNING = CoroutineState.RUNNING
_PARKED = CoroutineState.PARKED
_WAITING = CoroutineState.WAITING
_DONE = CoroutineState.DONE

_NEVER_LOST = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)      # nobody needs to be told of these

_numbers = itertools.count(1)           # next() of it is the one place that leans on a C function's atomicity


class _Park:
    """What park() yields to who drives the coroutine."""

    __slots__ = ()


_PARK = _Park()


class Coroutine(Generic[T]):
    """A coroutine object at home in a context: started by spawn(), enter() or schedule(), awaited from anywhere.

    It stands in for an asyncio.Task where asyncio asks for one (`current_task`, `timeout`, `TaskGroup`), and for a
    future in its own context only: `await` works from any, `result()` from any thread that may wait (rule 11).
    Other methods: any thread, never wait. context: its home, which never changes.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_cancels",
        "_coro",
        "_error",
        "_exception",
        "_fut_waiter",
        "_live",
        "_must_cancel",
        "_name",
        "_permit",
        "_reason",
        "_result",
        "_state",
        "_traceback",
        "_unretrieved",
        "_vars",
        "context",
        "link",
    )

    _result: T                          # set with _state DONE
    _exception: BaseException | None    # set with _state DONE
    _traceback: types.TracebackType | None      # set with _exception
    _unretrieved: Unretrieved | None   # set with _state DONE
    _reason: str                        # set with _state PARKED: for people
    _error: BaseException               # set with _must_cancel

    @property
    def _asyncio_future_blocking(self) -> bool | None:
        """asyncio.isfuture() asks: yes in its own context, or while nobody serves that (asyncio.Runner.close());
        no elsewhere, so that gather() and the like wrap it in a task of their own loop."""
        context = self.context
        return False if context.is_current() or not context.is_served() else None

    @property
    def _cancel_message(self) -> Any:
        """What gather() puts into the CancelledError that it makes for us."""
        error = self._exception if self.cancelled() else None
        return error.args[0] if error is not None and error.args else None

    def _make_cancelled_error(self) -> BaseException:
        """What gather() raises for it."""
        return self._exception if self.cancelled() and self._exception else asyncio.CancelledError()

    _cancelled = False                  # as an entry of the ready queue: never struck out
    _source_traceback = None            # ... and made nowhere that debug mode would show

    def __init__(
        self,
        context: AioContext,
        coro: CoroutineABC[Any, Any, T],
        name: str | None = None,
        variables: contextvars.Context | None = None,
    ) -> None:
        self.context = context                                  # the home; never changes
        self._coro = coro                                       # home: stepped there only
        self._vars = contextvars.copy_context() if variables is None else variables
        self._name = name                                       # None until somebody asks
        self._state = _CREATED                                  # see the table above
        self._permit = False                                    # under lock: a wake is remembered
        self._callbacks: list[Callable[[Coroutine[T]], object]] | None = None    # under lock
        self._fut_waiter: Any = UNBORN                          # home: the future that it awaits
        self._must_cancel = False                               # home: throw _error at the next step
        self._cancels = 0                                       # home: cancel() less uncancel()
        self.link: Any = None                                   # home: what it awaits, for the wait graph
        self._live = False                                      # home: known to the context and asyncio.all_tasks()

    # -- asking: any thread, never waits ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name given, or coroutine-N."""
        if self._name is None:
            self._name = f"coroutine-{next(_numbers)}"
        return self._name

    @property
    def state(self) -> CoroutineState:
        """Where it is now; another thread may move it right behind the answer."""
        return self._state

    def is_suspended(self) -> bool:
        """Is it parked, or does it await something?"""
        return self._state is _PARKED or self._state is _WAITING

    def done(self) -> bool:
        """Has it ended: returned, raised or been cancelled?"""
        return self._state is _DONE

    def cancelled(self) -> bool:
        """Has it ended by its cancellation?"""
        return self._state is _DONE and isinstance(self._exception, asyncio.CancelledError)

    def exception(self) -> BaseException | None:
        """Return what it raised, None if it returned.

        Raises CancelledError if it was cancelled, InvalidStateError if it has not ended.
        """
        if self._state is not _DONE:
            raise asyncio.InvalidStateError(f"{self!r} has not ended")
        if isinstance(self._exception, asyncio.CancelledError):
            raise self._exception
        self._retrieved()
        return self._exception

    def result(self, timeout: float | None = None) -> T:
        """Wait for the end; return what it returned, or raise what it raised.

        A thread without a context may wait for any coroutine; the main context's home (or who holds the big
        lock) may too and serves the main loop meanwhile; an IOThread may wait only for its own. Else
        WouldDeadlock, at once (rule 11). TimeoutError after `timeout` seconds; the coroutine goes on.
        """
        if self._state is not _DONE and not self.context.wait_done(self, timeout):
            raise TimeoutError(f"{self!r} has not ended after {timeout} s")
        return self.outcome()

    def has_waiters(self) -> bool:
        """Does anybody wait for its end? Any thread, a look without the lock."""
        return bool(self._callbacks)

    def outcome(self) -> T:
        """result() of a coroutine that has ended."""
        if self._exception is not None:
            self._retrieved()
            try:
                raise self._exception.with_traceback(self._traceback)      # or each look would make it longer
            finally:
                self = None  # type: ignore[assignment]     # no cycle through the traceback's frame
        return self._result

    def outcome_error(self) -> BaseException | None:
        """What a coroutine that has ended raised; it does not count as looked at."""
        return self._exception

    def __repr__(self) -> str:
        what = getattr(self._coro, "__qualname__", type(self._coro).__name__)
        state = self._state.value
        if self._state is _PARKED and self._reason:
            state += f" ({self._reason})"
        elif self._state is _DONE and self._exception is not None:
            state += f" ({type(self._exception).__name__})"
        return f"<Coroutine {self.name} {what} {state} at {self.context.name}>"

    # -- waking and cancelling: any thread, never waits ------------------------------------------------

    def wake(self) -> bool:
        """Resume it from its park: now if the calling thread is at its home, else queued to the home.

        At home and inside a running coroutine it runs right after that one parks or ends; outside any, now,
        on this stack (rule 3). Not parked: the wake is remembered for the next park. One that was only
        created is started. False: it has ended, or a wake is remembered already. While you hold a lock
        that the coroutine may take, use schedule(). Source: QEMU's aio_co_wake.
        """
        context = self.context
        if not context.may_enter():
            return self._schedule(False)
        with context.lock:
            move = self._accept_wake_locked()
        if move:
            context.counters.entered += 1
            context.enter_here(self)
        return move is not None

    def schedule(self) -> bool:
        """Like wake(), but always queued to the home, never run now. Source: QEMU's aio_co_schedule."""
        return self._schedule(self.context.may_enter())

    def _schedule(self, here: bool) -> bool:
        context = self.context
        with context.lock:
            closed = context.has_ended_locked()
            if not closed:
                move = self._accept_wake_locked()
                if move:
                    context.counters.scheduled += 1
                    if here:
                        context.queue(self)             # in turn with call_soon()
                    else:
                        context.inbox.put_locked(self)
        if closed:
            self.abandon_unborn()
            return False
        return move is not None

    def set_scheduled(self) -> None:
        """It was just created, nobody else has seen it, and it is about to be stepped."""
        self._state = _SCHEDULED

    def _accept_wake_locked(self) -> bool | None:
        """Take note of a wake. True: the caller must now run or queue it; False: remembered; None: refused."""
        state = self._state
        if state is _CREATED:
            self._state = _SCHEDULED
            return True
        if self._permit or state is _DONE:
            return None
        self._permit = True
        if state is not _PARKED:
            return False
        self._state = _SCHEDULED
        return True

    def cancel(self, msg: Any = None) -> bool:
        """Ask it to end by CancelledError, as asyncio.Task.cancel does. False if it has ended.

        At home at once, from elsewhere as a message to the home. A wake that it has not taken stays
        remembered.
        """
        if self._state is _DONE:
            return False
        if self.context.may_enter():
            return self._cancel_here(msg)
        return self.context.try_post(self._cancel_here, msg) or self.abandon_unborn()

    def _cancel_here(self, msg: Any = None) -> bool:
        with self.context.lock:
            state = self._state
            if state is _DONE:
                return False
            if state is _PARKED or state is _CREATED:       # from here on it is ours to go on with, or to end
                self._state = _SCHEDULED
        self._cancels += 1
        error: BaseException = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        if state is _CREATED:
            self.abandon(error)
            return True
        if self._fut_waiter is not None and self._fut_waiter.cancel(msg):
            return True
        self._must_cancel = True
        self._error = error
        if state is _PARKED:
            self.context.queue(self)
        return True

    # -- what asyncio asks of a task: home thread ------------------------------------------------------

    def cancelling(self) -> int:
        """The number of cancel() calls less uncancel() calls, as asyncio.Task.cancelling."""
        return self._cancels

    def uncancel(self) -> int:
        """Take one cancel() back, as asyncio.Task.uncancel (with 3.13's rule: at 0 nothing is thrown)."""
        if self._cancels > 0:
            self._cancels -= 1
            if self._cancels == 0:
                self._must_cancel = False
        return self._cancels

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of its home."""
        return self.context.loop

    def get_coro(self) -> CoroutineABC[Any, Any, T]:
        """The coroutine object."""
        return self._coro

    def get_context(self) -> contextvars.Context:
        """The contextvars.Context it runs in."""
        return self._vars

    def get_name(self) -> str:
        """As asyncio.Task.get_name."""
        return self.name

    def set_name(self, value: object) -> None:
        """As asyncio.Task.set_name."""
        self._name = str(value)

    def get_stack(self, *, limit: int | None = None) -> list[types.FrameType]:
        """The frames where it is suspended, outermost first, down to the innermost await (asyncio has the first alone);
        those of the traceback, if it raised; [] if it returned. limit: the newest of the one, the oldest of the other.
        """
        if self._state is _DONE and self._exception is not None:
            return traceback_frames(self._traceback, limit)
        return await_frames(self._coro, limit)

    def print_stack(self, *, limit: int | None = None, file: Any = None) -> None:
        """Write get_stack() as text to file (None: sys.stderr), as asyncio.Task.print_stack."""
        text = stack_text(repr(self), self.get_stack(limit=limit), self.outcome_error() if self.done() else None)
        (sys.stderr if file is None else file).write(text)

    def add_done_callback(self, fn: Callable[[Any], object], *, context: contextvars.Context | None = None) -> None:
        """Call fn(self) from the home loop once it has ended, as asyncio does. Any thread."""
        variables = contextvars.copy_context() if context is None else context
        self.when_done(LoopCallback(fn, variables))

    def remove_done_callback(self, fn: Callable[[Any], object]) -> int:
        """Forget fn; return how often it was registered. Any thread."""
        with self.context.lock:
            callbacks = self._callbacks or []
            kept = [callback for callback in callbacks if getattr(callback, "fn", None) != fn]
            if self._callbacks is not None:
                self._callbacks = kept
            return len(callbacks) - len(kept)

    def when_done(self, callback: Callable[[Coroutine[T]], object]) -> None:
        """Call callback(self) as soon as it has ended: now if it has, else on the home thread.

        Any thread. For the runtime: the callback must neither wait nor raise, and posts what is long.
        """
        with self.context.lock:
            if self._state is not _DONE:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(callback)
                return
        callback(self)

    def forget_when_done(self, callback: Callable[[Coroutine[T]], object]) -> None:
        """Take when_done() back, if it has not ended. Any thread."""
        with self.context.lock:
            if self._callbacks is not None and callback in self._callbacks:
                self._callbacks.remove(callback)

    # -- waiting ---------------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, Any, T]:
        """Wait for the end, from a coroutine of any context or asyncio loop.

        Cancelling the waiting coroutine cancels this one and waits for it, as with asyncio tasks. WouldDeadlock if
        this one, by whatever ways, waits for the waiting one.
        """
        if self._state is not _DONE:
            me = current_coroutine()
            if me is self:
                raise RuntimeError(f"{self!r} cannot await itself{sites(self._coro, 'awaited')}")
            yield from wait_for_end(self, me)
        return self.outcome()

    # -- running: home thread --------------------------------------------------------------------------

    def _run(self) -> None:
        """Entry of the ready queue."""
        self.context.run_chain(self)

    def __call__(self, _future: Any = None) -> None:
        """As a callback of a loop that is not ours."""
        self.context.run_chain(self)

    def step(self) -> None:
        """Run until it parks, waits or ends. The caller has checked that it may (SCHEDULED or WAITING)."""
        loop = self.context.loop
        self._state = _RUNNING
        try:
            if self._fut_waiter is UNBORN and getattr(self._coro, "cr_suspended", False):
                raise begun_error(self)
            self._fut_waiter = None
            enter_task(loop, self)  # type: ignore[arg-type]
            if self._must_cancel:
                yielded = self._vars.run(self._coro.throw, self._take_error())
            else:
                yielded = self._vars.run(self._coro.send, None)
        except StopIteration as stop:
            leave_task(loop, self)  # type: ignore[arg-type]
            if self._must_cancel:       # cancelled in its last step, as asyncio has it
                self._finish(None, self._take_error())
            else:
                self._finish(stop.value, None)
        except BaseException as exc:
            leave_if_current(loop, self)    # it is not, if a Ctrl-C came just before or behind the step
            if self._fut_waiter is not UNBORN and not getattr(self._coro, "cr_running", False):     # another's, else
                self._coro.close()
            self._finish(None, exc)
            if isinstance(exc, KeyboardInterrupt | SystemExit):
                raise
        else:
            leave_task(loop, self)  # type: ignore[arg-type]
            self._suspended(yielded)

    def become_known(self) -> None:
        """Let the context and asyncio.all_tasks() know it: it has suspended. They keep it alive."""
        if not self._live:
            self._live = True
            self.context.coroutines.add(self)
            register_task(self)  # type: ignore[arg-type]

    def _suspended(self, yielded: Any) -> None:
        if not self._live and self.context.driven is not self:
            self.become_known()
        if yielded is _PARK:
            if self._must_cancel:
                self._cancel_park()
        elif yielded is None:
            self._state = _SCHEDULED
            self.context.queue(self)
        else:
            self._wait_for(yielded)

    def _cancel_park(self) -> None:
        """It was cancelled while it ran, then parked."""
        with self.context.lock:
            if self._state is not _PARKED:
                return                  # woken right behind the park: it is queued already
            self._state = _SCHEDULED
        self.context.queue(self)

    def _wait_for(self, yielded: Any) -> None:
        problem = bad_yield(self, yielded)
        if problem is not None:
            self._state = _SCHEDULED
            self._must_cancel = True
            self._error = RuntimeError(problem)
            self.context.queue(self)
            return
        self._state = _WAITING
        self._fut_waiter = yielded
        if isinstance(self.context.loop, HomeLoop):
            yielded.add_done_callback(self, context=DIRECT)
        else:
            yielded.add_done_callback(self)
        if self._must_cancel and yielded.cancel(*self._error.args):
            self._must_cancel = False

    def _take_error(self) -> BaseException:
        self._must_cancel = False
        return self._error

    def _finish(self, result: Any, exception: BaseException | None) -> None:
        context = self.context
        self._result = result
        self._exception = exception
        self._unretrieved = None
        if self._live:
            self._live = False
            context.coroutines.discard(self)
            unregister_task(self)  # type: ignore[arg-type]
        with context.lock:
            self._state = _DONE
            callbacks, self._callbacks = self._callbacks, None
        if exception is not None:
            self._traceback = exception.__traceback__
        if exception is not None and not isinstance(exception, _NEVER_LOST):
            with contextlib.suppress(RecursionError):
                self._unretrieved = Unretrieved(self, exception)
        if callbacks:
            for callback in callbacks:
                callback(self)

    def abandon(self, error: BaseException) -> None:
        """End it without a step: it never ran, or never will (home thread)."""
        try:
            if self._fut_waiter is not UNBORN or not is_begun(self._coro):     # else it is another's
                self._coro.close()
        finally:
            self._finish(None, error)

    def close_unborn(self) -> None:
        """In a forked child: if it has never run, close it, so that no "never awaited" follows."""
        if inspect.iscoroutine(self._coro) and inspect.getcoroutinestate(self._coro) == inspect.CORO_CREATED:
            self._coro.close()

    def abandon_unborn(self) -> bool:
        """Its context has ended: if it never began, it never will. Any thread."""
        with self.context.lock:
            if self._state is not _CREATED:
                return False
            self._state = _SCHEDULED        # ours to end
        self.abandon(asyncio.CancelledError(f"{self.context.name} has ended"))
        return True

    def _retrieved(self) -> None:
        unretrieved, self._unretrieved = self._unretrieved, None
        if unretrieved is not None:
            unretrieved.context = None


def current_coroutine() -> Coroutine[Any] | None:
    """Return the Coroutine that the calling code runs in; None outside any, and in plain asyncio tasks."""
    context = current_context()
    return None if context is None else _running_in(context)


def _running_in(context: AioContext) -> Coroutine[Any] | None:
    """The Coroutine whose step this is; None in an asyncio task that was started eagerly inside one."""
    co = context.running
    task: Any = None if co is None else current_task(context.loop)
    return co if task is co else None


@types.coroutine
def park(reason: str = "") -> Generator[Any, Any, None]:
    """Suspend the running Coroutine until one wake (QEMU: yield); at once if a wake is remembered.

    In a Coroutine only; WrongState elsewhere, also in a plain asyncio task: those have futures. On
    cancellation raises CancelledError; a wake that came with it stays remembered. `reason` is for people.
    """
    context = current_context()
    co = None if context is None else _running_in(context)
    if co is None or context is None:
        raise WrongState("park() outside a homeloop coroutine: start it with spawn(), run() or call()")
    co._reason = reason
    while True:
        with context.lock:
            if co._permit:
                co._permit = False
                return
            co._state = _PARKED
        yield _PARK     # may come back without a wake: cancelled, and the cancellation taken back
