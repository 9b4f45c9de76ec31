"""From what a person types to a filter: "delay:read=5ms,jitter=1ms", applied to a device one after the other.

    NAME[:OPTION=VALUE[,OPTION=VALUE]...]

Each filter has a table of its options with how each is read. A backslash takes the meaning from the comma behind it.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from homeloop.block.device import Device
from homeloop.block.filters.cache import Cache
from homeloop.block.filters.cow import Cow
from homeloop.block.filters.delay import Delay
from homeloop.block.filters.errnos import errno_of
from homeloop.block.filters.error import Error
from homeloop.block.filters.log import Log
from homeloop.block.filters.offset import Offset
from homeloop.block.filters.partition import Partition
from homeloop.block.filters.rate import Rate
from homeloop.block.filters.readahead import Readahead
from homeloop.block.filters.readonly import Readonly
from homeloop.block.filters.requests import kinds_of
from homeloop.block.filters.retry import Retry
from homeloop.block.sizes import parse_size
from homeloop.errors import UsageError

__all__ = ["FilterSpec", "apply_filters", "option_names", "parse_filter"]

Read = Callable[[str], Any]
_TIME: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(us|ms|s|m)?")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, None: 1.0}
_WORDS: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def _time(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a time: write seconds, or a number with us, ms, s or m, such as 5ms")
    return float(match[1]) * _SECONDS[match[2]]


def _number(text: str) -> int:
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise UsageError(f"{text!r} is not a whole number")
    return int(text)


def _float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{text!r} is not a number")
    return number


def _switch(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise UsageError(f"{text!r} is neither on nor off")
    return _WORDS[text.lower()]


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise UsageError(f"{text!r} names no file")
    return text


def _range(text: str) -> tuple[int, int]:
    start, dash, stop = text.partition("-")
    if not dash:
        raise UsageError(f"{text!r} is not a range: write START-STOP, such as 0-64k")
    return parse_size(start), parse_size(stop)


def _errnos(text: str) -> list[int]:
    return [errno_of(int(name) if name.isdecimal() else name) for name in text.split("+")]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One filter: what makes it, how its options are read, and which it must have."""

    make: Callable[..., Any]
    options: Mapping[str, tuple[str, Read]]     # option -> (keyword of make, how to read it)
    required: tuple[str, ...] = ()


_SEED: Final[dict[str, tuple[str, Read]]] = {"seed": ("seed", _number)}
_KINDS: Final[Mapping[str, _Kind]] = {
    "cow": _Kind(Cow, {"file": ("overlay", _path), "cluster": ("cluster", parse_size)}),
    "readahead": _Kind(Readahead, {"min": ("window_min", parse_size), "max": ("window_max", parse_size)}),
    "cache": _Kind(Cache, {
        "size": ("size", parse_size), "block": ("block", parse_size), "write-back": ("write_back", _switch)}),
    "delay": _Kind(Delay, {**{name: (name, _time) for name in ("read", "write", "fixed", "jitter")}, **_SEED}),
    "rate": _Kind(Rate, {
        "bytes": ("bytes_per_s", parse_size), "requests": ("requests_per_s", _float), "burst": ("burst_s", _time)}),
    "error": _Kind(Error, {
        "errno": ("errno", lambda text: _errnos(text)[0]), "kinds": ("kinds", lambda text: kinds_of(text.split("+"))),
        "at": ("at", _range), "share": ("share", _float), **_SEED}),
    "retry": _Kind(Retry, {
        "times": ("times", _number), "delay": ("delay_s", _time), "delay-max": ("delay_max_s", _time),
        "errnos": ("errnos", _errnos)}),
    "log": _Kind(Log, {"file": ("to", _path), "data": ("with_data", _switch)}, required=("file",)),
    "partition": _Kind(Partition.find, {"number": ("number", _number)}, required=("number",)),
    "readonly": _Kind(Readonly, {}),
    "offset": _Kind(Offset, {"offset": ("offset", parse_size), "size": ("size", parse_size)}),
}


@dataclass(frozen=True, slots=True)
class FilterSpec:
    """A filter as it was typed, checked as far as that goes without a device."""

    text: str
    name: str
    options: dict[str, Any]     # keywords of what makes it


def parse_filter(text: str) -> FilterSpec:
    """Read what a person typed. UsageError, one sentence, for what makes no sense: it quotes the text."""
    name, colon, rest = text.partition(":")
    kind = _KINDS.get(name)
    if kind is None:
        raise UsageError(f"filter {text!r}: there is no {name!r}, only {', '.join(sorted(_KINDS))}")
    given: dict[str, str] = {}
    for part in re.split(r"(?<!\\),", rest) if colon else ():
        option, equals, value = part.replace("\\,", ",").partition("=")
        if option not in kind.options or not equals:
            there = ", ".join(f"{known}=" for known in kind.options) or "none"
            raise UsageError(f"filter {text!r}: {part!r} is no option of {name}; it has {there}")
        if option in given:
            raise UsageError(f"filter {text!r}: {option} is given twice")
        given[option] = value
    for option in kind.required:
        if option not in given:
            raise UsageError(f"filter {text!r}: {name} needs {option}=")
    options = {}
    for option, value in given.items():
        keyword, read = kind.options[option]
        try:
            options[keyword] = read(value)
        except UsageError as error:
            raise UsageError(f"filter {text!r}: {option}: {error}") from error
    return FilterSpec(text, name, options)


def apply_filters(
    device: Device, filters: Iterable[str | FilterSpec], *, run: Callable[[Any], Any] | None = None
) -> Device:
    """Put filters over a device, the first next to it, the last what the world sees. May block: a worker's.

    run: runs a coroutine, as the call() of the device's home does: a filter may have to read the device. None: on a
    loop of our own; the device must not be in use then, nor keep anything of the loop that it was used in first.

    Raises UsageError for a filter that does not fit, quoting it, BlockError for a device that cannot be read; the
    device is not closed then.
    """
    name = device.name
    for spec in [parse_filter(one) if isinstance(one, str) else one for one in filters]:
        try:
            made = _KINDS[spec.name].make(device, **spec.options)
            device = Device((run or _finished)(made) if asyncio.iscoroutine(made) else made, name=name)
        except UsageError as error:
            raise UsageError(f"filter {spec.text!r}: {error}") from error
    return device


def _finished(made: Any) -> Any:
    """Run a coroutine to its end on a loop of its own, in a thread of its own: this one may have a loop."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(asyncio.run(made))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="homeloop-filter")
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def option_names() -> dict[str, list[str]]:
    """The filters that parse_filter() knows, each with the names of its options."""
    return {name: list(kind.options) for name, kind in _KINDS.items()}
