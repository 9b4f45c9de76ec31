"""How a driver's method is called: ways, turns, workers under cancellation, errors."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import gc
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import homeloop
from homeloop.block.calling import Method, Turns, Way, block_error_of, method_of, quick_path_of
from homeloop.block.lane import Lane
from homeloop.errors import BlockError, UsageError
from tests.block.answers import BOUND_S, turns

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.run, homeloop.run], ids=["asyncio", "homeloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """A plain asyncio loop, where methods run on its executor; and ours, where they run on the context's pool."""
    return request.param    # type: ignore[no-any-return]


class Gate:
    """A blocking function that says when it has begun and ends when it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()
        self.calls: list[object] = []

    def __call__(self, *args: object) -> object:
        self.calls.append(args)
        self.begun.set()
        assert self.let_go.wait(BOUND_S), "nobody let the gate go"
        return args

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, BOUND_S), "the gate was never entered"


def worker_method(fn: Callable[..., object], lane: Lane | None = None) -> Method:
    return Method(fn, "Driver.method", Way.WORKER, Lane(parallel=True) if lane is None else lane)


# Turns


def test_turns_are_first_come_first_served() -> None:
    async def main() -> list[int]:
        line, order = Turns(), []

        async def one(number: int) -> None:
            await line.take()
            order.append(number)
            await turns()
            line.give()

        await asyncio.gather(*(one(number) for number in range(5)))
        return order

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_turn_is_not_for_grabs_when_given() -> None:
    async def main() -> list[str]:
        line, order = Turns(), []

        async def one(name: str) -> None:
            await line.take()
            order.append(name)
            line.give()

        await line.take()
        waiting = asyncio.create_task(one("waiting"))
        await turns()
        line.give()                 # handed over; "waiting" has not run yet
        await one("late")
        await waiting
        return order

    assert asyncio.run(main()) == ["waiting", "late"]


def test_cancelled_waiter_leaves_the_line() -> None:
    async def main() -> None:
        line = Turns()
        await line.take()
        first, second = (asyncio.create_task(line.take()) for _ in range(2))
        await turns()
        first.cancel()
        await turns()
        assert first.cancelled()
        line.give()
        await asyncio.wait_for(second, BOUND_S)

    asyncio.run(main())


def test_turn_given_to_a_waiter_cancelled_in_the_same_step() -> None:
    """The turn must go on.

    1. give()            sets the first waiter's future
    2. first.cancel()    before the first waiter has run
    3.                   the first waiter raises CancelledError, and hands the turn to the second
    """

    async def main() -> None:
        line = Turns()
        await line.take()
        first, second = (asyncio.create_task(line.take()) for _ in range(2))
        await turns()
        line.give()
        first.cancel()
        await asyncio.wait_for(second, BOUND_S)
        assert first.cancelled()

    asyncio.run(main())


def test_turn_skips_a_waiter_that_was_cancelled_but_has_not_run() -> None:
    async def main() -> None:
        line = Turns()
        await line.take()
        first, second = (asyncio.create_task(line.take()) for _ in range(2))
        await turns()
        first.cancel()              # its future is cancelled, its task has yet to run
        line.give()
        await asyncio.wait_for(second, BOUND_S)
        assert first.cancelled()

    asyncio.run(main())


# Errors


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOMEM, "out"), errno.ENOMEM),
        (OSError(errno.EDQUOT, "quota"), errno.ENOSPC),
        (OSError(errno.EFBIG, "big"), errno.ENOSPC),
        (OSError("no number"), errno.EIO),
        (OSError(0, "zero"), errno.EIO),
        (OSError(-5, "negative"), errno.EIO),
        (BlockError(errno.EPERM, "own"), errno.EPERM),
        (BlockError(errno.EFBIG, "own"), errno.ENOSPC),
        (ValueError("any"), errno.EIO),
        (TimeoutError(), errno.EIO),
    ],
)
def test_error_numbers(error: Exception, number: int) -> None:
    assert block_error_of(error, "Driver.read").errno == number


def test_error_text_names_method_and_kind() -> None:
    assert block_error_of(KeyError("x"), "Driver.read").text == "Driver.read: KeyError: 'x'"
    assert block_error_of(BlockError(errno.EDQUOT, "own words"), "Driver.read").text == "own words"


# Methods


def test_method_ways() -> None:
    class Driver:
        size = 0

        def read(self, offset: int, length: int) -> bytes:
            return b""

        async def write(self, offset: int, data: bytes) -> None:
            pass

    line = Lane(parallel=False)
    assert method_of(Driver(), "read", "inline", line).way is Way.INLINE            # type: ignore[union-attr]
    assert method_of(Driver(), "read", "parallel", line).way is Way.WORKER          # type: ignore[union-attr]
    assert method_of(Driver(), "write", "inline", line).way is Way.COROUTINE        # type: ignore[union-attr]
    assert method_of(Driver(), "flush", "inline", line) is None


def test_what_is_no_method_is_refused() -> None:
    class Driver:
        size = 0
        write = 7
        read_nowait = 7

        def read(self, offset: int, length: int) -> bytes:
            return b""

        async def write_nowait(self, offset: int, data: bytes) -> bool:
            return True

    with pytest.raises(UsageError, match=r"Driver\.write is 7, not a method"):
        method_of(Driver(), "write", "inline", Lane(parallel=False))
    with pytest.raises(UsageError, match=r"Driver\.read_nowait must be a plain function"):
        quick_path_of(Driver(), "read_nowait")
    with pytest.raises(UsageError, match=r"Driver\.write_nowait must be a plain function"):
        quick_path_of(Driver(), "write_nowait")
    assert quick_path_of(Driver(), "trim_nowait") is None


def test_worker_runs_elsewhere_with_contextvars(run: Run) -> None:
    word = contextvars.ContextVar("word", default="unset")

    def where() -> tuple[int, str]:
        return threading.get_ident(), word.get()

    async def main() -> None:
        word.set("set")
        found: Any = await worker_method(where).call()
        assert found[0] != threading.get_ident()
        assert found[1] == "set"

    run(main())


def test_worker_errors_become_block_errors(run: Run) -> None:
    def fail(error: Exception) -> None:
        raise error

    async def main() -> None:
        with pytest.raises(BlockError, match="no space") as caught:
            await worker_method(fail).call(OSError(errno.ENOSPC, "no space"))
        assert caught.value.errno == errno.ENOSPC
        # A future cannot carry a StopIteration: the naive version waits for ever.
        with pytest.raises(BlockError, match="StopIteration"):
            await asyncio.wait_for(worker_method(fail).call(StopIteration()), BOUND_S)

    run(main())


def test_running_worker_is_waited_for_when_cancelled(run: Run) -> None:
    """The buffer is the caller's again when the request ends: nobody may still use it."""

    async def main() -> None:
        gate = Gate()
        buffer = memoryview(bytearray(b"data"))
        task = asyncio.create_task(worker_method(gate).later(buffer))
        await gate.has_begun()
        for _ in range(3):                      # once is not enough to get away
            task.cancel()
            await turns()
            assert not task.done()
        gate.let_go.set()
        await asyncio.wait((task,), timeout=BOUND_S)
        assert task.cancelled()
        buffer.release()

    run(main())


