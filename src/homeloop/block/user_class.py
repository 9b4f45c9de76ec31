"""Drivers that a person wrote, by name: "module:Class?key=value&...", "path/file.py:Class?...".

The options are strings; what they become is what the class's __init__ says of its arguments. Everything here runs
the user's code: what that raises is a UsageError with its text, for who typed the name.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import threading
import types
import typing
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

from homeloop.block.sizes import parse_size
from homeloop.errors import HomeloopError, UsageError

__all__ = ["class_name", "make_driver"]

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
# Of the modules of files: two threads that open devices of one file run it once. Re-entrant: it may open devices.
_running = threading.RLock()
_FORM: Final = "write python:MODULE:CLASS or python:PATH/FILE.py:CLASS, and options as ?name=value&name=value"


def class_name(text: str) -> str:
    """Return the Class of "...:Class?...", or all of text if it has none."""
    return text.partition("?")[0].rpartition(":")[2]


def make_driver(text: str) -> Any:
    """Import the class that text names and make an instance with its options. May block: the user's code runs.

    Raises UsageError, naming the text and what is wrong with it; a HomeloopError of the user's code passes.
    """
    place, _, options = text.partition("?")
    where, colon, name = place.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise UsageError(f"{text!r} names no class: {_FORM}")
    module = _module_of(where)
    made = getattr(module, name, None)
    if not isinstance(made, type):
        what = "has nothing named" if made is None else "has no class named"
        raise UsageError(f"{where} {what} {name!r}")
    arguments = _arguments(made, name, _split(options))
    try:
        return made(**arguments)
    except HomeloopError:
        raise
    except Exception as error:
        raise UsageError(f"{name}({_shown(arguments)}): {type(error).__name__}: {error}") from error


def _module_of(where: str) -> types.ModuleType:
    if where.endswith(".py") or os.sep in where:
        return _module_of_file(where)
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {where!r} (of a file: python:./{where.replace('.', '/')}.py:CLASS)"
            ) from error
        raise UsageError(f"module {where!r} cannot be imported: {error}") from error
    except Exception as error:
        raise UsageError(f"module {where!r} cannot be imported: {type(error).__name__}: {error}") from error


def _module_of_file(path: str) -> types.ModuleType:
    """Run a file as a module, once: two devices of one file share it."""
    path = os.path.abspath(path)
    name = f"homeloop_file_{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:16]}"
    with _running:                      # else the second finds a module that is half there
        return sys.modules[name] if name in sys.modules else _run_file(name, path)


def _run_file(name: str, path: str) -> types.ModuleType:
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module          # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _split(options: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for option in options.split("&") if options else ():
        name, equals, value = option.partition("=")
        name = unquote(name)
        if not equals or not name:
            raise UsageError(f"option {option!r} is not name=value")
        if name in found:
            raise UsageError(f"option {name!r} is given twice")
        found[name] = unquote(value)
    return found


def _arguments(made: Callable[..., Any], name: str, options: dict[str, str]) -> dict[str, Any]:
    """Return the keyword arguments for the class."""
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} does not say which arguments it takes: {error}") from error
    wanted = {key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    rest = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    hints = _hints(made, name)
    arguments: dict[str, Any] = {}
    for key, text in options.items():
        parameter = wanted.get(key, rest)
        if parameter is None:
            raise UsageError(f"{name} has no option {key!r}, only {', '.join(wanted) or 'none at all'}")
        try:
            arguments[key] = _converted(text, hints.get(parameter.name, str))
        except ValueError as error:
            raise UsageError(f"option {key}={text!r} of {name}: {error}") from error
    missing = [key for key, p in wanted.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise UsageError(f"{name} needs the option {' and '.join(missing)}: {name}?{missing[0]}=...")
    return arguments


def _hints(made: Any, name: str) -> dict[str, Any]:
    """What __init__ says of its arguments; of a plain class without one there are none."""
    try:
        return typing.get_type_hints(made.__init__)
    except Exception as error:          # an annotation that only a type checker can read
        raise UsageError(f"the annotations of {name}.__init__ cannot be read: {error}") from error


def _converted(text: str, hint: Any) -> Any:
    """Return what the text is as a value of the annotated type. ValueError, for people, if it is none."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _converted(text, typing.get_args(hint)[0])
    if origin is typing.Union or origin is types.UnionType:
        return _as_one_of(text, typing.get_args(hint))
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        for choice in choices:
            if str(choice) == text:
                return choice
        raise ValueError(f"not one of {', '.join(map(str, choices))}")
    if hint in (str, object, Any):
        return text
    if hint is bool:
        return _as_bool(text)
    if hint is int:
        return _as_int(text)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint[text]
        except KeyError:
            raise ValueError(f"not one of {', '.join(hint.__members__)}") from None
    if hint is float or hint is pathlib.Path:
        return hint(text)
    if hint is bytes:
        return text.encode()
    raise ValueError(f"it should be {getattr(hint, '__name__', hint)}, which cannot be written as an option")


def _as_one_of(text: str, hints: tuple[Any, ...]) -> Any:
    """The first that it can be; str, which everything can be, comes last."""
    if type(None) in hints and text.lower() in ("", "none"):
        return None
    refusals = []
    for hint in sorted((hint for hint in hints if hint is not type(None)), key=lambda hint: hint is str):
        try:
            return _converted(text, hint)
        except ValueError as error:
            refusals.append(str(error))
    raise ValueError("; ".join(refusals))


def _as_bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("not yes or no")


def _as_int(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        return parse_size(text)         # 64k is a number too
    except UsageError:
        raise ValueError("not a whole number, nor a size such as 64k") from None


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
