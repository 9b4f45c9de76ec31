"""Worker pools (rule 16): blocking functions off the loop, awaited from it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import inspect
import threading
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import homeloop
from homeloop.core import workers
from homeloop.errors import NoRuntime, UsageError
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, until, wait
from tests.core.places import in_callback, returned

worker_var: contextvars.ContextVar[str] = contextvars.ContextVar("worker_var", default="nobody")
WORKERS_MAX = 3


class Boom(Exception):
    pass


@pytest.fixture(params=["main", "iothread", "asyncio loop"])
def context(request: pytest.FixtureRequest) -> Iterator[homeloop.AioContext]:
    """A context with a pool of at most three threads; the main context's has 64."""
    if request.param == "main":
        with homeloop.Runtime() as rt:
            yield rt.main
    else:
        factory = asyncio.SelectorEventLoop if request.param == "asyncio loop" else None
        with homeloop.Runtime(), homeloop.IOThread(worker_max=WORKERS_MAX, loop_factory=factory) as io:
            yield io.context


@pytest.fixture
def io() -> Iterator[homeloop.IOThread]:
    with homeloop.IOThread(worker_max=WORKERS_MAX) as io:
        yield io


class Gate:
    """A blocking function for workers: counts who is inside, lets them go when opened."""

    def __init__(self) -> None:
        self.inside = 0
        self.ran: list[Any] = []
        self.lock = threading.Lock()
        self.opened = threading.Event()

    def pass_through(self, name: Any = None) -> Any:
        with self.lock:
            self.inside += 1
        wait(self.opened, self)
        with self.lock:
            self.inside -= 1
            self.ran.append(name)
        return name


async def all_workers(*functions: Any) -> list[Any]:
    return await asyncio.gather(*(homeloop.to_worker(fn) for fn in functions))


def test_rule16_result_from_another_thread(context: homeloop.AioContext) -> None:
    """fn runs in a thread that is nobody's home, without a context; its result is awaited."""

    def fn(a: int, b: int) -> Any:
        return a + b, threading.get_ident(), homeloop.current_context()

    async def body() -> Any:
        return await homeloop.to_worker(fn, 2, 3), threading.get_ident()

    (total, ident, current), home = context.spawn(body()).result(LIMIT_S)
    assert total == 5
    assert ident != home
    assert current is None


