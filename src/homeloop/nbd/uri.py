"""NBD URIs: where a server is and which export is meant. Pure text in, a value out, and back.

    nbd://host[:port]/export        nbd+unix:///export?socket=/path

Source: doc/uri.md of the NetworkBlockDevice/nbd project. The TLS schemes nbds and nbds+unix are refused by
name: they must not silently be taken as clear text.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from homeloop.nbd.protocol import PORT, pack_string

__all__ = ["NbdUri", "format_uri", "parse_uri"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdUri:
    """A server (a unix socket's path, or host and port) and an export's name on it, none of it quoted."""

    socket: str | None = None  # None: host and port hold; a leading NUL names an abstract socket
    host: str = "localhost"
    port: int = PORT
    export: str = ""

    def __str__(self) -> str:
        return format_uri(self)


def format_uri(uri: NbdUri) -> str:
    """Return the URI as text, percent-encoded."""
    export = quote(uri.export, safe="/")
    if uri.socket is not None:
        return f"nbd+unix:///{export}?socket={quote(uri.socket, safe='/')}"
    host = f"[{quote(uri.host, safe=':')}]" if ":" in uri.host else quote(uri.host, safe="")
    port = "" if uri.port == PORT else f":{uri.port}"
    return f"nbd://{host}{port}/{export}"


def parse_uri(text: str) -> NbdUri:
    """Return what a URI means. Raises ValueError, with the text, if it is no NBD URI that we can follow."""
    try:
        parts = urlsplit(text)
        port = parts.port if parts.port is not None else PORT
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        pack_string(export, "export name")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"NBD URI {text!r}: {error}") from error
    if parts.scheme in ("nbds", "nbds+unix"):
        raise ValueError(f"NBD URI {text!r} asks for TLS, which is not supported")
    if parts.scheme == "nbd":
        return NbdUri(host=unquote(parts.hostname or "localhost"), port=port, export=export)
    if parts.scheme == "nbd+unix":
        if parts.netloc:
            raise ValueError(f"NBD URI {text!r} names the host {parts.netloc!r}; nbd+unix:/// has none")
        # Not parse_qsl(): in a URI that is no HTML form, "+" is a plus sign.
        pairs = [pair.partition("=") for pair in parts.query.split("&")]
        sockets = [unquote(value) for key, _, value in pairs if key == "socket"]
        if len(sockets) != 1:
            raise ValueError(f"NBD URI {text!r} has {len(sockets)} socket= parameters, not one")
        return NbdUri(socket=sockets[0], export=export)
    raise ValueError(f"NBD URI {text!r}: scheme {parts.scheme!r} is none of nbd, nbd+unix")
