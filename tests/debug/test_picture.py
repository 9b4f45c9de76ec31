"""The picture as values: contexts, coroutines with reason and line, the big lock's holder and who waits for it."""

from __future__ import annotations

import asyncio
import json
import os
import threading

import homeloop
from homeloop.debug.picture import picture
from tests.core.bounded import asleep, holding, until


async def parks() -> None:
    await homeloop.park("the reason given")


async def waits() -> None:
    await asyncio.Event().wait()


def test_what_is_where() -> None:
    with homeloop.Runtime(name="app") as rt, homeloop.IOThread("disk") as disk:
        parked = disk.spawn(parks(), name="the parked one")
        waiting = rt.main.spawn(waits(), name="the waiting one")
        asleep(disk.context)
        asleep(rt.main)
        shown = picture()
        contexts = {context["name"]: context for context in shown["contexts"]}
        (task,) = contexts["disk"]["coroutines"]
        assert (task["name"], task["state"], task["reason"]) == ("the parked one", "parked", "the reason given")
        assert "in parks" in task["at"]
        assert contexts["disk"]["served_by"] == "disk"
        assert contexts["app-main"]["main"]
        assert contexts["app-main"]["big_lock"] == {"holder": None, "waiting": []}
        assert shown["pid"] == os.getpid()
        json.dumps(shown)
        parked.cancel()
        waiting.cancel()


def test_who_holds_the_big_lock_and_who_waits() -> None:
    """And it is told while the lock, and what guards it, are held."""
    with homeloop.Runtime(name="app") as rt:
        with holding(rt.big_lock):
            taker = threading.Thread(target=lambda: rt.big_lock.acquire() and rt.big_lock.release(), name="wants it")
            taker.start()
            until(lambda: "wants it" in lock_of("app-main")["waiting"])
            with rt.main.lock:
                assert lock_of("app-main")["holder"] is not None
        taker.join()


def lock_of(name: str) -> dict[str, object]:
    return next(context["big_lock"] for context in picture()["contexts"] if context["name"] == name)
