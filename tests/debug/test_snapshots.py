"""A snapshot shows contexts, what is parked with its reason and line, and the threads; it never waits."""

from __future__ import annotations

import asyncio

import homeloop
from homeloop.debug.snapshots import snapshot
from tests.core.bounded import asleep, holding


async def parks() -> None:
    await homeloop.park("the reason given")


async def waits() -> None:
    await asyncio.Event().wait()


def test_what_is_parked_and_why() -> None:
    with homeloop.Runtime(name="app") as rt, homeloop.IOThread("disk") as disk:
        parked = disk.spawn(parks(), name="the parked one")
        waiting = rt.main.spawn(waits(), name="the waiting one")
        asleep(disk.context)
        asleep(rt.main)
        text = snapshot()
        for wanted in ("<AioContext disk", "<AioContext app-main", "served by thread 'disk'", "the parked one",
                       "parked (the reason given)", "in parks", "the waiting one", "<BigLock of app-main free",
                       "thread 'MainThread':"):
            assert wanted in text, text
        assert "thread 'MainThread':" not in snapshot(threads=False)
        parked.cancel()
        waiting.cancel()
    assert "app-main" not in snapshot(threads=False)


def test_it_waits_for_no_lock() -> None:
    with homeloop.Runtime(name="app") as rt:
        with holding(rt.big_lock), rt.main.lock:
            assert "held by thread" in snapshot()
