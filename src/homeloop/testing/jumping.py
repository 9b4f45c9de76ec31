"""A loop whose clock jumps: hours pass in microseconds, and a wait that could never end is a failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Coroutine as CoroutineABC
from typing import Any, TypeVar, TypeVarTuple, cast

from homeloop.core.loop import HomeLoop
from homeloop.core.runtime import Runtime
from homeloop.testing.snapshots import context_lines

__all__ = ["JumpingLoop", "run_jumping"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
SLICE_S = 0.01              # of a real wait for threads: how long until the next look
THREADS_LIMIT_S = 30.0      # real seconds that threads may take


class JumpingLoop(HomeLoop):
    """The loop of a fresh main context, whose time jumps to the next timer instead of passing.

    A loop_factory, for asyncio.Runner(loop_factory=JumpingLoop) and the like; run_jumping() is the short form.
    time() begins at 0. Where nothing is ready and no timer is set, AssertionError "would wait for ever" names what
    waits, instead of a hang. The context's workers and run_in_executor() are waited for in real time, in which the
    clock stands still. Other threads and processes are not: a test that needs them wants a real clock.
    Time-outs of synchronous waits (call, result, wait_while) count real seconds.
    For its home thread, as every loop (rule 17).
    """

    __slots__ = ()

    def __new__(cls) -> JumpingLoop:
        # A context makes its loop itself. The layouts are the same, so the loop that it made becomes one of these.
        loop = cast(HomeLoop, Runtime(name="jumping").main.loop)
        loop.__class__ = cls
        return cast(JumpingLoop, loop)

    def __init__(self) -> None:             # in place of HomeLoop's, which has been called
        self._sleep_really = self._selector.sleep
        self._selector.sleep = self._sleep  # type: ignore[method-assign]
        self._now_s = 0.0                   # home
        self._jumps = 0                     # home
        self._elsewhere = 0                 # home: run_in_executor() calls that have not answered
        self.ending = False                 # home: what is left is being cancelled, its threads joined

    def time(self) -> float:
        return self._now_s

    @property
    def jumps(self) -> int:
        """How often the clock has jumped."""
        return self._jumps

    def _sleep(self, timeout: float | None) -> Any:
        """In place of the selector's sleep."""
        found = self._selector.glance()
        if found or self.inbox.entries:
            return found
        if self._busy_elsewhere() or (timeout is None and self.ending):
            return self._wait_for_threads()
        if timeout is None:
            self.ending = True
            raise AssertionError(self._complaint(
                f"would wait for ever: at {self._now_s:g} s nothing is ready and no timer is set"))
        self._now_s += timeout
        self._jumps += 1
        return found

    def _wait_for_threads(self) -> Any:
        end = time.monotonic() + THREADS_LIMIT_S
        while time.monotonic() < end:
            found = self._sleep_really(SLICE_S)
            if found or self.inbox.entries or not (self._busy_elsewhere() or self.ending):
                return found
        raise AssertionError(self._complaint(f"threads have not answered for {THREADS_LIMIT_S:g} s"))

    def _complaint(self, what: str) -> str:
        return "\n".join([what, *context_lines(self.context)])

    def _busy_elsewhere(self) -> bool:
        """Does a worker or an executor thread have work of ours? Its answer comes through the inbox."""
        if self._elsewhere:
            return True
        workers = self.context.statistics().workers
        return bool(workers) and (workers["queued"] > 0 or workers["threads"] > workers["idle"])

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._elsewhere += 1
        future.add_done_callback(self._answered)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        # Its thread joins the others and then posts: a real wait. From 3.12 on there is a time limit, whose timer
        # must not make the clock jump.
        self._elsewhere += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._elsewhere -= 1

    def _answered(self, _future: object) -> None:
        self._elsewhere -= 1


def run_jumping(coro: CoroutineABC[Any, Any, T]) -> T:
    """Run a coroutine as homeloop.run() does, on a JumpingLoop; return its result.

    AssertionError "would wait for ever", with what waits and where, if all is parked and no timer is set. What is
    left at the end is cancelled and waited for. A thread without a context.
    """
    loop = JumpingLoop()
    runtime = loop.context.runtime
    assert runtime is not None
    return runtime.run(_until_end(loop, coro))


async def _until_end(loop: JumpingLoop, coro: CoroutineABC[Any, Any, T]) -> T:
    try:
        return await coro
    finally:
        loop.ending = True
