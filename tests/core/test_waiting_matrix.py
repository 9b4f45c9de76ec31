"""Rule 11 as one table: who may wait for whom, by which call; every other cell is refused at once, by name."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import WouldDeadlock
from tests.core.bounded import LIMIT_S, Plain, in_plain_thread, wait
from tests.core.places import PLACES, World, returned


@dataclasses.dataclass(frozen=True)
class Wide(World):
    """With a second runtime, whose main context is one more to wait for."""

    rt2: homeloop.Runtime


@pytest.fixture
def world() -> Iterator[Wide]:
    with homeloop.Runtime() as rt, homeloop.Runtime() as rt2:
        with homeloop.IOThread("io-own") as own, homeloop.IOThread("io-other") as other:
            yield Wide(rt=rt, own=own, other=other, rt2=rt2)


def on_a_worker(world: World, fn: Callable[[], Any]) -> Any:
    return world.own.spawn(homeloop.to_worker(fn)).result(2 * LIMIT_S)


def with_lock(lock: homeloop.BigLock, fn: Callable[[], Any]) -> Any:
    with lock:
        return fn()


def in_asyncio(fn: Callable[[], Any], *, adopted: bool) -> Any:
    async def main() -> Any:
        if adopted:
            homeloop.AioContext.of()
        return fn()

    return in_plain_thread(asyncio.run, main())


MORE: dict[str, Callable[[Wide, Callable[[], Any]], Any]] = {
    "plain with the other runtime's lock": lambda world, fn: in_plain_thread(with_lock, world.rt2.big_lock, fn),
    "worker": lambda world, fn: on_a_worker(world, fn),
    "worker with lock": lambda world, fn: on_a_worker(world, lambda: with_lock(world.rt.big_lock, fn)),
    "asyncio loop": lambda world, fn: in_asyncio(fn, adopted=False),
    "asyncio loop, adopted": lambda world, fn: in_asyncio(fn, adopted=True),
}
EVERYWHERE: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {**PLACES, **MORE}
TARGETS = ("main", "own", "other", "other runtime's main")


def may_wait(place: str) -> tuple[str, ...]:
    """The table."""
    if place == "asyncio loop, adopted":        # its loop cannot be served in the middle of a callback
        return ()
    if place.startswith("io"):
        return ("own",)
    return TARGETS


def context_of(world: Wide, target: str) -> homeloop.AioContext:
    contexts = (world.rt.main, world.own.context, world.other.context, world.rt2.main)
    return contexts[TARGETS.index(target)]


@dataclasses.dataclass
class Errand:
    """A coroutine that visits contexts: it ends only if all of them are served meanwhile."""

    contexts: list[homeloop.AioContext]
    ended: bool = False

    async def run(self) -> str:
        await asyncio.sleep(0)
        for context in self.contexts:
            await context.run(returned(lambda: None))
        self.ended = True
        homeloop.kick()
        return "errand done"


def wait_by(how: str, target: homeloop.AioContext, errand: Errand) -> object:
    if how == "call":
        coro = errand.run()
        try:
            return target.call(coro)
        except WouldDeadlock:
            assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
            raise
    co = target.spawn(errand.run())
    if how == "wait_while":
        assert target.wait_while(lambda: not errand.ended)
    return co.result()


@pytest.mark.parametrize("how", ["call", "result", "wait_while"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", list(EVERYWHERE))
def test_rule11_matrix(world: Wide, place: str, target: str, how: str) -> None:
    """Allowed: it ends, though the errand needs every loop. Refused: at once, and both sides are named."""
    context = context_of(world, target)
    visited = [context_of(world, name) for name in TARGETS]
    if place == "io with lock":                 # keeps the main loop out for as long as it waits
        visited.remove(world.rt.main)
    errand = Errand(visited)

    def waits() -> object:
        return wait_by(how, context, errand)

    if target in may_wait(place):
        assert EVERYWHERE[place](world, waits) == "errand done"
        return
    with pytest.raises(WouldDeadlock) as caught:
        EVERYWHERE[place](world, waits)
    here = "adopted-" if place.startswith("asyncio") else world.own.context.name
    assert here in str(caught.value)
    assert context.name in str(caught.value)


@pytest.mark.parametrize("place", list(EVERYWHERE))
def test_rule11_matrix_of_stop(world: Wide, place: str) -> None:
    """stop() waits for the end of another IOThread, which needs every loop for that."""
    doomed = homeloop.IOThread("doomed").start()
    begun = threading.Event()
    visited = [context_of(world, name) for name in TARGETS]
    if place == "io with lock":
        visited.remove(world.rt.main)

    async def ends_slowly() -> None:
        try:
            begun.set()
            await homeloop.park()
        finally:
            await Errand(visited).run()

    doomed.spawn(ends_slowly())
    wait(begun)
    try:
        if "own" in may_wait(place) and not place.startswith("io"):
            EVERYWHERE[place](world, doomed.stop)
            assert doomed.context.closed
            return
        with pytest.raises(WouldDeadlock) as caught:
            EVERYWHERE[place](world, doomed.stop)
        assert ("adopted-" if place.startswith("asyncio") else "io-own") in str(caught.value)
        assert "doomed" in str(caught.value)
        assert doomed.call(returned(int)) == 0          # nothing has changed by it
    finally:
        doomed.stop()


@pytest.mark.parametrize("place", ["io callback", "io coroutine", "io with lock", "worker", "worker with lock"])
def test_rule11_matrix_of_stop_from_inside(world: Wide, place: str) -> None:
    """An IOThread, and a worker of it, would wait for their own end."""
    with pytest.raises(WouldDeadlock, match=r"io-own.* own (end|pool)"):
        EVERYWHERE[place](world, world.own.stop)
    assert world.own.call(returned(int)) == 0


def test_rule11_a_refusal_is_at_once(world: Wide) -> None:
    """Nothing is waited for first: the target's loop stands still, and the refusal comes nevertheless."""
    end = threading.Event()
    begun = threading.Event()

    def stands_still() -> None:
        begun.set()
        wait(end)

    world.other.post(stands_still)
    wait(begun)
    try:
        for how in ("call", "result", "wait_while"):
            def waits(how: str = how) -> object:
                return wait_by(how, world.other.context, Errand([]))

            with pytest.raises(WouldDeadlock):
                Plain(EVERYWHERE["io callback"], world, waits).result()
    finally:
        end.set()
