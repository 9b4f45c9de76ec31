"""Adaptive polling: how long a context looks for work before it sleeps (rule 15).

A sleep and a wake cost some ten microseconds; work that comes sooner is better waited for awake. How long to
look is learned from how long the waits were. Values in, values out: no clock, no selector. Source: QEMU's
util/aio-posix.c of 2025 (grow and shrink rule), with one duration per context as in 2021.
"""

from __future__ import annotations

import sys

from homeloop.core.statistics import PollingStatistics

__all__ = ["POLL_MAX_NS", "AdaptivePolling", "default_poll_max_ns"]

POLL_MAX_NS = 32_768            # QEMU's default for an IOThread
FIRST_NS = 4_000                # QEMU's first duration
GROW = 2                        # QEMU's default factor


def default_poll_max_ns() -> int:
    """POLL_MAX_NS in an interpreter without a GIL; 0, off, in others: who looks holds the GIL most of the time,
    and so keeps away the very thread that would bring the work."""
    gil = getattr(sys, "_is_gil_enabled", None)
    return POLL_MAX_NS if gil is not None and not gil() else 0


class AdaptivePolling:
    """The duration of one context's looks, in nanoseconds, and whether they pay. Home thread only.

    maximum: 0 switches it off. grow: the factor, 0 for 2. shrink: the divisor, 0 to go straight to 0.
    """

    __slots__ = ("duration", "grow", "hits", "maximum", "misses", "shrink")

    def __init__(self, maximum: int, grow: int = 0, shrink: int = 0) -> None:
        self.maximum = maximum
        self.grow = grow or GROW
        self.shrink = shrink
        self.duration = 0               # of the next look
        self.hits = 0                   # looks that found work
        self.misses = 0                 # looks that a sleep followed

    def statistics(self) -> PollingStatistics:
        """Does it pay? Any thread."""
        return PollingStatistics(self.maximum, self.duration, self.hits, self.misses)

    def learn(self, waited: int) -> None:
        """A wait is over that took `waited` ns, from the begin of the look to the work, asleep or not."""
        if waited <= self.duration:
            return                                              # it pays as it is
        if waited > self.maximum:
            # No look that we allow would have met it.
            self.duration = self.duration // self.shrink if self.shrink else 0
        elif self.duration < self.maximum:
            self.duration = min(self.maximum, self.duration * self.grow if self.duration else FIRST_NS)
