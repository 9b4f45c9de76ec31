"""Waits that close a cycle at run time are refused, with the whole cycle in the text; nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.core import waitgraph
from homeloop.errors import WouldDeadlock
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, in_plain_thread, returned, until, wait
from tests.core.places import World, in_callback

HEAD = "this wait would close a cycle"


@pytest.fixture
def world() -> Iterator[World]:
    with homeloop.Runtime(name="rt") as rt, homeloop.IOThread("io-own") as own, homeloop.IOThread("io-other") as other:
        yield World(rt=rt, own=own, other=other)
    assert waitgraph._stacks == {}
    assert waitgraph._awaits == {}
    assert waitgraph._owner_waits == 0


def suspended(co: homeloop.Coroutine[Any]) -> None:
    """Return once it waits for something."""
    until(lambda: co.state is homeloop.CoroutineState.WAITING, co)


def sleeping(gate: homeloop.BigLock | None = None) -> None:
    """Return once a thread sleeps: in a wait that is written down, or in the queue of a big lock."""
    until(lambda: gate.statistics()["waiting"] if gate else waitgraph._stacks, gate)


def lines_of(error: WouldDeadlock) -> list[str]:
    """The links of the cycle in an error's text."""
    head, *links = str(error).split("\n")
    assert head.startswith(HEAD), error
    return [link.strip() for link in links]


def refused(outcome: Callable[[], Any], *links: str) -> None:
    """outcome() raises WouldDeadlock with these links, each a pattern, in a ring that may begin anywhere."""
    with pytest.raises(WouldDeadlock) as caught:
        outcome()
    found = lines_of(caught.value)
    assert len(found) == len(links), caught.value
    rings = [found[turn:] + found[:turn] for turn in range(len(found))]
    matches = [all(re.search(link, line) for link, line in zip(links, ring, strict=True)) for ring in rings]
    assert any(matches), f"{caught.value}\nwanted {links}"


class Promise:
    """A coroutine that another one will await: known before it begins."""

    def __init__(self, context: homeloop.AioContext, body: Callable[[], Any], name: str) -> None:
        self.co: homeloop.Coroutine[Any] = context.create(self._run(body), name=name)

    async def _run(self, body: Callable[[], Any]) -> Any:
        return await body()


# -- coroutines that await each other ------------------------------------------------------------------------


def ring(world: World, size: int) -> list[homeloop.Coroutine[Any]]:
    """Coroutines of several contexts, each of which awaits the next once it was woken."""
    contexts = [world.rt.main, world.own.context, world.other.context]
    cos: list[homeloop.Coroutine[Any]] = []

    async def waits(number: int) -> Any:
        await homeloop.park()
        return await cos[(number + 1) % size]

    cos += [contexts[number % 3].spawn(waits(number), name=f"co-{number}") for number in range(size)]
    return cos


@pytest.mark.parametrize("size", [2, 3, 5])
def test_rule11_coroutines_that_await_each_other(world: World, size: int) -> None:
    """The last one is refused, and its error goes back through all the others."""
    cos = ring(world, size)
    for co in cos[:-1]:
        co.wake()
        suspended(co)
    cos[-1].wake()
    links = [f"^coroutine co-{n} of .* waits for <Coroutine co-{(n + 1) % size} " for n in range(size)]
    for co in cos:
        refused(lambda co=co: co.result(LIMIT_S), *links)       # type: ignore[misc]


def test_rule11_run_of_what_awaits_its_caller(world: World) -> None:
    async def remote(caller: homeloop.Coroutine[Any]) -> None:
        await caller

    async def local() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        await world.own.run(remote(me))

    co = world.rt.main.spawn(local(), name="local")
    refused(lambda: co.result(LIMIT_S),
            "^coroutine local of rt-main waits for",
            "^coroutine .* of io-own waits for <Coroutine local ")


