"""What one client may occupy: test_connection_limits.py shows that it is kept; here, that the defaults make sense."""

from __future__ import annotations

from homeloop.nbd.limits import ConnectionLimits


def test_each_default_leaves_room_for_one_payload() -> None:
    limits = ConnectionLimits()
    assert limits.in_flight_bytes_max >= limits.payload_bytes_max
    assert limits.turn_bytes_max <= limits.unsent_bytes_max