def test_error_of_a_cancelled_worker_is_dropped(run: Run) -> None:
    gate = Gate()

    def fail_late() -> None:
        gate()
        raise ValueError("nobody asks any more")

    async def main() -> None:
        reports: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, report: reports.append(report))
        task = asyncio.create_task(worker_method(fail_late).later())
        await gate.has_begun()
        task.cancel()
        await turns()
        gate.let_go.set()
        await asyncio.wait((task,), timeout=BOUND_S)
        assert task.cancelled()
        del task
        gc.collect()                # the report comes when the future goes
        assert reports == []

    run(main())


def test_serialised_never_two_at_once_and_fifo(run: Run) -> None:
    inside, most, order = 0, 0, []
    lock = threading.Lock()

    def step(number: int) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            order.append(number)
        with lock:
            inside -= 1

    async def main() -> None:
        method = worker_method(step, Lane(parallel=False))
        await asyncio.gather(*(method.call(number) for number in range(200)))

    run(main())
    assert most == 1
    assert order == list(range(200))


def test_serialised_waiter_cancelled_is_not_called(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        called: list[int] = []
        line = Lane(parallel=False)
        first = asyncio.create_task(worker_method(gate, line).later())
        await gate.has_begun()
        second = asyncio.create_task(worker_method(functools.partial(called.append, 2), line).later())
        third = asyncio.create_task(worker_method(functools.partial(called.append, 3), line).later())
        await turns()
        second.cancel()
        await turns()
        assert second.cancelled()               # at once: it need not wait for the first
        gate.let_go.set()
        await asyncio.wait_for(asyncio.gather(first, third), BOUND_S)
        assert called == [3]

    run(main())


def test_parallel_runs_several_at_once(run: Run) -> None:
    both = threading.Barrier(2)

    def meet() -> None:
        both.wait(BOUND_S)                      # BrokenBarrierError if they are one after the other

    async def main() -> None:
        method = worker_method(meet)
        await asyncio.gather(method.call(), method.call())

    run(main())


def test_plain_function_that_returns_a_coroutine() -> None:
    async def later() -> bytes:
        return b"x"

    method = Method(lambda: later(), "Driver.read", Way.INLINE, None)
    with pytest.raises(BlockError, match=r"Driver\.read is a plain function but returned a coroutine"):
        method.now()