def test_rule11_a_long_chain_is_no_cycle_and_costs_no_stack(world: World) -> None:
    """Each awaits the one before; then the first awaits the last, through all of them."""
    size = 2_000
    cos: list[homeloop.Coroutine[Any]] = []

    async def waits(number: int) -> Any:
        await homeloop.park()
        return await cos[number - 1]

    cos += [world.own.spawn(waits(number), name=f"co-{number}") for number in range(size)]
    for co in cos[1:]:
        co.wake()
    for co in cos[1:]:
        suspended(co)
    cos[0].wake()
    with pytest.raises(WouldDeadlock) as caught:
        cos[-1].result(LIMIT_S)
    assert len(lines_of(caught.value)) == size


# -- worker threads ------------------------------------------------------------------------------------------


def waiting_job(how: str, world: World, co: homeloop.Coroutine[Any]) -> Any:
    """On a worker thread: wait for co, directly or by way of a coroutine of its own."""

    async def awaits() -> Any:
        return await co

    if how == "result":
        return co.result()
    if how == "call":
        return world.rt.call(awaits())
    return world.other.call(awaits())


@pytest.mark.parametrize("how", ["result", "call", "call to an IOThread"])
@pytest.mark.parametrize("where", ["main", "own"])
def test_rule11_a_job_waits_for_who_waits_for_it(world: World, where: str, how: str) -> None:
    async def asks() -> Any:
        me = homeloop.current_coroutine()
        assert me is not None
        return await homeloop.to_worker(waiting_job, how, world, me)

    def outcome() -> Any:
        try:
            return co.result(LIMIT_S)
        except asyncio.CancelledError as error:     # the coroutine of the refused call was cancelled, and with it co
            assert how != "result"
            raise WouldDeadlock(*error.args) from None

    context = world.rt.main if where == "main" else world.own.context
    co = context.spawn(asks(), name="asker")
    links = [r"^coroutine asker of .* waits for waiting_job\(\) on a worker of .*, run by thread '.*-worker-1'$"]
    if how == "result":
        links += [r"^thread '.*-worker-1' waits for <Coroutine asker "]
    else:
        links += [r"^thread '.*-worker-1' waits for <Coroutine ", r"^coroutine .* waits for <Coroutine asker "]
    refused(outcome, *links)


@pytest.mark.parametrize("threads", [1, 3])
def test_rule11_a_job_queued_behind_those_that_wait_for_it(threads: int) -> None:
    """All threads of a pool wait for a coroutine that needs one more."""
    with homeloop.IOThread("small", worker_max=threads) as small:
        begun = [threading.Event() for _ in range(threads)]
        go = threading.Event()

        async def needs_a_thread() -> int:
            await homeloop.to_worker(int)
            return 1

        def job(number: int) -> Any:
            begun[number].set()
            wait(go)
            return sought.result()

        async def asks(number: int) -> Any:
            return await homeloop.to_worker(job, number)

        sought = small.context.create(needs_a_thread(), name="sought")
        askers = [small.spawn(asks(number)) for number in range(threads)]
        for event in begun:
            wait(event)
        sought.wake()
        suspended(sought)
        go.set()
        errors = 0
        for asker in askers:
            try:
                assert asker.result(LIMIT_S) == 1           # the refusal of one made room
            except WouldDeadlock as error:
                errors += 1
                text = str(error)
        assert errors == 1
        assert "queued behind what thread 'small-worker-" in text
        assert sought.result(LIMIT_S) == 1


def test_rule11_a_queued_job_with_one_thread_at_work_is_no_cycle() -> None:
    with homeloop.IOThread("small", worker_max=2) as small:
        end, begun = threading.Event(), threading.Event()

        async def needs_a_thread() -> int:
            return await homeloop.to_worker(int, 7)

        async def works() -> None:
            await homeloop.to_worker(works_on)

        def works_on() -> None:
            begun.set()
            wait(end)

        async def asks() -> Any:
            return await homeloop.to_worker(lambda: sought.result())

        sought = small.context.create(needs_a_thread(), name="sought")
        worker = small.spawn(works())
        wait(begun)
        asker = small.spawn(asks())
        sleeping()
        sought.wake()
        suspended(sought)
        end.set()
        assert asker.result(LIMIT_S) == 7
        worker.result(LIMIT_S)


