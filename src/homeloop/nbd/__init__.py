"""Network block devices: the protocol, a server and a client."""

from homeloop.nbd.client import Client
from homeloop.nbd.connecting import connect
from homeloop.nbd.credentials import TlsCredentials
from homeloop.nbd.nbd_driver import NbdDriver, open_nbd
from homeloop.nbd.reconnecting import ReconnectingClient
from homeloop.nbd.server import Server, ServerLimits
from homeloop.nbd.serving import serve

__all__ = [
    "Client",
    "NbdDriver",
    "ReconnectingClient",
    "Server",
    "ServerLimits",
    "TlsCredentials",
    "connect",
    "open_nbd",
    "serve",
]
