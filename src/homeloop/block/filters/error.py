"""Requests that fail, plainly: an errno for those of some kinds. homeloop.block.faults can do more."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from homeloop.block.device import Answer, Device
from homeloop.block.driver import Driver
from homeloop.block.filters.errnos import errno_of
from homeloop.block.filters.passing import Funnel
from homeloop.block.filters.requests import Request, kinds_of, perform
from homeloop.errors import BlockError, UsageError

__all__ = ["Error"]


class Error(Funnel):
    """Requests of these kinds fail with this errno, and are not passed on.

    errno: a number or a name. kinds: one or several, None for all. at: (start, stop), only those that touch these
    bytes; flushes touch none. share: this part of them, 0 to 1, drawn in the order of the requests from `seed`.
    Home thread.
    """

    def __init__(
        self,
        driver: Driver | Device,
        errno: int | str = "EIO",
        *,
        kinds: str | Iterable[str] | None = None,
        at: tuple[int, int] | None = None,
        share: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= share <= 1:
            raise UsageError(f"error: share={share} is not from 0 to 1")
        self._errno = errno_of(errno)
        self._kinds = kinds_of(kinds)
        self._at = at
        self._share = share
        self._chance = random.Random(seed)
        super().__init__(driver)

    def ask(self, request: Request) -> Answer[Any]:
        if (
            request.kind in self._kinds
            and (self._at is None or request.overlaps(*self._at))
            and (self._share == 1 or self._chance.random() < self._share)
        ):
            raise BlockError(self._errno, f"{request}: injected by the error filter")
        return perform(self.inner, request)