# -- big locks -----------------------------------------------------------------------------------------------


def test_rule11_an_iothread_keeps_the_lock_that_its_own_coroutine_needs(world: World) -> None:
    """It serves its own loop meanwhile, but the main loop stands still."""

    async def needs_main(main: homeloop.Coroutine[Any]) -> None:
        await main

    def keeps_main_out() -> None:
        with world.rt.big_lock:
            main = world.rt.main.spawn(returned(int), name="kept-out")
            world.own.spawn(needs_main(main), name="needs").result()

    refused(lambda: in_callback(world.own.context, keeps_main_out),
            "^coroutine needs of io-own waits for <Coroutine kept-out ",
            "^coroutine kept-out of rt-main can run only when thread 'io-own' lets the big lock of rt-main go$",
            "^thread 'io-own' waits for <Coroutine needs ")


@pytest.mark.parametrize("how", ["acquire", "with"])
@pytest.mark.parametrize("size", [2, 3])
def test_rule11_big_locks_in_a_ring(how: str, size: int) -> None:
    """Each thread holds one and wants the next. At least one is told, and the others go on."""
    runtimes = [homeloop.Runtime(name=f"rt-{number}") for number in range(size)]
    all_hold = threading.Barrier(size)

    def take_both(number: int) -> str:
        mine, wanted = runtimes[number], runtimes[(number + 1) % size]
        with mine.big_lock:
            wait(all_hold)
            try:
                if how == "with":
                    with wanted.big_lock:
                        pass
                else:
                    wanted.big_lock.acquire()
                    wanted.big_lock.release()
            except WouldDeadlock as error:
                lines = lines_of(error)
                assert len(lines) == size
                assert all(re.search("waits for the big lock of rt-.-main, held by", line) for line in lines)
                return "refused"
        return "went on"

    try:
        threads = [Plain(take_both, number) for number in range(size)]
        assert "refused" in [thread.result() for thread in threads]
        for runtime in runtimes:
            assert runtime.big_lock.acquire(LIMIT_S)
            runtime.big_lock.release()
    finally:
        for runtime in runtimes:
            runtime.close()


@pytest.mark.parametrize("how", ["call", "acquire"])
def test_rule11_a_worker_wants_the_lock_of_who_waits_for_it(world: World, how: str) -> None:
    lock = world.rt.big_lock

    def job() -> None:
        if how == "call":
            world.rt.call(returned(int))
        else:
            with lock:
                pass

    async def asks() -> None:
        await homeloop.to_worker(job)

    def holds() -> None:
        with lock:
            world.own.spawn(asks(), name="asker").result()

    refused(lambda: in_callback(world.own.context, holds),
            r"^thread 'io-own' waits for <Coroutine asker ",
            r"^coroutine asker of io-own waits for .*job\(\) on a worker of io-own, run by thread 'io-own-worker-1'$",
            r"^thread 'io-own-worker-1' waits for the big lock of rt-main, held by thread 'io-own'$")
    assert world.rt.call(returned(int)) == 0


# -- stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_home", [False, True])
def test_rule11_stop_waits_for_a_worker_that_waits_for_who_stops(world: World, from_home: bool) -> None:
    """From the main home it serves the main loop meanwhile, but the coroutine that stops stands on that stack."""
    doomed = homeloop.IOThread("doomed").start()
    begun = threading.Event()

    def job(stopper: homeloop.Coroutine[Any]) -> Any:
        begun.set()
        return stopper.result()

    async def asks(stopper: homeloop.Coroutine[Any]) -> Any:
        with pytest.raises(WouldDeadlock):
            await homeloop.to_worker(job, stopper)

    async def stops() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        doomed.spawn(asks(me))
        wait(begun)
        if from_home:
            doomed.stop()
        else:
            await homeloop.to_worker(doomed.stop)

    co = world.rt.main.spawn(stops(), name="stopper")
    with pytest.raises(WouldDeadlock) as caught:
        co.result(LIMIT_S)
        doomed.stop()       # it was the job that was refused: what it waits for goes on, and all ends
        raise WouldDeadlock(f"{HEAD}\n")
    text = str(caught.value)
    if "\n  " in text:
        assert "the end of doomed, whose worker, thread 'doomed-worker-1', has not ended" in text
    doomed.stop()


