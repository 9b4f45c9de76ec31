"""Where a Coroutine is, and all moves that it may make: one table (see Coroutine for who makes which).

Nothing checks it on the hot path: a step costs half a microsecond, and a look at a table would be a tenth of that.
tests/core/test_states.py runs everything that moves coroutines with each move checked.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Set
from typing import Final

__all__ = ["NEXT", "CoroutineState"]


class CoroutineState(enum.Enum):
    """Where a Coroutine is. The values are for people; any thread may look."""

    CREATED = "created"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    PARKED = "parked"
    WAITING = "waiting"
    DONE = "done"


_S = CoroutineState
# Who starts or ends one that was CREATED only makes it SCHEDULED first, under the lock: then it is his. PARKED and
# WAITING are abandoned where the end of a context is cut short.
NEXT: Final[Mapping[CoroutineState, Set[CoroutineState]]] = {
    _S.CREATED: frozenset({_S.SCHEDULED}),
    _S.SCHEDULED: frozenset({_S.RUNNING, _S.DONE}),
    _S.RUNNING: frozenset({_S.PARKED, _S.WAITING, _S.SCHEDULED, _S.DONE}),
    _S.PARKED: frozenset({_S.SCHEDULED, _S.DONE}),
    _S.WAITING: frozenset({_S.RUNNING, _S.DONE}),
    _S.DONE: frozenset(),
}
