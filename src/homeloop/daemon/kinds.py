"""The kinds of nodes: QEMU's drivers and ours, what each takes, and how its driver is made.

A kind's members are checked before anything is done; make() runs on a worker and may block. `file` is a child: the
name of a node, or the options of a new one, which goes with its parent.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.block.file import File
from homeloop.block.filters.delay import Delay
from homeloop.block.filters.specs import FilterSpec, apply_filters, parse_filter
from homeloop.block.http import Http
from homeloop.block.memory import Memory
from homeloop.block.null import Null
from homeloop.core.context import AioContext
from homeloop.daemon.qmp.arguments import BOOL, SIZE, STRING, ArgumentError, Choice, Enum, Member, Shape, Struct, Union
from homeloop.daemon.window import Window
from homeloop.errors import BlockError, PeerError, UsageError
from homeloop.nbd.nbd_driver import RECONNECT_DELAY_S, open_nbd
from homeloop.nbd.protocol import PORT
from homeloop.nbd.uri import NbdUri

__all__ = ["KINDS", "NODE_OPTIONS", "Kind"]

Options = dict[str, Any]
_NULL_SIZE: Final = 1 << 30         # QEMU's default
_HTTP_TIMEOUT_S: Final = 5          # QEMU's default
_HTTP_MEMBERS: Final = (Member("url", STRING), Member("timeout", SIZE, optional=True))
_FILTERS: Final = (
    "cache", "cow", "delay", "error", "log", "offset", "partition", "rate", "readahead", "readonly", "retry",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of node. make(options, children, home): children's devices by member name, in a worker; at their home
    only they may be asked anything."""

    make: Callable[[Options, Mapping[str, Device], AioContext], Driver | Device]
    members: tuple[Member, ...] = ()
    children: tuple[str, ...] = field(default=())
    movable: bool = True            # may go to another context once it was used
    asks: bool = False              # make() asks its children


_FILE: Final = Choice("BlockdevRef", {str: lambda: STRING, dict: lambda: NODE_OPTIONS})


def _file(options: Options, children: Mapping[str, Device], home: AioContext) -> Driver:
    filename = options["filename"]
    if not filename or "\0" in filename:
        raise UsageError("The 'file' block driver requires a file name")
    try:
        return File(filename, read_only=bool(options.get("read-only")))
    except BlockError as error:
        text = error.text.removeprefix(f"cannot open {filename}: ")
        if text != error.text:
            raise BlockError(error.errno, f"Could not open '{filename}': {text}") from error
        raise


def _python(options: Options, children: Mapping[str, Device], home: AioContext) -> Driver:
    module_name, class_name = options["module"], options["class"]
    try:
        module = importlib.import_module(module_name)
    except Exception as error:                  # a module runs whatever it likes
        raise UsageError(f"Could not import '{module_name}': {type(error).__name__}: {error}") from error
    factory = getattr(module, class_name, None)
    if not callable(factory):
        raise UsageError(f"Module '{module_name}' has no class '{class_name}'")
    try:
        made: Driver = factory(**options.get("options", {}))
    except (UsageError, BlockError):
        raise
    except Exception as error:
        raise UsageError(f"Could not make '{class_name}': {type(error).__name__}: {error}") from error
    return made


def _nbd(options: Options, children: Mapping[str, Device], home: AioContext) -> Driver:
    server, export = options["server"], options.get("export", "")
    if server["type"] == "unix":
        uri, named = NbdUri(socket=server["path"], export=export), server["path"]
    else:
        host, port = server["host"], server["port"]
        if not port.isascii() or not port.isdigit() or int(port[:6]) > 65535:
            raise UsageError(f"address resolution failed for {host}:{port}: Servname not supported for ai_socktype")
        uri, named = NbdUri(host=host, port=int(port or PORT), export=export), f"{host}:{port}"
    delay = options.get("reconnect-delay", RECONNECT_DELAY_S)
    try:
        return open_nbd(uri, read_only=bool(options.get("read-only")), reconnect_delay=delay)
    except PeerError as error:
        raise UsageError(f"Server at '{named}': {error}") from error
    except OSError as error:
        text = os.strerror(error.errno) if error.errno else str(error)
        raise UsageError(f"Failed to connect to '{named}': {text}") from error