# -- nested waits --------------------------------------------------------------------------------------------


def test_rule11_a_nested_wait_for_what_awaits_the_waiter(world: World) -> None:
    """main: `outer` waits on its stack for `inner`, which awaits `remote` of an IOThread, which awaits `outer`."""
    main = world.rt.main

    async def remote(outer: homeloop.Coroutine[Any]) -> None:
        await outer

    async def inner(outer: homeloop.Coroutine[Any]) -> None:
        await world.own.spawn(remote(outer), name="remote")

    async def outer() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        main.spawn(inner(me), name="inner").result()

    co = main.spawn(outer(), name="outer")
    refused(lambda: co.result(LIMIT_S),
            "^coroutine remote of io-own waits for <Coroutine outer ",
            "^coroutine outer of rt-main stands on the stack of thread 'rt-main'$",
            "^thread 'rt-main' waits for <Coroutine inner ",
            "^coroutine inner of rt-main waits for <Coroutine remote ")


def test_rule11_a_wait_further_up_the_stack_keeps_those_below_from_going_on(world: World) -> None:
    """What `below` waits for has ended, but on its stack stands `above`, which waits for who awaits `below`."""
    main = world.rt.main

    async def awaits(co: homeloop.Coroutine[Any]) -> None:
        await co

    async def above(below: homeloop.Coroutine[Any]) -> str:
        try:
            world.own.spawn(awaits(below), name="awaiting").result()
        except WouldDeadlock as error:
            return str(error)
        return "not refused"

    async def below() -> str:
        me = homeloop.current_coroutine()
        assert me is not None
        top = main.spawn(above(me), name="above")
        main.wait_while(lambda: top.state is homeloop.CoroutineState.SCHEDULED, LIMIT_S)
        return top.result(LIMIT_S)

    text = main.spawn(below(), name="below").result(LIMIT_S)
    assert text.startswith(HEAD) or "itself" in text


# -- what is no deadlock ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["result", "acquire", "wait_while"])
def test_rule11_a_timed_wait_is_no_link(world: World, how: str) -> None:
    """It ends by itself: TimeoutError, or False, and never WouldDeadlock."""
    lock = world.rt.big_lock

    def job(co: homeloop.Coroutine[Any]) -> object:
        if how == "acquire":
            return lock.acquire(0.01)
        if how == "wait_while":
            return world.rt.main.wait_while(lambda: not co.done(), 0.01)
        with pytest.raises(TimeoutError):
            co.result(0.01)
        return False

    async def asks() -> object:
        me = homeloop.current_coroutine()
        assert me is not None
        return await homeloop.to_worker(job, me)

    def holds() -> object:
        with lock:
            return world.own.spawn(asks()).result()

    assert in_callback(world.own.context, holds) is False


def test_rule11_a_call_that_times_out_and_could_never_end(world: World) -> None:
    """A timed call() waits for what it has cancelled; here the cancellation would wait for the very job that calls."""
    refusals: list[str] = []

    async def awaits(co: homeloop.Coroutine[Any]) -> None:
        await co

    def job(co: homeloop.Coroutine[Any]) -> None:
        while not refusals:
            try:
                world.other.call(awaits(co), 0.01)
            except WouldDeadlock as error:
                refusals.append(str(error))
            except TimeoutError:        # a busy machine: it had not begun to await
                continue

    async def asks() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        await homeloop.to_worker(job, me)

    with contextlib.suppress(asyncio.CancelledError):       # unless the refusal was back before the cancellation
        world.own.spawn(asks(), name="asker").result(LIMIT_S)
    [text] = refusals
    assert "waits for <Coroutine asker " in text


