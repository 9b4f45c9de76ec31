"""Asking a running program: pictures of its contexts, as text or values, from inside or over a socket."""

from homeloop.debug.listening import Listening, listen
from homeloop.debug.picture import picture
from homeloop.debug.snapshots import snapshot

__all__ = ["Listening", "listen", "picture", "snapshot"]
