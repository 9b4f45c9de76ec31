"""What is counted of a connection."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ConnectionStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionStatistics:
    """One moment of one connection; counts are since its start."""

    peer: str
    tls: str | None  # its version, as in "TLSv1.3"; None: in the clear
    replies: str  # "simple", "structured" or "extended"
    requests: int  # answered or in flight
    errors: int  # of them, answered with an error
    received_bytes: int
    sent_bytes: int
    in_flight: int
    unsent_bytes: int
    buffered_bytes: int  # received, of requests that are not all there or have not begun
    paused: int  # how often back-pressure stopped the reading
