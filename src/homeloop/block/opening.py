"""From what a person types to a driver or a device: "memory:1G", "file:PATH" or PATH, "python:module:Class".

The kinds stand in one table. Who brings a kind of driver along adds it with register_kind(); nothing here knows
more of it than its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.block.file import File
from homeloop.block.http import Http
from homeloop.block.memory import Memory
from homeloop.block.null import Null
from homeloop.block.sizes import parse_size
from homeloop.block.user_class import class_name, make_driver
from homeloop.errors import UsageError

__all__ = ["Kind", "Opener", "Spec", "default_name", "open_device", "open_driver", "parse_size", "register_kind"]

# What looks like KIND:rest. Not a path with a colon further down: "./a:b" and "/a:b" are paths.
_KIND: Final = re.compile(r"([A-Za-z][A-Za-z0-9+-]*):(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a person asks for, taken apart. A value, for any thread."""

    text: str                   # all of it, for errors, and for kinds whose specs are URIs
    kind: str
    rest: str                   # behind the colon
    read_only: bool = False
    size: int | None = None     # bytes; of what is made, or what must be there
    create: bool = False

    def refuse_size(self) -> None:
        """Raise UsageError if a size, or creating, was asked for: for kinds that have none."""
        if self.size is not None or self.create:
            raise UsageError(f"{self.text!r}: a size and creating are for files, and this is none")


Opener: TypeAlias = Callable[[Spec], Driver]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of driver. open: makes a driver, or raises UsageError or BlockError; may block. name: of its device."""

    form: str                               # for people: "memory:SIZE"
    open: Opener
    name: Callable[[Spec], str] | None = None       # None: the kind


def register_kind(
    kind: str, open: Opener, *, form: str | None = None, name: Callable[[Spec], str] | None = None
) -> None:
    """Let open_driver() know "kind:...". At import, before anybody opens; any thread.

    form: how it is written, for people; name: what its device is called by default. UsageError if the kind is known
    with another opener, or can be none.
    """
    if _KIND.fullmatch(f"{kind}:") is None:
        raise UsageError(f"{kind!r} cannot be a kind of device: letters, digits, + and - only")
    known = _kinds.get(kind)
    if known is not None and known.open is not open:
        raise UsageError(f"there is a kind of device {kind!r} already")
    _kinds[kind] = Kind(form=form or f"{kind}:...", open=open, name=name)


def open_driver(spec: str, *, read_only: bool = False, size: int | None = None, create: bool = False) -> Driver:
    """Open the driver that spec names: "KIND:..." for a kind that is known, or PATH for a file.

    size and create are for files: see File. A path that looks like KIND:rest must be written file:PATH, so
    that a misspelt kind is an error and not a missing file. May block: in a coroutine call it through a
    worker.

    Raises UsageError, one sentence, for a spec that makes no sense; BlockError if the image cannot be opened
    or is in use.
    """
    return _open(_parse(spec, read_only, size, create))


def open_device(
    spec: str, *, read_only: bool = False, size: int | None = None, create: bool = False, name: str | None = None
) -> Device:
    """Open the device that spec names: open_driver() in a Device, which is called default_name(spec) or `name`."""
    parsed = _parse(spec, read_only, size, create)
    return Device(_open(parsed), name=_name_of(parsed) if name is None else name, read_only=read_only or None)


def default_name(spec: str) -> str:
    """Return what a device of this spec is called unless somebody says otherwise: the file's name, the kind, ..."""
    return _name_of(_parse(spec, False, None, False))


def _parse(text: str, read_only: bool, size: int | None, create: bool) -> Spec:
    match = _KIND.fullmatch(text)
    kind, rest = ("file", text) if match is None else (match[1], match[2])
    return Spec(text=text, kind=kind, rest=rest, read_only=read_only, size=size, create=create)


def _open(spec: Spec) -> Driver:
    kind = _kinds.get(spec.kind)
    if kind is None:
        forms = ", ".join(sorted(kind.form for kind in _kinds.values()))
        raise UsageError(f"{spec.text!r}: there is no kind of device {spec.kind!r}, only {forms} (or a path)")
    return kind.open(spec)


def _name_of(spec: Spec) -> str:
    kind = _kinds.get(spec.kind)
    if kind is None:
        return os.path.basename(spec.text)
    return spec.kind if kind.name is None else kind.name(spec)


def _open_memory(spec: Spec) -> Driver:
    if spec.size is not None or spec.create:
        raise UsageError(f"{spec.text!r}: memory takes its size behind the colon, and needs no creating")
    return Memory(parse_size(spec.rest))


def _open_null(spec: Spec) -> Driver:
    spec.refuse_size()
    return Null(parse_size(spec.rest)) if spec.rest else Null()


def _open_file(spec: Spec) -> Driver:
    if not spec.rest or "\0" in spec.rest:
        raise UsageError(f"{spec.text!r} names no file")
    return File(spec.rest, read_only=spec.read_only, size=spec.size, create=spec.create)


def _open_python(spec: Spec) -> Driver:
    spec.refuse_size()
    driver: Any = make_driver(spec.rest)
    return driver       # type: ignore[no-any-return]       # Device reads its traits and says what is wrong


def _open_http(spec: Spec) -> Driver:
    spec.refuse_size()
    return Http(spec.text)


def _name_of_url(spec: Spec) -> str:
    parts = urlsplit(spec.text)
    return os.path.basename(parts.path) or parts.hostname or spec.kind


_kinds: Final[dict[str, Kind]] = {
    "memory": Kind(form="memory:SIZE", open=_open_memory),
    "null": Kind(form="null:SIZE", open=_open_null),
    "file": Kind(form="file:PATH", open=_open_file, name=lambda spec: os.path.basename(spec.rest)),
    "http": Kind(form="http://HOST/PATH", open=_open_http, name=_name_of_url),
    "https": Kind(form="https://HOST/PATH", open=_open_http, name=_name_of_url),
    "python": Kind(form="python:MODULE:CLASS", open=_open_python, name=lambda spec: class_name(spec.rest)),
}
