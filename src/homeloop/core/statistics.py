"""What a context counts."""

from __future__ import annotations

import dataclasses

__all__ = ["ContextStatistics", "Counters", "PollingStatistics"]


@dataclasses.dataclass(frozen=True, slots=True)
class PollingStatistics:
    """Whether looking for work before a sleep pays."""

    maximum_ns: int         # of a look
    duration_ns: int        # of the next look
    hits: int               # looks that found work
    misses: int             # looks that a sleep followed


@dataclasses.dataclass(frozen=True, slots=True)
class ContextStatistics:
    """What a context has done; counts since its start. A value, for any thread."""

    name: str
    entered: int            # wakes and starts that ran at once, on the waking thread
    scheduled: int          # wakes and starts that were queued to the home
    kicks: int              # system calls that ended a sleep of the home
    posted: int             # posted callbacks that have run
    calls_driven: int       # call(): ended in the calling thread, which served the loop meanwhile: no thread switch
    calls_handed_over: int  # call(): begun in the calling thread, ended at home
    coroutines: int         # suspended now
    polling: PollingStatistics | None       # None: adaptive polling is off
    workers: dict[str, int]


class Counters:
    """The mutable side of ContextStatistics. Each is written under the comment's protection."""

    __slots__ = ("calls_driven", "calls_handed_over", "entered", "posted", "scheduled")

    def __init__(self) -> None:
        self.entered = 0                # home or big lock
        self.scheduled = 0              # inbox lock
        self.posted = 0                 # home
        self.calls_driven = 0           # big lock
        self.calls_handed_over = 0      # big lock