def test_rule11_what_serves_its_loop_meanwhile_is_no_blocked_link(world: World) -> None:
    """A holder of the big lock waits for an IOThread, which needs the main loop; the wait serves it."""

    async def needs_main() -> int:
        return await world.rt.main.run(returned(int, 3))

    def holder() -> int:
        with world.rt.big_lock:
            return world.own.spawn(needs_main()).result()

    assert in_plain_thread(holder) == 3
    assert in_callback(world.rt.main, lambda: world.own.call(needs_main())) == 3


# -- all at once ---------------------------------------------------------------------------------------------


def test_rule11_cycles_closed_from_all_sides_at_once(world: World, seed: int) -> None:
    """Each round two to four coroutines wait for the next at the same moment, in all manners: none hangs."""
    moves = random.Random(seed)
    contexts = [world.rt.main, world.own.context, world.other.context]
    rounds = refusals = 0
    end = time.monotonic() + STRESS_S
    while time.monotonic() < end or not rounds:
        size = moves.randint(2, 4)
        cos: list[homeloop.Coroutine[Any]] = []
        go = threading.Barrier(size)

        async def waits(number: int, by_worker: bool, cos: list[homeloop.Coroutine[Any]] = cos) -> Any:
            await homeloop.park()
            sought = cos[(number + 1) % len(cos)]
            return await homeloop.to_worker(sought.result) if by_worker else await sought

        def starts(co: homeloop.Coroutine[Any], go: threading.Barrier = go) -> None:
            wait(go)
            co.wake()

        cos += [moves.choice(contexts).spawn(waits(number, moves.random() < 0.5)) for number in range(size)]
        for thread in [Plain(starts, co) for co in cos]:
            thread.result()
        for co in cos:
            with pytest.raises(WouldDeadlock, match=HEAD):
                co.result(LIMIT_S)
            refusals += 1
        rounds += 1
    print(f"{rounds} rounds, {refusals} refusals")


class Legal:
    """Random waits, each for something older: there is never a cycle."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.moves = random.Random(seed)
        self.contexts = [world.rt.main, world.own.context, world.other.context]
        self.older: list[homeloop.Coroutine[Any]] = []
        self.wanted: list[int] = []

    async def step(self, plan: list[tuple[str, homeloop.Coroutine[Any]]]) -> int:
        total = 1
        for how, co in plan:
            if how == "await":
                total += min(1, await co)
            elif how == "job":
                total += min(1, await homeloop.to_worker(co.result))
            elif how == "call from a job":
                total += await homeloop.to_worker(self.world.rt.call, returned(int, 1))
            elif how == "lock in a job":
                total += await homeloop.to_worker(self.with_lock, co)
            else:
                await asyncio.sleep(0)
                total += 1
        return total

    def with_lock(self, co: homeloop.Coroutine[Any]) -> int:
        with self.world.rt.big_lock:
            return min(1, co.result())

    def grow(self) -> None:
        plan = []
        if self.older:
            hows = ["await", "job", "call from a job", "lock in a job", "sleep"]
            near = self.older[-20:]
            plan = [(self.moves.choice(hows), self.moves.choice(near)) for _ in range(self.moves.randrange(4))]
        self.older.append(self.moves.choice(self.contexts).spawn(self.step(plan)))
        self.wanted.append(1 + len(plan))


def test_rule11_random_legal_waits_are_never_refused(world: World, seed: int) -> None:
    end = time.monotonic() + STRESS_S
    while True:
        legal = Legal(world, seed)
        for _ in range(60):
            legal.grow()
        assert [co.result(2 * LIMIT_S) for co in legal.older] == legal.wanted
        seed += 1
        if time.monotonic() > end:
            return