def test_rule16_worker_is_awaitable_on_the_context(context: homeloop.AioContext) -> None:
    """context.worker(fn, *args), which to_worker() is short for."""

    async def body() -> Any:
        return await context.worker(divmod, 7, 2)

    assert context.spawn(body()).result(LIMIT_S) == (3, 1)


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_rule16_exceptions_come_back(context: homeloop.AioContext, kind: type[BaseException]) -> None:
    """Whatever fn raises is raised by the await, with fn in its traceback; the pool goes on."""

    def raises() -> None:
        raise kind("in fn")

    async def body() -> list[str]:
        with pytest.raises(kind) as caught:
            await homeloop.to_worker(raises)
        return [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    names = context.spawn(body()).result(LIMIT_S)
    assert kind is asyncio.CancelledError or "raises" in names
    assert context.spawn(homeloop.to_worker(lambda: 1)).result(LIMIT_S) == 1


def test_rule16_stop_iteration(context: homeloop.AioContext) -> None:
    """StopIteration cannot pass a coroutine: a RuntimeError says so, and nobody hangs."""
    co = context.spawn(homeloop.to_worker(next, iter(())))
    with pytest.raises(RuntimeError):
        co.result(LIMIT_S)


def test_rule16_contextvars_go_along(context: homeloop.AioContext) -> None:
    """fn sees them; what it sets stays in the worker."""

    def fn() -> str:
        seen = worker_var.get()
        worker_var.set("the worker")
        return seen

    async def body() -> Any:
        worker_var.set("the coroutine")
        return await homeloop.to_worker(fn), await homeloop.to_worker(fn), worker_var.get()

    assert context.spawn(body()).result(LIMIT_S) == ("the coroutine", "the coroutine", "the coroutine")


def test_rule16_a_worker_belongs_to_its_runtime() -> None:
    """main_context() in a worker is that of the pool's runtime, and a worker may call() into it."""
    with homeloop.Runtime() as one, homeloop.Runtime():
        async def body() -> Any:
            def fn() -> Any:
                return homeloop.main_context(), one.call(returned(threading.get_ident)) == threading.get_ident()
            return await homeloop.to_worker(fn)

        assert one.main.spawn(body()).result(LIMIT_S) == (one.main, True)


def test_rule16_without_a_context() -> None:
    """to_worker() in a plain asyncio program that has no context says what to use instead."""
    coro = homeloop.to_worker(lambda: 1)
    with pytest.raises(NoRuntime, match=r"asyncio\.to_thread"):
        asyncio.run(coro)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


# Threads


def test_rule16_at_most_max_threads_in_the_order_of_the_calls(io: homeloop.IOThread) -> None:
    """No more than `worker_max` run at once; the others wait their turn, first come first served."""
    gate = Gate()
    co = io.spawn(all_workers(*(functools.partial(gate.pass_through, i) for i in range(10))))
    until(lambda: gate.inside == WORKERS_MAX, io.context)
    in_callback(io.context, lambda: None)
    statistics = io.context.statistics().workers
    assert (statistics["threads"], statistics["queued"]) == (WORKERS_MAX, 10 - WORKERS_MAX)
    gate.opened.set()
    assert co.result(LIMIT_S) == list(range(10))
    assert io.context.statistics().workers["started"] == WORKERS_MAX


def test_rule16_idle_threads_are_used_again(io: homeloop.IOThread) -> None:
    """One call after the other needs one thread."""

    async def body() -> set[int]:
        return {await homeloop.to_worker(threading.get_ident) for _ in range(20)}

    idents = io.spawn(body()).result(LIMIT_S)
    started = io.context.statistics().workers["started"]
    # The thread says "done" before it is idle: the next call may come between, and start one more.
    assert len(idents) == started <= WORKERS_MAX


def test_rule16_a_queued_call_is_not_lost_behind_a_woken_idle_thread(io: homeloop.IOThread) -> None:
    """Calls that come faster than idle threads wake still get all the threads they may have.

        home                                    idle worker
        1 submit A: wakes the idle one
        2 submit B: nobody idle: a new thread
                                                3 takes A or B; the new one takes the other
    """
    assert io.spawn(homeloop.to_worker(lambda: 1)).result(LIMIT_S) == 1
    for _ in range(30):
        barrier = threading.Barrier(WORKERS_MAX)            # they meet only if all run at the same time
        assert len(io.spawn(all_workers(*[functools.partial(wait, barrier)] * WORKERS_MAX)).result(LIMIT_S)) == 3


@pytest.mark.parametrize("minimum", [0, 1])
def test_rule16_idle_threads_end(monkeypatch: pytest.MonkeyPatch, minimum: int) -> None:
    """After the idle time (10 s; shortened here) a thread ends, but for `worker_min` of them; more come when needed."""
    assert workers.IDLE_END_S == 10.0
    monkeypatch.setattr(workers, "IDLE_END_S", 0.02)
    with homeloop.IOThread(worker_min=minimum, worker_max=WORKERS_MAX) as io:
        gate = Gate()
        co = io.spawn(all_workers(*[gate.pass_through] * WORKERS_MAX))
        until(lambda: gate.inside == WORKERS_MAX, io.context)
        gate.opened.set()
        co.result(LIMIT_S)
        until(lambda: io.context.statistics().workers["threads"] == minimum, io.context)
        assert io.spawn(homeloop.to_worker(lambda: 5)).result(LIMIT_S) == 5


def test_rule16_the_end_of_the_context_waits_for_running_work() -> None:
    """What runs is waited for; its threads end with the context."""
    gate = Gate()
    threads = threading.active_count()
    io = homeloop.IOThread(worker_max=1).start()
    co = io.spawn(homeloop.to_worker(gate.pass_through, "running"))
    until(lambda: gate.inside == 1, io.context)
    stopper = Plain(io.stop)
    assert stopper.running()
    assert gate.ran == []
    gate.opened.set()
    stopper.result(io.context)
    assert co.done()
    assert gate.ran == ["running"]
    assert threading.active_count() == threads


# Cancelling


def test_rule16_cancelled_while_queued_it_never_runs(io: homeloop.IOThread) -> None:
    """The waiter is free at once; the queue closes over it."""
    gate = Gate()

    async def body() -> None:
        busy = [io.context.worker(gate.pass_through, i) for i in range(WORKERS_MAX)]
        queued = [io.context.worker(gate.pass_through, name) for name in ("a", "b", "c")]
        assert queued[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued[1]
        assert gate.ran == []
        gate.opened.set()
        await asyncio.gather(*busy, queued[0], queued[2])

    io.spawn(body()).result(LIMIT_S)
    assert sorted(map(str, gate.ran)) == ["0", "1", "2", "a", "c"]


def test_rule16_cancelled_while_running_it_is_waited_for(io: homeloop.IOThread) -> None:
    """CancelledError comes when fn has returned, its result is dropped; asyncio.timeout waits as well."""
    gate = Gate()
    log: list[Any] = []

    async def body() -> None:
        try:
            await homeloop.to_worker(gate.pass_through, "fn")
        finally:
            log.append(list(gate.ran))

    co = io.spawn(body())
    until(lambda: gate.inside == 1, io.context)
    assert co.cancel()
    in_callback(io.context, lambda: None)
    assert not co.done()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        co.result(LIMIT_S)
    assert log == [["fn"]]


def test_rule16_timeout_around_running_work(io: homeloop.IOThread) -> None:
    """The time is over, fn is waited for, then TimeoutError; the count of cancellations is 0 again."""
    gate = Gate()

    async def body() -> int:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.005):
                io.context.loop.call_later(0.02, gate.opened.set)
                await homeloop.to_worker(gate.pass_through, "fn")
        assert gate.ran == ["fn"]
        return task.cancelling()

    assert io.spawn(body()).result(LIMIT_S) == 0


def test_rule16_cancelled_while_running_and_fn_raises(io: homeloop.IOThread) -> None:
    """The cancellation wins; the error is dropped, and nothing is logged as never retrieved."""
    gate = Gate()
    reported: list[Any] = []
    in_callback(io.context, lambda: io.context.loop.set_exception_handler(lambda loop, what: reported.append(what)))

    def fails() -> None:
        gate.pass_through()
        raise Boom

    co = io.spawn(homeloop.to_worker(fails))
    until(lambda: gate.inside == 1, io.context)
    co.cancel()
    in_callback(io.context, lambda: None)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        co.result(LIMIT_S)
    gc.collect()
    in_callback(io.context, lambda: None)
    assert reported == []


def test_rule16_cancelled_right_behind_its_end(io: homeloop.IOThread) -> None:
    """fn has returned, the message is on its way, and then comes the cancellation: told once, no hang.

        worker                          home
                                        1 blocked
        2 fn returns, message queued
                                        3 cancel(), then the message
    """
    returned_from_fn, go_on = threading.Event(), threading.Event()

    async def body() -> str:
        work = io.context.worker(returned_from_fn.set)
        wait(returned_from_fn, io.context)
        until(lambda: io.context.statistics().workers["completed"] == 1, io.context)
        work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            return "cancelled"
        return "result"

    go_on.set()
    assert io.spawn(body()).result(LIMIT_S) in ("cancelled", "result")
    assert io.spawn(homeloop.to_worker(lambda: 1)).result(LIMIT_S) == 1


# Nothing is kept, nothing is lost


def test_rule16_nothing_of_a_finished_call_is_kept(io: homeloop.IOThread) -> None:
    """Arguments and results can be collected while the pool is idle."""

    class Big:
        pass

    refs: list[weakref.ref[Big]] = []

    async def body() -> None:
        argument = Big()
        refs.append(weakref.ref(argument))
        refs.append(weakref.ref(await homeloop.to_worker(lambda big: Big(), argument)))

    io.spawn(body()).result(LIMIT_S)
    until(lambda: gc.collect() >= 0 and [ref() for ref in refs] == [None, None], refs)


@pytest.mark.stress
def test_rule16_stress_every_call_comes_back_once(context: homeloop.AioContext) -> None:
    """Many short calls at once from many coroutines: as many results as calls, each the right one."""
    count = int(1000 * STRESS_S)
    seen: list[int] = []

    async def caller(start: int) -> list[int]:
        return [await homeloop.to_worker(lambda i: seen.append(i) or i, i) for i in range(start, count, 10)]

    async def body() -> list[int]:
        return sorted(sum(await asyncio.gather(*(caller(i) for i in range(10))), []))   # noqa: RUF017

    assert context.spawn(body()).result(3 * LIMIT_S) == list(range(count))
    assert sorted(seen) == list(range(count))
    statistics = context.statistics().workers
    assert statistics["completed"] == count
    assert statistics["queued"] == 0


# As asyncio's default executor

def test_rule16_run_in_executor_and_to_thread_use_the_pool() -> None:
    """Both run on the context's workers; a default executor that was set is used instead."""
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        names = [
            await loop.run_in_executor(None, lambda: threading.current_thread().name),
            await asyncio.to_thread(lambda: threading.current_thread().name),
        ]
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="theirs") as executor:
            names.append(await loop.run_in_executor(executor, lambda: threading.current_thread().name))
        return names

    first, second, third = homeloop.run(main())
    assert "worker" in first
    assert "worker" in second
    assert third.startswith("theirs")


