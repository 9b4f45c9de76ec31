"""Slowness on purpose: each request waits before it is passed on."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from homeloop.block.device import Answer, Device
from homeloop.block.driver import Driver
from homeloop.block.filters.passing import Funnel
from homeloop.block.filters.requests import KINDS, Request, perform
from homeloop.block.filters.steps import Steps, at_once
from homeloop.errors import UsageError

__all__ = ["Delay"]


class Delay(Funnel):
    """Requests wait for a fixed time by their kind, and up to `jitter` seconds more; requests wait side by side.

    read, write: seconds for these; write is for trim, write_zeroes and flush, too. fixed: for every request, on top.
    jitter: each waits for a random part of it as well, drawn in the order of the requests from `seed`. Who waits for
    no time at all is passed on at once. Cancelled in its wait: it is not passed on. Home thread.
    """

    def __init__(
        self,
        driver: Driver | Device,
        *,
        read: float = 0.0,
        write: float = 0.0,
        fixed: float = 0.0,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        for name, seconds in (("read", read), ("write", write), ("fixed", fixed), ("jitter", jitter)):
            if not 0 <= seconds < float("inf"):
                raise UsageError(f"delay: {name}={seconds} is not a time in seconds")
        super().__init__(driver)
        reads = ("read", "cache", "extents")
        self._seconds = {kind: fixed + (read if kind in reads else write) for kind in KINDS}
        self._jitter = jitter
        self._chance = random.Random(seed)

    def ask(self, request: Request) -> Answer[Any]:
        seconds = self._seconds[request.kind]
        if self._jitter:
            seconds += self._chance.random() * self._jitter
        if not seconds:
            return perform(self.inner, request)
        return at_once(self._delayed(request, seconds))

    def _delayed(self, request: Request, seconds: float) -> Steps[Any]:
        yield asyncio.sleep(seconds)
        return (yield perform(self.inner, request))
