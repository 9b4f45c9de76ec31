"""connect(): the one name for both clients, the one that ends with its connection and the one that does not."""

from __future__ import annotations

from typing import overload

from homeloop.nbd import client
from homeloop.nbd.attempt import ATTEMPT_S
from homeloop.nbd.client import IN_FLIGHT_MAX, Connecting
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.reconnecting import ReconnectingClient
from homeloop.nbd.uri import NbdUri

__all__ = ["connect"]


@overload
def connect(
    uri: str | NbdUri, *, in_flight_max: int = IN_FLIGHT_MAX, tls: TlsCredentials | None = None
) -> Connecting: ...


@overload
def connect(
    uri: str | NbdUri,
    *,
    in_flight_max: int = IN_FLIGHT_MAX,
    tls: TlsCredentials | None = None,
    reconnect_delay: float,
    open_timeout: float = 0.0,
    attempt_timeout: float = ATTEMPT_S,
    reply_timeout: float | None = None,
    server_keeps_writes: bool = False,
) -> ReconnectingClient: ...


def connect(
    uri: str | NbdUri,
    *,
    in_flight_max: int = IN_FLIGHT_MAX,
    tls: TlsCredentials | None = None,
    reconnect_delay: float | None = None,
    open_timeout: float = 0.0,
    attempt_timeout: float = ATTEMPT_S,
    reply_timeout: float | None = None,
    server_keeps_writes: bool = False,
) -> Connecting | ReconnectingClient:
    """Connect to an export: `await connect(uri)`, or `async with connect(uri) as disk`.

    Without reconnect_delay: a Client, which ends with its connection. With it: a ReconnectingClient, which connects
    again, and whose requests wait so many seconds for that; the other options are for it alone. The two have the same
    requests. Errors: see homeloop.nbd.client.connect and ReconnectingClient.
    """
    if reconnect_delay is None:
        return client.connect(uri, in_flight_max=in_flight_max, tls=tls)
    return ReconnectingClient(
        uri,
        reconnect_delay=reconnect_delay,
        open_timeout=open_timeout,
        attempt_timeout=attempt_timeout,
        reply_timeout=reply_timeout,
        server_keeps_writes=server_keeps_writes,
        in_flight_max=in_flight_max,
        tls=tls,
    )