def _null(options: Options, children: Mapping[str, Device], home: AioContext) -> Driver:
    null = Null(options.get("size", _NULL_SIZE))
    latency_ns = options.get("latency-ns", 0)
    return Delay(null, fixed=latency_ns / 1e9) if latency_ns else null


def _http(options: Options, children: Mapping[str, Device], home: AioContext) -> Driver:
    kind, url, timeout_s = options["driver"], options["url"], options.get("timeout", _HTTP_TIMEOUT_S)
    if not url.startswith(f"{kind}://"):
        raise UsageError(f"{kind} does not support the URL '{url}': it must begin with {kind}://")
    if not timeout_s:
        raise UsageError("Parameter 'timeout' expects a number of seconds above 0")
    return Http(url, timeout_s=timeout_s)


class _FilterOptions:
    """A filter's options as `homeloop serve --filter` has them, each a string, a number or a switch: a FilterSpec."""

    def __init__(self, filter: str) -> None:
        self._filter = filter

    def check(self, value: object, path: str) -> FilterSpec:
        if not isinstance(value, dict):
            raise ArgumentError(f"Invalid parameter type for '{path}', expected: object")
        return self.spec(value)

    def spec(self, value: Mapping[str, object]) -> FilterSpec:
        """What parse_filter() makes of them."""
        words = []
        for name, option in value.items():
            if isinstance(option, bool):
                option = "on" if option else "off"
            if not isinstance(option, str | int | float):
                raise ArgumentError(f"Invalid parameter type for 'options.{name}', expected: string or number")
            words.append(f"{name}={option}".replace(",", "\\,"))
        try:
            return parse_filter(f"{self._filter}:{','.join(words)}" if words else self._filter)
        except UsageError as error:
            raise ArgumentError(str(error)) from error


def _filter_kind(name: str, required: bool) -> Kind:
    """The kind of nodes that a filter makes: over `file`, with `options`."""
    takes = _FilterOptions(name)

    def make(options: Options, children: Mapping[str, Device], home: AioContext) -> Device:
        spec = options.get("options") or takes.spec({})
        return apply_filters(Device(Window(children["file"]), name=name), [spec], run=home.call)

    members = (Member("file", _FILE), Member("options", takes, optional=not required))
    return Kind(make=make, members=members, children=("file",), movable=False, asks=name == "partition")


class _AnyObject(Struct):
    """An object with any keys: what it means only who gets it knows."""

    def check(self, value: object, path: str = "") -> dict[str, Any]:
        return super().check(value, path) if not isinstance(value, dict) else value



KINDS: Final[dict[str, Kind]] = {
    "file": Kind(
        make=_file,
        members=(Member("filename", STRING), Member("locking", Enum("auto", "on"), optional=True)),
    ),
    "raw": Kind(
        make=lambda options, children, home: Window(children["file"], options.get("offset", 0), options.get("size")),
        members=(
            Member("file", _FILE), Member("offset", SIZE, optional=True), Member("size", SIZE, optional=True),
        ),
        children=("file",),
    ),
    "null-co": Kind(
        make=_null,
        members=(
            Member("size", SIZE, optional=True), Member("latency-ns", SIZE, optional=True),
            Member("read-zeroes", BOOL, optional=True),
        ),
    ),
    "http": Kind(make=_http, members=_HTTP_MEMBERS),
    "https": Kind(make=_http, members=_HTTP_MEMBERS),
    "memory": Kind(make=lambda options, children, home: Memory(options["size"]), members=(Member("size", SIZE),)),
    "python": Kind(
        make=_python,
        members=(
            Member("module", STRING), Member("class", STRING), Member("options", _AnyObject(), optional=True),
        ),
        movable=False,
    ),
    "nbd": Kind(
        make=_nbd,
        members=(
            Member("server", Union("type", {
                "unix": (Member("path", STRING),), "inet": (Member("host", STRING), Member("port", STRING)),
            })),
            Member("export", STRING, optional=True), Member("reconnect-delay", SIZE, optional=True),
        ),
        movable=False,
    ),
    **{name: _filter_kind(name, required=name in ("log", "partition")) for name in _FILTERS},
}

NODE_OPTIONS: Final[Shape] = Union(
    "driver",
    {name: kind.members for name, kind in KINDS.items()},
    Member("node-name", STRING, optional=True),
    Member("discard", Enum("ignore", "unmap"), optional=True),
    Member("read-only", BOOL, optional=True),
    Member("auto-read-only", BOOL, optional=True),
)
