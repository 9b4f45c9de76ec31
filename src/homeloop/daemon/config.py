"""The configuration file of `homeloop serve --config`: what may stand in it, and all that is wrong with one at once.

    [daemon]  control, watchdog-s, ...          [[listen]]  socket, or host and port
    [limits]  connections, ...                  [tls]  certificates or psk, verify-peer
    [iothreads.NAME]  poll-max-ns, ...          [nodes.NAME]  driver and its options, as blockdev-add takes them
    [exports.NAME]  node or source, ...

Nothing is opened here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from homeloop.block.filters.specs import parse_filter
from homeloop.block.opening import parse_size
from homeloop.daemon.exporting import ListenConfig
from homeloop.daemon.iothreads import PROPERTIES
from homeloop.daemon.kinds import KINDS, NODE_OPTIONS
from homeloop.daemon.nodes import NAME_BYTES_MAX, is_identifier
from homeloop.daemon.qmp.arguments import ArgumentError
from homeloop.daemon.toml_lines import KeyPath, line_of, lines_of
from homeloop.errors import UsageError
from homeloop.nbd.limits import ConnectionLimits
from homeloop.nbd.server import ServerLimits

__all__ = ["CONFIG_BYTES_MAX", "ConfigError", "ConfiguredExport", "ServeConfig", "TlsConfig", "read_config"]

CONFIG_BYTES_MAX: Final = 1 << 20


class ConfigError(UsageError):
    """The file cannot be used; one line of text for each thing that is wrong, each with its line and key."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """What TlsCredentials.for_server() takes."""

    certificates: str | None = None
    psk: str | None = None
    verify_peer: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfiguredExport:
    """One export: a node by its name, or a source as on the command line."""

    name: str
    node: str | None = None
    source: str | None = None
    filters: tuple[str, ...] = ()
    size: int | None = None
    writable: bool = True
    description: str = ""
    iothread: str | None = None
    tls_only: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A whole file, checked."""

    exports: tuple[ConfiguredExport, ...] = ()
    nodes: tuple[dict[str, Any], ...] = ()          # as blockdev-add takes them; each behind those that it names
    iothreads: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    listen: tuple[ListenConfig, ...] = ()
    limits: ServerLimits = dataclasses.field(default_factory=ServerLimits)
    tls: TlsConfig | None = None
    control: str | None = None
    switch_interval_ms: float | None = None


