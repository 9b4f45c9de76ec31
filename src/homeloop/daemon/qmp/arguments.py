"""Pure: what a command's arguments must look like, and QEMU's words for what is wrong with them.

A shape checks a value and returns it; nothing of a command is done before all its arguments are found good.

    Struct(Member("node-name", STRING), Member("size", INT), Member("mode", Enum("safe", "hard"), optional=True))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

__all__ = [
    "ANY", "BOOL", "INT", "SIZE", "STRING", "ArgumentError", "Choice", "Enum", "Integer", "ListOf", "Member", "Shape",
    "Struct", "Union",
]

_INT64: Final = (-(1 << 63), (1 << 63) - 1)


class ArgumentError(Exception):
    """The arguments are not what the command takes; the text is for the client."""


class Shape(Protocol):
    """Checks one value; `path` is how QEMU names it: "addr.data.port"."""

    def check(self, value: object, path: str) -> Any:
        """Return the value; ArgumentError if it is not of this shape."""


def _wrong_type(path: str, expected: str) -> ArgumentError:
    return ArgumentError(f"Invalid parameter type for '{path or 'arguments'}', expected: {expected}")


def _last(path: str) -> str:
    return path.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class _String:
    def check(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        return value


@dataclass(frozen=True, slots=True)
class _Bool:
    def check(self, value: object, path: str) -> bool:
        if not isinstance(value, bool):
            raise _wrong_type(path, "boolean")
        return value


@dataclass(frozen=True, slots=True)
class _Any:
    def check(self, value: object, path: str) -> object:
        return value


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number of 64 bits, from low to high; `says` is what is said of others, with {name}."""

    low: int = _INT64[0]
    high: int = _INT64[1]
    says: str = "Parameter '{name}' expects a number from {low} to {high}"

    def check(self, value: object, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not _INT64[0] <= value <= _INT64[1]:
            raise _wrong_type(path, "integer")
        if not self.low <= value <= self.high:
            raise ArgumentError(self.says.format(name=_last(path), low=self.low, high=self.high))
        return value


STRING: Final = _String()
BOOL: Final = _Bool()
ANY: Final = _Any()
INT: Final = Integer()
SIZE: Final = Integer(low=0, says="Parameter '{name}' expects a non-negative number below 2^64")


class Enum:
    """One of these strings."""

    def __init__(self, *values: str) -> None:
        self.values = values

    def check(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        if value not in self.values:
            raise ArgumentError(f"Parameter '{_last(path)}' does not accept value '{value}'")
        return value


@dataclass(frozen=True, slots=True)
class ListOf:
    """An array of one shape, of bounded length."""

    of: Shape
    length_max: int = 256

    def check(self, value: object, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        if len(value) > self.length_max:
            raise ArgumentError(f"Parameter '{_last(path)}' has {len(value)} elements, at most {self.length_max} fit")
        return [self.of.check(item, f"{path}[{index}]") for index, item in enumerate(value)]


@dataclass(frozen=True, slots=True)
class Choice:
    """A value of this or that JSON type (QEMU: alternate): "BlockdevRef" is a name, or a node's options."""

    name: str
    shapes: Mapping[type, Callable[[], Shape]]      # called late: options have children that are options

    def check(self, value: object, path: str) -> Any:
        shape = self.shapes.get(type(value))
        if shape is None:
            raise _wrong_type(path, self.name)
        return shape().check(value, path)


@dataclass(frozen=True, slots=True)
class Member:
    """One key of an object."""

    name: str
    shape: Shape
    optional: bool = False


class Struct:
    """An object with these keys and no others."""

    def __init__(self, *members: Member) -> None:
        self.members = members

    def check(self, value: object, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        return self.check_all(value, path, self.members)

    @staticmethod
    def check_all(value: dict[str, object], path: str, members: tuple[Member, ...]) -> dict[str, Any]:
        """Check every member, in their order, then that there is no other key."""
        prefix = f"{path}." if path else ""
        checked: dict[str, Any] = {}
        for member in members:
            if member.name in value:
                checked[member.name] = member.shape.check(value[member.name], f"{prefix}{member.name}")
            elif not member.optional:
                raise ArgumentError(f"Parameter '{prefix}{member.name}' is missing")
        for name in value:
            if name not in checked:
                raise ArgumentError(f"Parameter '{prefix}{name}' is unexpected")
        return checked


class Union:
    """An object whose key `tag` says which other keys it has, beside those that it always has."""

    def __init__(self, tag: str, branches: Mapping[str, tuple[Member, ...]], *members: Member) -> None:
        self.tag = tag
        self.branches = branches
        self.members = members

    def check(self, value: object, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        tag_path = f"{path}.{self.tag}" if path else self.tag
        tag = Member(self.tag, Enum(*self.branches))
        if self.tag not in value:
            raise ArgumentError(f"Parameter '{tag_path}' is missing")
        kind = tag.shape.check(value[self.tag], tag_path)
        return Struct.check_all(value, path, (tag, *self.members, *self.branches[kind]))
