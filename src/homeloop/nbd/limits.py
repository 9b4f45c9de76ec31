"""What one client may occupy."""

from __future__ import annotations

from dataclasses import dataclass

from homeloop.nbd.protocol import PAYLOAD_BYTES_DEFAULT_MAX

__all__ = ["ConnectionLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What one client may occupy. Above a limit its requests wait; each may be passed by one request's payload."""

    requests_max: int = 256  # in flight: begun, waiting for the device
    payload_bytes_max: int = PAYLOAD_BYTES_DEFAULT_MAX  # of one READ or WRITE; what is advertised at most
    in_flight_bytes_max: int = 64 << 20  # payload of the requests in flight
    unsent_bytes_max: int = 2 << 20  # replies that the client does not take; more would leave the cache first
    unsent_pieces_max: int = 8192  # the same, counted: sixteen-byte replies have their overhead
    turn_requests_max: int = 256  # then others get their turn: about 1.5 ms of inline requests
    turn_bytes_max: int = 2 << 20
    linger_s: float = 10.0  # for the client to take its last replies
