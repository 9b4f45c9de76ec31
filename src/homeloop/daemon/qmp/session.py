"""Pure: one client of the monitor protocol: bytes in, commands and lines out.

    greeting -> qmp_capabilities -> commands, each answered before the next is looked at
                                    events at any time in between

The owner runs a Command and packs its answer; a Refusal is an answer already. Whatever the client sends, there is one
line for each thing that it asked, in order, with its `id` if it has one: a client that finds none takes the error for
that of the one command that it sent without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from homeloop.daemon.qmp.arguments import ArgumentError, Enum, ListOf, Member, Struct
from homeloop.daemon.qmp.parsing import JsonError, ValueReader

__all__ = ["COMMAND_NOT_FOUND", "DEVICE_NOT_FOUND", "GENERIC_ERROR", "Command", "Item", "Refusal", "Session"]

GENERIC_ERROR: Final = "GenericError"
COMMAND_NOT_FOUND: Final = "CommandNotFound"
DEVICE_NOT_FOUND: Final = "DeviceNotFound"

_CAPABILITIES: Final = "qmp_capabilities"
_CAPABILITIES_TAKES: Final = Struct(Member("enable", ListOf(Enum("oob")), optional=True))


@dataclass(frozen=True, slots=True)
class Command:
    """What the client asks for. `tag` goes back as it came: {"id": any JSON value}, or {}."""

    name: str
    arguments: dict[str, object]
    tag: dict[str, object]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to something that cannot be run, or needs not to be."""

    line: bytes


Item: TypeAlias = Command | Refusal


class Session:
    """One client. Not for two threads at once; TooLong (of homeloop.daemon.qmp.parsing) ends it."""

    def __init__(self, version: Mapping[str, object]) -> None:
        self._version = version             # what query-version says too
        self._reader = ValueReader()
        self.negotiated = False             # from then on commands are run, and events are for it

    def greeting(self) -> bytes:
        """Return what is said first. No "oob" among the capabilities: no command of ours could use it."""
        return _line({"QMP": {"version": self._version, "capabilities": []}})

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent. Drain next_item() before the next feed: only that bounds the buffer."""
        self._reader.feed(data)

    def next_item(self) -> Item | None:
        """Return the next thing that the client asks, or None until more is fed.

        Look at the next one when this one is answered: what it means may depend on it.
        """
        try:
            found = self._reader.next_value()
        except JsonError as error:
            return Refusal(_error({}, GENERIC_ERROR, str(error)))
        if found is None:
            return None
        value = found[0]
        if not isinstance(value, dict):
            return Refusal(_error({}, GENERIC_ERROR, "QMP input must be a JSON object"))
        tag = {"id": value["id"]} if "id" in value else {}
        try:
            command = _command_of(value, tag)
        except ArgumentError as error:
            return Refusal(_error(tag, GENERIC_ERROR, str(error)))
        if command.name == _CAPABILITIES:
            return Refusal(self._negotiate(command))
        if not self.negotiated:
            text = f"Expecting capabilities negotiation with '{_CAPABILITIES}'"
            return Refusal(_error(tag, COMMAND_NOT_FOUND, text))
        return command

    def _negotiate(self, command: Command) -> bytes:
        if self.negotiated:
            text = "Capabilities negotiation is already complete, command ignored"
            return _error(command.tag, COMMAND_NOT_FOUND, text)
        try:
            wanted = _CAPABILITIES_TAKES.check(command.arguments).get("enable", [])
        except ArgumentError as error:
            return _error(command.tag, GENERIC_ERROR, str(error))
        if wanted:
            return _error(command.tag, GENERIC_ERROR, f"Capability '{wanted[0]}' not available")
        self.negotiated = True
        return self.answer(command, {})

    @staticmethod
    def answer(command: Command, result: object) -> bytes:
        """Pack what a command returned."""
        return _line({"return": result} | command.tag)

    @staticmethod
    def refuse(command: Command, kind: str, text: str) -> bytes:
        """Pack why a command failed; kind: one of QEMU's error classes."""
        return _error(command.tag, kind, text)

    @staticmethod
    def event(name: str, data: Mapping[str, object], *, time_us: int) -> bytes:
        """Pack an event of that moment, in microseconds since 1970."""
        seconds, microseconds = divmod(time_us, 1_000_000)
        stamp = {"seconds": seconds, "microseconds": microseconds}
        return _line({"timestamp": stamp, "event": name} | ({"data": data} if data else {}))


def _command_of(value: dict[str, Any], tag: dict[str, object]) -> Command:
    for name, member in value.items():
        if name == "execute":
            if not isinstance(member, str):
                raise ArgumentError("QMP input member 'execute' must be a string")
        elif name == "arguments":
            if not isinstance(member, dict):
                raise ArgumentError("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise ArgumentError(f"QMP input member '{name}' is unexpected")
    if "execute" not in value:
        raise ArgumentError("QMP input lacks member 'execute'")
    return Command(value["execute"], value.get("arguments", {}), tag)


def _error(tag: dict[str, object], kind: str, text: str) -> bytes:
    return _line({"error": {"class": kind, "desc": text}} | tag)


def _line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode() + b"\r\n"
