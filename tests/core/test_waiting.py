"""Waiting from synchronous code: who may wait for whom (rule 11), result(), wait_while() and kick()."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import homeloop
from homeloop.errors import WouldDeadlock
from tests.core.bounded import LIMIT_S, Plain, in_plain_thread, wait
from tests.core.places import PLACES, Slow, World, at, returned


@pytest.fixture
def world() -> Iterator[World]:
    with homeloop.Runtime() as rt, homeloop.IOThread("io-own") as own, homeloop.IOThread("io-other") as other:
        yield World(rt=rt, own=own, other=other)


class Boom(Exception):
    pass


# Rule 11: who may wait for whom

MAY_WAIT = {place: ({"own"} if place.startswith("io") else {"main", "own", "other"}) for place in PLACES}


@dataclasses.dataclass
class Errand:
    """A coroutine that visits contexts: it ends only if all of them are served meanwhile."""

    contexts: tuple[homeloop.AioContext, ...]
    ended: bool = False

    async def run(self) -> str:
        await asyncio.sleep(0)
        for context in self.contexts:
            await context.run(returned(lambda: None))
        self.ended = True
        homeloop.kick()
        return "errand done"


def errand_in(world: World, place: str = "") -> Errand:
    """One that needs every loop; but who holds the big lock in an IOThread keeps the main loop out."""
    contexts = (world.rt.main, world.own.context, world.other.context)
    return Errand(contexts[1:] if place == "io with lock" else contexts)


def wait_by(how: str, target: homeloop.AioContext, errand: Errand) -> object:
    if how == "call":
        return target.call(errand.run(), timeout=LIMIT_S)
    co = target.spawn(errand.run())
    if how == "wait_while":
        assert target.wait_while(lambda: not errand.ended, LIMIT_S)
    return co.result(LIMIT_S)


@pytest.mark.parametrize("how", ["call", "result", "wait_while"])
@pytest.mark.parametrize("target", ["main", "own", "other"])
@pytest.mark.parametrize("place", list(PLACES))
def test_rule11_matrix(world: World, place: str, target: str, how: str) -> None:
    """Allowed: it ends, though the errand needs every loop. Refused: at once, and both sides are named."""
    context = {"main": world.rt.main, "own": world.own.context, "other": world.other.context}[target]
    errand = errand_in(world, place)

    def waits() -> object:
        return wait_by(how, context, errand)

    if target in MAY_WAIT[place]:
        assert at(world, place, waits) == "errand done"
        return
    with pytest.raises(WouldDeadlock) as caught:
        at(world, place, waits)
    assert world.own.context.name in str(caught.value)
    assert context.name in str(caught.value)


@pytest.mark.parametrize("target", ["main", "other"])
def test_rule11_a_refused_call_closes_its_coroutine(world: World, target: str) -> None:
    """No "never awaited" follows WouldDeadlock, and nothing of the coroutine has run."""
    context = world.rt.main if target == "main" else world.other.context
    ran: list[int] = []
    coro = returned(lambda: ran.append(1))
    with pytest.raises(WouldDeadlock):
        at(world, "io callback", lambda: context.call(coro))
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert ran == []


@pytest.mark.parametrize("place", ["main coroutine", "io coroutine", "plain in driven coroutine"])
def test_rule11_waiting_for_oneself(world: World, place: str) -> None:
    """A coroutine that waits for its own end is refused at once, by name."""

    def waits() -> None:
        me = homeloop.current_coroutine()
        assert me is not None
        me.result()

    with pytest.raises(WouldDeadlock, match="itself"):
        at(world, place, waits)


@pytest.mark.parametrize("place", ["main", "own"])
def test_rule11_waiting_for_who_waits_below(world: World, place: str) -> None:
    """A waits for B on this stack; B, served by that wait, may not wait for A."""
    context = world.rt.main if place == "main" else world.own.context
    refused: list[str] = []

    async def outer() -> str:
        me = homeloop.current_coroutine()
        assert me is not None
        return context.spawn(inner(me)).result(LIMIT_S)

    async def inner(below: homeloop.Coroutine[Any]) -> str:
        try:
            below.result(LIMIT_S)
        except WouldDeadlock as exc:
            refused.append(str(exc))
        return "told"

    assert context.spawn(outer()).result(LIMIT_S) == "told"
    assert len(refused) == 1


def test_rule11_result_of_what_has_ended_is_for_everybody(world: World) -> None:
    """Nothing is waited for: an IOThread too may ask for the result of another context's coroutine."""
    co = world.rt.main.spawn(returned(lambda: 7))
    assert co.result(LIMIT_S) == 7
    assert at(world, "io coroutine", co.result) == 7


