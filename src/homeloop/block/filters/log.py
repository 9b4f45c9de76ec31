"""A record of all requests with their results; and the same requests asked again of another device."""

from __future__ import annotations

import base64
import json
import os
import time
from asyncio import iscoroutine
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TextIO

from homeloop.block.device import Answer, Device
from homeloop.block.driver import Driver
from homeloop.block.filters.errnos import errno_of, name_of
from homeloop.block.filters.passing import Funnel
from homeloop.block.filters.requests import KINDS, Request, perform
from homeloop.block.filters.steps import Steps, at_once
from homeloop.errors import BlockError, UsageError

__all__ = ["Log", "LogEntry", "read_log", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One request that has ended. A value, for any thread."""

    number: int                 # in the order in which they were asked, from 1; they end in another
    at_s: float                 # since the log was made
    took_s: float
    kind: str
    offset: int
    length: int
    fua: bool = False
    may_trim: bool = True
    fast: bool = False
    error: str | None = None    # the errno's name; "cancelled" for one that was; None: it succeeded
    data: bytes | None = None   # what a write wrote, if the log keeps data

    @property
    def request(self) -> Request:
        """The same request, to be asked again."""
        return Request(
            self.kind, self.offset, self.length, self.data, fua=self.fua, may_trim=self.may_trim, fast=self.fast
        )

    def to_json(self) -> str:
        """One line of JSON. What is as usual is left out; data is base64."""
        found: dict[str, object] = {
            "number": self.number,
            "at_s": round(self.at_s, 6),
            "took_s": round(self.took_s, 6),
            "kind": self.kind,
            "offset": self.offset,
            "length": self.length,
        }
        if self.fua:
            found["fua"] = True
        if not self.may_trim:
            found["may_trim"] = False
        if self.fast:
            found["fast"] = True
        if self.error is not None:
            found["error"] = self.error
        if self.data is not None:
            found["data"] = base64.b64encode(self.data).decode()
        return json.dumps(found)


class Log(Funnel):
    """Notes every request when it has ended: to a list, to a function, or to a file of JSON lines.

    to: a list that grows without limit, a callable (called at home: it must not block), or a path; None: a list of its
    own, `entries`. The file is made anew, and written through Python's buffer: a line may take until close() to be
    there. with_data: keep what is written too, so that replay() can write it again. Home thread.
    """

    def __init__(
        self,
        driver: Driver | Device,
        to: list[LogEntry] | Callable[[LogEntry], object] | str | os.PathLike[str] | None = None,
        *,
        with_data: bool = False,
    ) -> None:
        super().__init__(driver)
        self.entries: list[LogEntry] = to if isinstance(to, list) else []
        self._file: TextIO | None = None
        if to is None or isinstance(to, list):
            self._note: Callable[[LogEntry], object] = self.entries.append
        elif callable(to):
            self._note = to
        else:
            self._file = open(to, "w", encoding="utf-8")        # noqa: SIM115 - closed by close()
            self._note = self._write_line
        self._with_data = with_data
        self._asked = 0                                         # home
        self._began = time.monotonic()

    def ask(self, request: Request) -> Answer[Any]:
        return at_once(self._logged(request))

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self._file is not None:
                self._file.close()

    def _logged(self, request: Request) -> Steps[Any]:
        self._asked += 1
        began = time.monotonic()
        data = bytes(request.data) if self._with_data and request.data is not None else None
        entry = LogEntry(
            number=self._asked, at_s=began - self._began, took_s=0, kind=request.kind, offset=request.offset,
            length=request.length, fua=request.fua, may_trim=request.may_trim, fast=request.fast, data=data,
        )
        failed: str | None = "cancelled"
        try:
            answer = yield perform(self.inner, request)
            failed = None
            return answer
        except GeneratorExit:
            failed = ""                                         # it was never run: there was no request
            raise
        except BlockError as error:
            failed = name_of(error.errno)
            raise
        finally:
            if failed != "":
                self._note(replace(entry, took_s=time.monotonic() - began, error=failed))

    def _write_line(self, entry: LogEntry) -> None:
        if self._file is not None and not self._file.closed:
            self._file.write(entry.to_json() + "\n")


def read_log(path: str | os.PathLike[str]) -> Iterator[LogEntry]:
    """Read the entries of a file of JSON lines. May block. UsageError, with the number, for a line that is wrong."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield _entry_of(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError, UsageError) as error:
                raise UsageError(f"{os.fspath(path)}, line {number}: not an entry of a log: {error}") from error


async def replay(log: Iterable[LogEntry], device: Device) -> list[LogEntry]:
    """Ask the device for the same requests, one after the other in the order in which they were asked.

    Requests that were cancelled are left out. What a request that failed then does now is its own affair: the answer
    has an entry for each with what became of it, in the same order. At the device's home. Raises UsageError for a
    write whose data the log did not keep, before anything is asked.
    """
    entries = sorted((entry for entry in log if entry.error != "cancelled"), key=lambda entry: entry.number)
    for entry in entries:
        if entry.kind == "write" and entry.data is None:
            raise UsageError(f"the log did not keep what request {entry.number} wrote: make it with with_data=True")
    began, replayed = time.monotonic(), []
    for entry in entries:
        start, failed = time.monotonic(), None
        try:
            answer = perform(device, entry.request)
            if iscoroutine(answer):
                await answer
        except BlockError as error:
            failed = name_of(error.errno)
        now = time.monotonic()
        replayed.append(replace(entry, at_s=start - began, took_s=now - start, error=failed))
    return replayed


def _entry_of(found: Any) -> LogEntry:
    """Check what a line of JSON says: a log is a file, and files come from anywhere."""
    if not isinstance(found, dict):
        raise ValueError("not an object")
    unknown = found.keys() - LogEntry.__slots__
    if unknown:
        raise ValueError(f"there is no {min(unknown)!r}")
    for name in ("number", "offset", "length"):
        if type(found[name]) is not int or found[name] < 0:
            raise ValueError(f"{name} is {found[name]!r}")
    for name in ("at_s", "took_s"):
        if type(found[name]) not in (int, float):
            raise ValueError(f"{name} is {found[name]!r}")
    for name in ("fua", "may_trim", "fast"):
        if type(found.get(name, False)) is not bool:
            raise ValueError(f"{name} is {found[name]!r}")
    if found["kind"] not in KINDS:
        raise ValueError(f"kind is {found['kind']!r}")
    error = found.get("error")
    if error is not None and error != "cancelled":
        errno_of(error)
    if found.get("data") is not None:
        found["data"] = base64.b64decode(found["data"], validate=True)
        if found["kind"] != "write" or len(found["data"]) != found["length"]:
            raise ValueError(f"data of {len(found['data'])} bytes for a {found['kind']} of {found['length']}")
    return LogEntry(**found)
