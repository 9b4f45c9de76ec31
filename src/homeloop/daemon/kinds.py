"""The kinds of nodes: QEMU's drivers and ours, what each takes, and how its driver is made.

A kind's members are checked before anything is done; make() runs on a worker and may block. `file` is a child: the
name of a node, or the options of a new one, which goes with its parent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from homeloop.block.device import Device
from homeloop.block.driver import BytesLike, Driver, ThreadModel
from homeloop.block.file import File
from homeloop.block.memory import Memory
from homeloop.block.zeroes import zeroes
from homeloop.daemon.qmp.arguments import ANY, BOOL, SIZE, STRING, Choice, Enum, Member, Shape, Struct, Union
from homeloop.daemon.window import Window
from homeloop.errors import BlockError, UsageError

__all__ = ["KINDS", "NODE_OPTIONS", "Kind"]

Options = dict[str, Any]
_NULL_SIZE: Final = 1 << 30         # QEMU's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of node. make(options, children): children's devices by member name, in a worker."""

    make: Callable[[Options, Mapping[str, Device]], Driver | Device]
    members: tuple[Member, ...] = ()
    children: tuple[str, ...] = field(default=())
    movable: bool = True            # may go to another context once it was used


class _Null:
    """Zeroes to read, and a place where writes vanish."""

    thread_model: ThreadModel = "inline"
    multi_conn = True

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, length: int) -> BytesLike:
        return zeroes(length)

    def write(self, offset: int, data: BytesLike) -> None:
        pass

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        pass

    def trim(self, offset: int, length: int) -> None:
        pass

    def flush(self) -> None:
        pass


def _file(options: Options, children: Mapping[str, Device]) -> Driver:
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


def _python(options: Options, children: Mapping[str, Device]) -> Driver:
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


class _AnyObject(Struct):
    """An object with any keys: what it means only who gets it knows."""

    def check(self, value: object, path: str = "") -> dict[str, Any]:
        return super().check(value, path) if not isinstance(value, dict) else value


_FILE: Final = Choice("BlockdevRef", {str: lambda: STRING, dict: lambda: NODE_OPTIONS})

KINDS: Final[dict[str, Kind]] = {
    "file": Kind(
        make=_file,
        members=(Member("filename", STRING), Member("locking", Enum("auto", "on"), optional=True)),
    ),
    "raw": Kind(
        make=lambda options, children: Window(children["file"], options.get("offset", 0), options.get("size")),
        members=(
            Member("file", _FILE), Member("offset", SIZE, optional=True), Member("size", SIZE, optional=True),
        ),
        children=("file",),
    ),
    "null-co": Kind(
        make=lambda options, children: _Null(options.get("size", _NULL_SIZE)),
        members=(Member("size", SIZE, optional=True), Member("read-zeroes", BOOL, optional=True)),
    ),
    "memory": Kind(make=lambda options, children: Memory(options["size"]), members=(Member("size", SIZE),)),
    "python": Kind(
        make=_python,
        members=(
            Member("module", STRING), Member("class", STRING), Member("options", _AnyObject(), optional=True),
        ),
        movable=False,
    ),
}

NODE_OPTIONS: Final[Shape] = Union(
    "driver",
    {name: kind.members for name, kind in KINDS.items()},
    Member("node-name", STRING, optional=True),
    Member("discard", Enum("ignore", "unmap"), optional=True),
    Member("read-only", BOOL, optional=True),
    Member("auto-read-only", BOOL, optional=True),
)
assert ANY is not None