def test_rule11_result_timeout_leaves_the_coroutine_alone(world: World) -> None:
    """TimeoutError from result() does not cancel."""
    it = Slow()
    co = world.rt.main.spawn(it.run())
    for place in ("plain", "main callback", "main coroutine"):
        with pytest.raises(TimeoutError):
            at(world, place, lambda: co.result(0.002))
    assert not co.done()
    assert it.log == []


# wait_while and kick


def kicked(change: Callable[[], object]) -> None:
    change()
    homeloop.kick()


@pytest.mark.parametrize("place", list(PLACES))
def test_rule11_wait_while_false_at_once(world: World, place: str) -> None:
    """A predicate that is false already is asked once, and nothing is waited for."""
    asked: list[int] = []
    context = world.own.context
    assert at(world, place, lambda: context.wait_while(lambda: asked.append(1), 0)) is True
    assert asked == [1]


@pytest.mark.parametrize("place", list(PLACES))
def test_rule11_wait_while_times_out(world: World, place: str) -> None:
    """False after `timeout` seconds, not before."""
    begun = time.monotonic()
    assert at(world, place, lambda: world.own.context.wait_while(lambda: True, 0.01)) is False
    assert time.monotonic() - begun >= 0.01


@pytest.mark.parametrize("place", list(PLACES))
def test_rule11_kick_between_look_and_sleep(world: World, place: str) -> None:
    """A kick that comes when the waiter has looked and does not sleep yet is not lost.

        waiter                          other
        1 predicate(): true, wait on
                                        2 makes it false, kicks
        3 must not sleep on
    """
    true: list[bool] = [True]

    def predicate() -> bool:
        seen = bool(true)
        if seen:
            in_plain_thread(kicked, true.clear)
        return seen

    assert at(world, place, lambda: world.own.context.wait_while(predicate, LIMIT_S)) is True


@pytest.mark.parametrize("place", list(PLACES))
def test_rule11_kick_ends_a_sleep(world: World, place: str) -> None:
    """A kick from a plain thread makes a sleeping, or serving, waiter look again."""
    looked = threading.Event()
    true: list[bool] = [True]

    def predicate() -> bool:
        looked.set()
        return bool(true)

    def kicker() -> None:
        wait(looked)
        kicked(true.clear)

    thread = Plain(kicker)
    assert at(world, place, lambda: world.own.context.wait_while(predicate, LIMIT_S)) is True
    thread.result()


def test_rule11_kick_without_waiters() -> None:
    """It is for any thread, and does nothing."""
    homeloop.kick()


def test_rule11_wait_while_raises_what_the_predicate_raises(world: World) -> None:
    """The error comes out, and the context is in order afterwards."""

    def predicate() -> bool:
        raise Boom("predicate")

    for place in PLACES:
        with pytest.raises(Boom):
            at(world, place, lambda: world.own.context.wait_while(predicate, LIMIT_S))
    assert world.rt.call(returned(lambda: 1)) == 1


def test_rule11_every_waiter_is_kicked(world: World) -> None:
    """One kick is for all who wait, each with its own predicate."""
    gone: list[bool] = []
    looked = [threading.Event() for _ in range(4)]

    def waiter(number: int) -> bool:
        def predicate() -> bool:
            looked[number].set()
            return not gone
        return world.own.context.wait_while(predicate, LIMIT_S)

    threads = [Plain(waiter, number) for number in range(4)]
    for event in looked:
        wait(event)
    kicked(lambda: gone.append(True))
    assert [thread.result() for thread in threads] == [True] * 4


def test_rule11_home_away_while_a_holder_waits(world: World) -> None:
    """The home gave the lock up in released(): who waits for main as the holder serves it meanwhile.

        home                            plain thread
        1 released(), blocks
                                        2 takes the lock, waits for a main coroutine, serves main
        4 goes on                       3 has the result, lets it go
    """
    main, lock = world.rt.main, world.rt.big_lock
    inside, back = threading.Event(), threading.Event()

    def away() -> str:
        with lock.released():
            inside.set()
            wait(back, lock)
        return "back"

    home = main.spawn(returned(away))
    wait(inside, main)

    def caller() -> str:
        with lock:
            return main.spawn(errand_in(world).run()).result(LIMIT_S)

    try:
        assert in_plain_thread(caller) == "errand done"
    finally:
        back.set()
    assert home.result(LIMIT_S) == "back"
