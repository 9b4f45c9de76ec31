"""The states of a connection, and which may follow which."""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["NEXT", "State"]


class State(Enum):
    """See the picture in connection.py."""

    NEW = "new"
    OPEN = "open"
    DRAINING = "draining"
    ENDING = "ending"
    CLOSED = "closed"


NEXT: Final = {
    State.NEW: {State.OPEN, State.ENDING},
    State.OPEN: {State.DRAINING, State.ENDING},
    State.DRAINING: {State.ENDING},
    State.ENDING: {State.CLOSED},
    State.CLOSED: set(),
}
