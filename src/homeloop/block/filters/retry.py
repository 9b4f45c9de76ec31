"""Requests that failed are asked again: for a device behind a network, or one with a cold."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from homeloop.block.device import Answer, Device
from homeloop.block.driver import Driver
from homeloop.block.filters.errnos import errno_of
from homeloop.block.filters.passing import Funnel
from homeloop.block.filters.requests import Request, perform
from homeloop.block.filters.steps import Steps, at_once
from homeloop.errors import BlockError, UsageError

__all__ = ["Retry"]


class Retry(Funnel):
    """Requests that fail with one of these errnos are asked again, up to `times` times, with longer and longer waits.

    delay_s: before the first repetition; doubled for each further one, up to delay_max_s. errnos: numbers or names.
    The last failure is the request's. Cancelled in a wait: it is not asked again. Home thread.
    """

    def __init__(
        self,
        driver: Driver | Device,
        *,
        times: int = 5,
        delay_s: float = 0.1,
        delay_max_s: float = 10.0,
        errnos: Iterable[int | str] = ("EIO", "ETIMEDOUT", "EAGAIN", "ECONNRESET"),
    ) -> None:
        if times < 0:
            raise UsageError(f"retry: times={times} is below 0")
        if not (0 <= delay_s < float("inf") and 0 <= delay_max_s < float("inf")):
            raise UsageError(f"retry: delay_s={delay_s}, delay_max_s={delay_max_s}: not times in seconds")
        self._times = times
        self._delay_s = delay_s
        self._delay_max_s = delay_max_s
        self._errnos = frozenset(errno_of(number) for number in errnos)
        self.retried = 0                # home; repetitions so far, of all requests
        super().__init__(driver)

    def ask(self, request: Request) -> Answer[Any]:
        return at_once(self._asking(request))

    def _asking(self, request: Request) -> Steps[Any]:
        delay_s = self._delay_s
        for _ in range(self._times):
            try:
                return (yield perform(self.inner, request))
            except BlockError as error:
                if error.errno not in self._errnos:
                    raise
            yield asyncio.sleep(min(delay_s, self._delay_max_s))
            delay_s *= 2
            self.retried += 1
        return (yield perform(self.inner, request))