def test_rule16_a_cancelled_run_in_executor_does_not_wait() -> None:
    """As in asyncio: the future is cancelled at once, the call that runs is left to itself; the end waits for it."""
    runs, end, done = threading.Event(), threading.Event(), []

    def blocks() -> None:
        runs.set()
        wait(end)
        done.append(1)

    async def main() -> None:
        task = asyncio.create_task(asyncio.to_thread(blocks))
        await homeloop.to_worker(wait, runs)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not done
        end.set()

    homeloop.run(main())
    assert done == [1]


def test_rule16_a_call_that_does_not_return_is_named_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a context waits for its workers, and says for which function, with its stack."""
    monkeypatch.setattr(workers, "REPORT_AFTER_S", 0.0)
    runs, end = threading.Event(), threading.Event()
    reports: list[str] = []

    def never_returns() -> None:
        runs.set()
        wait(end)

    def handle(_loop: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
        reports.append(what["message"])
        end.set()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(handle)
        homeloop.main_context().worker(never_returns).add_done_callback(lambda work: work.exception())
        await homeloop.to_worker(wait, runs)

    homeloop.run(main())
    assert len(reports) == 1, reports
    assert "never_returns" in reports[0]
    assert "wait(end)" in reports[0]


def test_rule16_quiet_work(io: homeloop.IOThread) -> None:
    """It runs on a worker and is waited for at the end; later work finds the thread again."""
    ran: list[int] = []

    async def main() -> None:
        pool = io.context.pool()
        for _ in range(10):
            pool.submit_quiet(lambda: ran.append(threading.get_ident()))
        await homeloop.to_worker(int)

    io.call(main(), LIMIT_S)
    io.stop()
    assert len(ran) == 10
    assert threading.get_ident() not in ran


def test_limits_that_change_while_work_runs(io: homeloop.IOThread) -> None:
    """More: what is queued gets threads at once. Fewer: nothing that runs is stopped, and the idle ones end."""
    pool = in_callback(io.context, io.context.pool)
    gate = Gate()
    calls = [io.spawn(all_workers(functools.partial(gate.pass_through, number))) for number in range(6)]
    until(lambda: gate.inside == WORKERS_MAX)
    pool.set_limits(0, 5)
    until(lambda: gate.inside == 5)
    pool.set_limits(0, 1)
    assert gate.inside == 5
    gate.opened.set()
    assert sorted(call.result(LIMIT_S)[0] for call in calls) == list(range(6))
    until(lambda: pool.statistics()["threads"] <= 1)
    gate.opened.clear()
    more = [io.spawn(all_workers(functools.partial(gate.pass_through, number))) for number in range(2)]
    until(lambda: gate.inside == 1 and pool.statistics()["queued"] == 1)
    gate.opened.set()
    assert [call.result(LIMIT_S) for call in more] == [[0], [1]]
    for low, high in ((-1, 4), (0, 0), (5, 4)):
        with pytest.raises(UsageError, match="need 0 <= min <= max"):
            pool.set_limits(low, high)
