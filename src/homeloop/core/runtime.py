"""Runtime: one main context, its big lock, and the ways to host it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine as CoroutineABC
from types import TracebackType
from typing import Any, TypeVar

from homeloop.core import registry
from homeloop.core.biglock import BigLock
from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.ending import end_context
from homeloop.core.interrupts import ctrl_c_cancels
from homeloop.core.iothread import ContextThread
from homeloop.core.loop import running_loop
from homeloop.errors import ContextClosed, UsageError, WrongState

__all__ = ["Runtime", "new_event_loop", "run"]

T = TypeVar("T")
_numbers = itertools.count(1)


class Runtime:
    """One main context and its big lock.

    `with Runtime() as rt:` serves the main context on a background thread until the block ends; `rt.run(main())`
    hosts it on the calling thread instead and closes it at the end, as asyncio.run does. big_lock=False: nobody
    but the home ever runs the main context's code (rule 6).

    Any thread may make one. run() and `with`: a thread without a context. call(): one that may wait (rule 11).
    """

    def __init__(self, *, name: str | None = None, big_lock: bool = True, debug: bool | None = None) -> None:
        self.name = name or f"runtime-{next(_numbers)}"
        self._main: AioContext | None = None                # made on first use, under _lock
        self._lock = threading.Lock()                       # held while the main context is made
        self._with_big_lock = big_lock
        self._big_lock: BigLock | None = None               # made with _main
        self._debug = debug
        self._closed = False                                # under _lock
        self._thread: ContextThread | None = None           # in a `with` block

    @property
    def main(self) -> AioContext:
        """The main context. Any thread."""
        return self._parts()[0]

    @property
    def big_lock(self) -> BigLock:
        """The big lock; with big_lock=False one that nobody can take. Any thread."""
        return self._parts()[1]

    def _parts(self) -> tuple[AioContext, BigLock]:
        main, big_lock = self._main, self._big_lock
        if main is not None and big_lock is not None:
            return main, big_lock
        with self._lock:
            if self._main is None or self._big_lock is None:
                if self._closed:
                    raise ContextClosed(f"{self.name} has ended")
                main = AioContext(f"{self.name}-main", runtime=self)
                self._big_lock = BigLock(main, enabled=self._with_big_lock)
                if self._with_big_lock:
                    main.gate = self._big_lock
                    assert main.home is not None
                    main.home.gate = self._big_lock
                if self._debug is not None:
                    main.loop.set_debug(self._debug)
                self._main = main
                registry.register(self)
            return self._main, self._big_lock

    def call(self, coro: CoroutineABC[Any, Any, T], timeout: float | None = None) -> T:
        """AioContext.call on the main context."""
        try:
            main = self.main
        except UsageError:
            coro.close()
            raise
        return main.call(coro, timeout)

    def __enter__(self) -> Runtime:
        with self.main.lock:
            self.main.check_open_locked()
        thread = ContextThread(self.main.name, lambda: self.main)
        thread.start()
        self._thread = thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._thread.stop()

    def run(self, coro: CoroutineABC[Any, Any, T]) -> T:
        """Host the main context on this thread, run coro in it, end the runtime, return coro's result.

        A thread without a context. Everything that is left when coro ends is cancelled and waited for. The first
        Ctrl-C cancels coro, a second one raises KeyboardInterrupt where the main thread is.
        """
        if running_loop() is not None:
            coro.close()
            raise WrongState("run() inside a running event loop: await the coroutine, or use another thread")
        try:
            main = self.main
            with main.lock:
                main.check_open_locked()
            main.begin_serving()
        except BaseException:
            coro.close()
            raise
        try:
            try:
                return self._run_main(main, main.create(coro, name="main"))
            finally:
                end_context(main)
        finally:
            main.end_serving()

    def _run_main(self, main: AioContext, co: Coroutine[T]) -> T:
        done = main.loop.create_future()

        def ended(_co: Coroutine[T]) -> None:
            # SystemExit and KeyboardInterrupt end the loop by themselves, on their way through it.
            if not done.done() and not isinstance(co.outcome_error(), SystemExit | KeyboardInterrupt):
                done.set_result(None)

        co.when_done(ended)
        co.schedule()
        with ctrl_c_cancels(co) as interrupts:
            main.loop.run_until_complete(done)
        if interrupts and co.cancelled() and co.uncancel() == 0:
            raise KeyboardInterrupt
        return co.outcome()

    def close(self) -> None:
        """End a runtime that was neither run nor entered, but whose main context was used. Twice is fine."""
        with self._lock:
            self._closed = True
            main = self._main
        if main is None or main.closed:
            return
        main.begin_serving()
        try:
            end_context(main)
        finally:
            main.end_serving()

    def forget(self) -> None:
        """The main context has ended."""
        self._closed = True
        registry.forget(self)

    def __repr__(self) -> str:
        return f"<Runtime {self.name} {'closed' if self._closed else 'open'} big_lock={self._with_big_lock}>"


def run(main: CoroutineABC[Any, Any, T], *, debug: bool | None = None, big_lock: bool = True) -> T:
    """Run a coroutine as the main program, as asyncio.run does; this thread is the main context's home.

    A fresh runtime is made and ended. Any thread in which no loop runs.
    """
    return Runtime(debug=debug, big_lock=big_lock).run(main)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of a fresh runtime's main context, for asyncio.Runner(loop_factory=...) and the like.

    The thread that runs it is its home. Closing the loop ends the runtime.
    """
    return Runtime().main.loop