def read_config(text: str, name: str) -> ServeConfig:
    """Check the text of a file. ConfigError with all that is wrong; `name` is the file's, for its lines."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line ([0-9]+), column [0-9]+|end of document)\)$", str(error))
        line = int(place[1]) if place is not None and place[1] else text.count("\n") + 1
        said = str(error)[:place.start()] if place is not None else str(error)
        raise ConfigError(f"{name}:{line}: {said}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}:1: nested too deep") from error
    checker = _Checker(values, lines_of(text))
    config = checker.config()
    if checker.problems:
        raise ConfigError("\n".join(
            f"{name}:{line}: {_shown(path)}{says}" for line, path, says in sorted(checker.problems)
        ))
    return config


def _shown(path: KeyPath) -> str:
    return f"{'.'.join(str(part) for part in path)}: " if path else ""


Check = Callable[[Any], Any]        # raises UsageError for a value that is none


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError("must be a text that is not empty")
    return value


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError("must be a text")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError("must be true or false")
    return value


def _number(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UsageError(f"must be a whole number from {low} to {high}")
        return value
    return check


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise UsageError("must be a number above 0")
    return float(value)


def _seconds_or_never(value: Any) -> float | None:
    return _seconds(value) if value else None       # 0: never


def _size(value: Any) -> int:
    if isinstance(value, str):
        return parse_size(value)
    return int(_number(0, (1 << 63) - 1)(value))


def _filters(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UsageError("must be a list of texts, such as [\"delay:read=5ms\"]")
    for text in value:
        parse_filter(text)
    return tuple(value)


_DAEMON: Final[dict[str, Check]] = {
    "control": _text, "switch-interval-ms": _seconds, "watchdog-s": _seconds_or_never,
}
_LISTEN: Final[dict[str, Check]] = {"socket": _text, "host": _text, "port": _number(0, 65535)}
_TLS: Final[dict[str, Check]] = {"certificates": _text, "psk": _text, "verify-peer": _switch}
_SERVER_LIMITS: Final[dict[str, tuple[str, Check]]] = {
    "connections": ("connections_max", _number(1, 1 << 20)), "handshake-s": ("handshake_s", _seconds),
    "all-in-flight-bytes": ("in_flight_bytes_max", _size),
    "stalled-s": ("stalled_s", _seconds_or_never), "idle-s": ("idle_s", _seconds_or_never),
}
_CONNECTION_LIMITS: Final[dict[str, tuple[str, Check]]] = {
    "requests": ("requests_max", _number(1, 1 << 20)),
    "in-flight-bytes": ("in_flight_bytes_max", _size), "unsent-bytes": ("unsent_bytes_max", _size),
}
_IOTHREAD: Final[dict[str, Check]] = {name: _number(0, (1 << 63) - 1) for name in PROPERTIES}
_EXPORT: Final[dict[str, Check]] = {
    "node": _text, "source": _text, "filters": _filters, "size": _size, "writable": _switch,
    "description": _any_text, "iothread": _text, "tls-only": _switch,
}
_TOP: Final = ("daemon", "listen", "limits", "tls", "iothreads", "nodes", "exports")


class _Checker:
    """Goes through one file and notes what is wrong; what is right is in the ServeConfig."""

    def __init__(self, values: dict[str, Any], lines: dict[KeyPath, int]) -> None:
        self.problems: list[tuple[int, KeyPath, str]] = []
        self._values = values
        self._lines = lines

    def config(self) -> ServeConfig:
        self._known(self._values, (), _TOP)
        daemon = self._section("daemon", _DAEMON)
        iothreads = {
            name: self._checked(table, ("iothreads", name), _IOTHREAD)
            for name, table in self._tables("iothreads")
        }
        nodes = self._nodes()
        return ServeConfig(
            exports=self._exports({node["node-name"] for node in nodes}, iothreads),
            nodes=nodes, iothreads=iothreads, listen=self._listen(), limits=self._limits(daemon),
            tls=self._tls(),
            control=daemon.get("control"), switch_interval_ms=daemon.get("switch-interval-ms"),
        )

    # -- parts ---------------------------------------------------------------------------------------------

    def _listen(self) -> tuple[ListenConfig, ...]:
        value = self._values.get("listen", [])
        if not isinstance(value, list):
            self._wrong(("listen",), "must be written [[listen]], once for each address")
            return ()
        found = []
        for index, table in enumerate(value):
            path: KeyPath = ("listen", index)
            checked = self._checked(table, path, _LISTEN)
            if ("socket" in checked) == ("port" in checked) or ("socket" in checked and "host" in checked):
                self._wrong(path, "needs a socket, or a port and perhaps a host")
            found.append(ListenConfig(**checked))
        return tuple(found)

    def _limits(self, daemon: Mapping[str, Any]) -> ServerLimits:
        both = _SERVER_LIMITS | _CONNECTION_LIMITS
        checked = self._section("limits", {name: check for name, (_field, check) in both.items()})
        connection = {field: checked[name] for name, (field, _) in _CONNECTION_LIMITS.items() if name in checked}
        server = {field: checked[name] for name, (field, _) in _SERVER_LIMITS.items() if name in checked}
        if "watchdog-s" in daemon:
            server["blocked_s"] = daemon["watchdog-s"]
        return ServerLimits(connection=ConnectionLimits(**connection), **server)

    def _tls(self) -> TlsConfig | None:
        if "tls" not in self._values:
            return None
        checked = self._section("tls", _TLS)
        if ("certificates" in checked) == ("psk" in checked):
            self._wrong(("tls",), "needs either certificates or psk")
        return TlsConfig(**{name.replace("-", "_"): value for name, value in checked.items()})

    def _nodes(self) -> tuple[dict[str, Any], ...]:
        """Every node, behind those that it is over."""
        nodes: dict[str, dict[str, Any]] = {}
        for name, table in self._tables("nodes"):
            path: KeyPath = ("nodes", name)
            if not is_identifier(name) or len(name) > NAME_BYTES_MAX:
                self._wrong(path, f"a node's name is a letter, then letters, digits and -._, at most {NAME_BYTES_MAX}")
            elif isinstance(table, dict) and "node-name" in table:
                self._wrong((*path, "node-name"), "the name is the table's")
            elif isinstance(table, dict):
                try:
                    nodes[name] = NODE_OPTIONS.check(table | {"node-name": name}, "")
                except ArgumentError as error:
                    self._wrong_argument(path, table, str(error))
            else:
                self._wrong(path, "must be a table")
        return tuple(self._in_order(nodes))

    def _in_order(self, nodes: dict[str, dict[str, Any]]) -> Iterable[dict[str, Any]]:
        done: set[str] = set()
        waiting = dict(nodes)
        while waiting:
            ready = [name for name, node in waiting.items() if set(_names_below(node)) <= done]
            for name in ready:
                done.add(name)
                yield waiting.pop(name)
            if not ready:
                break
        for name, node in waiting.items():
            missing = [below for below in _names_below(node) if below not in nodes]
            says = f"there is no node {missing[0]!r}{_nearest(missing[0], nodes)}" if missing else "is over itself"
            if missing or any(below in waiting for below in _names_below(node)):
                self._wrong(("nodes", name, "file"), says)

    def _exports(
        self, nodes: set[str], iothreads: Mapping[str, object]
    ) -> tuple[ConfiguredExport, ...]:
        found = []
        for name, table in self._tables("exports"):
            path: KeyPath = ("exports", name)
            checked = self._checked(table, path, _EXPORT)
            if ("node" in checked) == ("source" in checked):
                self._wrong(path, "needs either a node or a source")
            for key in ("filters", "size"):
                if "node" in checked and key in checked:
                    self._wrong((*path, key), "is for a source; a node has its own")
            for key, known in (("node", nodes), ("iothread", iothreads)):
                if key in checked and checked[key] not in known and not self._was_wrong((f"{key}s", checked[key])):
                    self._wrong((*path, key), f"there is no {key} {checked[key]!r}{_nearest(checked[key], known)}")
            if checked.get("tls-only") and "tls" not in self._values:
                self._wrong((*path, "tls-only"), "there is no [tls]")
            fields = {key.replace("-", "_"): value for key, value in checked.items()}
            found.append(ConfiguredExport(name=name, **fields))
        return tuple(found)

    # -- tools ---------------------------------------------------------------------------------------------

    def _wrong(self, path: KeyPath, says: str) -> None:
        self.problems.append((line_of(self._lines, path), tuple(map(str, path)), says))

    def _was_wrong(self, path: tuple[str, ...]) -> bool:
        """Has something in there been named already? Then it is no second mistake that it is not there."""
        return any(other[:len(path)] == path for _line, other, _says in self.problems)

    def _wrong_argument(self, path: KeyPath, table: dict[str, Any], text: str) -> None:
        """An error in QEMU's words: the key is in quotes, and may be further down."""
        named = re.search("'([^']*)'", text)
        keys = tuple(named[1].split(".")) if named is not None else ()
        kind = KINDS.get(str(table.get("driver")))
        if text.endswith("is unexpected") and kind is not None and len(keys) == 1:
            known = ["driver", "read-only", "discard", *(member.name for member in kind.members)]
            self._wrong((*path, *keys), f"is no option of {table['driver']}{_nearest(keys[0], known)}")
        elif "driver" in keys and "does not accept" in text:
            while table["driver"] in KINDS:         # it is that of what is written inline below it
                table, path = table["file"], (*path, "file")
            self._wrong((*path, "driver"), f"there is no driver {table['driver']!r}{_nearest(table['driver'], KINDS)}")
        else:
            self._wrong((*path, *keys), text)

    def _known(self, table: dict[str, Any], path: KeyPath, known: Iterable[str]) -> None:
        for key in table:
            if key not in known:
                self._wrong((*path, key), f"is not known here{_nearest(key, known)}")

    def _section(self, name: str, checks: Mapping[str, Check]) -> dict[str, Any]:
        return self._checked(self._values.get(name, {}), (name,), checks)

    def _tables(self, name: str) -> list[tuple[str, Any]]:
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            self._wrong((name,), f"must be tables, [{name}.NAME]")
            return []
        return list(value.items())

    def _checked(self, table: Any, path: KeyPath, checks: Mapping[str, Check]) -> dict[str, Any]:
        if not isinstance(table, dict):
            self._wrong(path, "must be a table")
            return {}
        self._known(table, path, checks)
        found = {}
        for key, check in checks.items():
            if key in table:
                try:
                    found[key] = check(table[key])
                except UsageError as error:
                    self._wrong((*path, key), str(error))
        return found


def _names_below(node: Mapping[str, Any]) -> list[str]:
    """The names of the nodes that a node, or one inline in it, is over."""
    below = node.get("file")
    if isinstance(below, str):
        return [below]
    return _names_below(below) if isinstance(below, dict) else []


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""
