"""NBD URIs: where a server is and which export is meant. Pure text in, a value out, and back.

    nbd://host[:port]/export        nbd+unix:///export?socket=/path
    nbds://[user@]host[:port]/export?tls-certificates=/folder       nbds+unix://[user@]/export?socket=/path&...

nbds means that nothing is said in clear. Source: doc/uri.md of the NetworkBlockDevice/nbd project; tls-certificates,
tls-psk-file and tls-username are libnbd's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

from homeloop.nbd.protocol import PORT, pack_string

__all__ = ["NbdUri", "format_uri", "parse_uri"]

_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_TEXTS: Final = {  # query parameter -> field
    "tls-type": "tls_type",
    "tls-hostname": "tls_hostname",
    "tls-certificates": "tls_certificates",
    "tls-psk-file": "tls_psk_file",
    "tls-username": "username",
}
_TLS_TYPES: Final = ("x509", "psk")
_BOOLEANS: Final = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdUri:
    """A server (a unix socket's path, or host and port) and an export's name on it, none of it quoted."""

    socket: str | None = None  # None: host and port hold; a leading NUL names an abstract socket
    host: str = "localhost"
    port: int = PORT
    export: str = ""
    tls: bool = False  # it must be; the rest is of use only then
    username: str | None = None  # of a pre-shared key
    tls_type: str | None = None  # x509 or psk; None: as the other parameters have it
    tls_hostname: str | None = None  # to look for in the server's certificate; None: `host`, on TCP
    tls_verify_peer: bool = True
    tls_certificates: str | None = None  # a folder
    tls_psk_file: str | None = None

    def __str__(self) -> str:
        return format_uri(self)


def format_uri(uri: NbdUri) -> str:
    """Return the URI as text, percent-encoded."""
    scheme = "nbds" if uri.tls else "nbd"
    export = quote(uri.export, safe="/")
    query = [] if uri.socket is None else [f"socket={quote(uri.socket, safe='/')}"]
    user = ""
    if uri.tls:
        user = "" if uri.username is None else f"{quote(uri.username, safe='')}@"
        for key, field in _TEXTS.items():
            value = getattr(uri, field)
            if value is not None and field != "username":
                query.append(f"{key}={quote(value, safe='/')}")
        if not uri.tls_verify_peer:
            query.append("tls-verify-peer=0")
    behind = f"?{'&'.join(query)}" if query else ""
    if uri.socket is not None:
        return f"{scheme}+unix://{user}/{export}{behind}"
    host = f"[{quote(uri.host, safe=':')}]" if ":" in uri.host else quote(uri.host, safe="")
    port = "" if uri.port == PORT else f":{uri.port}"
    return f"{scheme}://{user}{host}{port}/{export}{behind}"


def parse_uri(text: str) -> NbdUri:
    """Return what a URI means. Raises ValueError, with the text, if it is no NBD URI that we can follow."""
    try:
        parts = urlsplit(text)
        port = parts.port if parts.port is not None else PORT
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        pack_string(export, "export name")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"NBD URI {text!r}: {error}") from error
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"NBD URI {text!r}: scheme {parts.scheme!r} is none of {', '.join(_SCHEMES)}")
    # Not parse_qsl(): in a URI that is no HTML form, "+" is a plus sign.
    query = [(key, unquote(value)) for key, _, value in (pair.partition("=") for pair in parts.query.split("&"))]
    tls = _tls_fields(text, parts, query) if parts.scheme.startswith("nbds") else {}
    if not parts.scheme.endswith("+unix"):
        host = unquote(parts.hostname or "localhost")
        return NbdUri(host=host, port=port, export=export, **tls)  # type: ignore[arg-type]
    if parts.netloc.rpartition("@")[2] or (parts.netloc and not tls):
        raise ValueError(f"NBD URI {text!r} names the host {parts.netloc!r}; {parts.scheme}:/// has none")
    sockets = [value for key, value in query if key == "socket"]
    if len(sockets) != 1:
        raise ValueError(f"NBD URI {text!r} has {len(sockets)} socket= parameters, not one")
    return NbdUri(socket=sockets[0], export=export, **tls)  # type: ignore[arg-type]


def _tls_fields(text: str, parts: SplitResult, query: list[tuple[str, str]]) -> dict[str, object]:
    """What nbds says of TLS. A parameter of TLS that is not understood must not be passed over: it may be a demand."""
    fields: dict[str, object] = {"tls": True}
    if parts.username is not None:
        fields["username"] = unquote(parts.username)
    for key, value in query:
        if key == "tls-verify-peer":
            if value.lower() not in _BOOLEANS:
                raise ValueError(f"NBD URI {text!r}: tls-verify-peer={value!r} is neither 0 nor 1")
            fields["tls_verify_peer"] = _BOOLEANS[value.lower()]
        elif key in _TEXTS:
            fields[_TEXTS[key]] = value
        elif key.startswith("tls-"):
            raise ValueError(f"NBD URI {text!r}: parameter {key!r} is not known")
    if fields.get("tls_type", "x509") not in _TLS_TYPES:
        raise ValueError(f"NBD URI {text!r}: tls-type={fields['tls_type']!r} is none of {', '.join(_TLS_TYPES)}")
    if fields.get("tls_type") == "psk" and "tls_psk_file" not in fields:
        raise ValueError(f"NBD URI {text!r}: tls-type=psk without a tls-psk-file")
    return fields
