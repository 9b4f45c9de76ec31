"""homeloop's loop in the place of asyncio's, for suites that know nothing of it: CPython's own and our peers'."""

from __future__ import annotations

import asyncio
import asyncio.unix_events
from typing import Any

from homeloop.core.loop import HomeLoop
from homeloop.core.runtime import new_event_loop

made: list[int] = []        # one entry per loop


class _MakesOurs(type):
    """Of a class that stands for another: calling it makes a loop of ours, and those are its instances."""

    def __call__(cls, selector: Any = None) -> Any:
        if selector is not None:
            selector.close()            # ours stays
        made.append(1)
        return new_event_loop()

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, HomeLoop)


class SelectorEventLoop(metaclass=_MakesOurs):
    """Stands for asyncio.SelectorEventLoop, by whose name pytest calls some tests."""


SelectorEventLoop.__name__ = asyncio.SelectorEventLoop.__name__


def replace_loops() -> None:
    """Let every way to make a loop lead to ours: by class, by policy, by Runner and asyncio.run."""
    names: Any = asyncio
    names.SelectorEventLoop = SelectorEventLoop
    if hasattr(names, "EventLoop"):                                 # 3.13
        names.EventLoop = SelectorEventLoop
    policy: Any = asyncio.unix_events._UnixDefaultEventLoopPolicy   # type: ignore[attr-defined]
    policy._loop_factory = SelectorEventLoop
