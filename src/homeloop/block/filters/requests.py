"""A request as a value: what a filter decides about, what a log keeps, what can be asked again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from homeloop.block.device import Device
from homeloop.block.driver import BytesLike
from homeloop.errors import UsageError

__all__ = ["CHANGES", "KINDS", "Kind", "Request", "kinds_of", "perform"]

Kind: TypeAlias = Literal["read", "write", "flush", "trim", "write_zeroes", "cache", "extents"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)
CHANGES: Final = frozenset({"write", "trim", "write_zeroes"})


@dataclass(frozen=True, slots=True)
class Request:
    """One request. offset and length are 0 for a flush; data, of a write only, is the caller's and not kept.

    A value, for any thread.
    """

    kind: str
    offset: int = 0
    length: int = 0
    data: BytesLike | None = None
    fua: bool = False               # writes only: for the others the Device asks for a flush behind them
    may_trim: bool = True           # write_zeroes only, as is fast
    fast: bool = False

    def __str__(self) -> str:
        if self.kind == "flush":
            return "flush"
        fua = " with fua" if self.fua else ""
        return f"{self.kind}{fua} of {self.length} bytes at {self.offset}"

    def overlaps(self, start: int, stop: int) -> bool:
        """Does it touch a byte of start <= byte < stop? A flush touches none."""
        return self.offset < stop and start < self.offset + self.length


def perform(device: Device, request: Request) -> Any:
    """Ask the device: its answer or a coroutine object. BlockError if it is refused."""
    kind, offset, length = request.kind, request.offset, request.length
    if kind == "read":
        return device.read(offset, length)
    if kind == "write":
        assert request.data is not None, "a write without data"
        return device.write(offset, request.data, fua=request.fua)
    if kind == "flush":
        return device.flush()
    if kind == "trim":
        return device.trim(offset, length)
    if kind == "write_zeroes":
        return device.write_zeroes(offset, length, may_trim=request.may_trim, fast=request.fast)
    if kind == "cache":
        return device.cache(offset, length)
    assert kind == "extents", kind
    return device.extents(offset, length)


def kinds_of(kinds: object) -> frozenset[str]:
    """Read which kinds are meant: one name, several, or None for all. UsageError for one that does not exist."""
    if kinds is None:
        return frozenset(KINDS)
    named = (kinds,) if isinstance(kinds, str) else tuple(kinds)            # type: ignore[arg-type]
    for kind in named:
        if kind not in KINDS:
            raise UsageError(f"there are no {kind!r} requests, only {', '.join(KINDS)}")
    if not named:
        raise UsageError("no kind of request is named")
    return frozenset(named)
