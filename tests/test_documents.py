"""The names that README and docs/ use in running text are there: what was renamed or removed is found here."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import homeloop
from homeloop import block, nbd, sync

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"(?<![\w./-])([a-z_]\w*)\.([A-Za-z_][\w.]*\w|\w)")

# The names that the documents give to objects. Others (loop, asyncio, limiter, ...) are not ours to check.
OBJECTS: dict[str, type] = {
    "context": homeloop.AioContext,
    "other": homeloop.AioContext,
    "co": homeloop.Coroutine,
    "child": homeloop.Coroutine,
    "bh": homeloop.BottomHalf,
    "io": homeloop.IOThread,
    "rt": homeloop.Runtime,
    "big_lock": homeloop.BigLock,
    "group": homeloop.TaskGroup,
    "device": block.Device,
    "faults": block.Faults,
    "stall": block.Stall,
    "rule": block.Rule,
    "client": nbd.Client,
    "mutex": sync.Mutex,
    "semaphore": sync.Semaphore,
    "channel": sync.Channel,
    "event": sync.Event,
}
MODULES = {"homeloop": "homeloop", "sync": "homeloop.sync", "nbd": "homeloop.nbd", "block": "homeloop.block"}
# `core.loop` and the like: modules, as design.md writes them.
PACKAGES = {path.parent.name for path in (ROOT / "src" / "homeloop").glob("*/__init__.py")}
INSTANCE_ATTRIBUTE = re.compile(r"^\s+self\.(\w+)\b.*=", re.MULTILINE)


def names_in(text: str) -> Iterator[tuple[str, str]]:
    """(first, rest) of each dotted name in the inline code of a page."""
    for code in CODE.findall(FENCE.sub("", text)):
        yield from DOTTED.findall(code)


def has(found: Any, name: str) -> bool:
    if hasattr(found, name):
        return True
    if inspect.isclass(found):          # what __init__ makes is not on the class
        return any(
            name in INSTANCE_ATTRIBUTE.findall(inspect.getsource(cls))
            for cls in found.__mro__ if cls.__module__.startswith("homeloop")
        )
    return False


def is_there(dotted: str) -> bool:
    """Is it a module, or an attribute of one, at any depth?"""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not has(found, part):
                return False
            found = getattr(found, part, None)
        return True
    return False


def wrong_names(text: str) -> Iterator[str]:
    for first, rest in names_in(text):
        if first in OBJECTS:
            if not has(OBJECTS[first], rest.partition(".")[0]):
                yield f"{first}.{rest}: {OBJECTS[first].__name__} has no {rest}"
        elif first in MODULES:
            # nbd.protocol is a module of the package, homeloop.nbd.serve a name of it, block.io a file of QEMU's.
            if not is_there(f"{MODULES[first]}.{rest}"):
                yield f"{first}.{rest} is not there"
        elif first in PACKAGES and not is_there(f"homeloop.{first}.{rest}"):
            yield f"{first}.{rest}: there is no homeloop.{first}.{rest}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_the_documents_are_there(page: Path) -> None:
    wrong = sorted(set(wrong_names(page.read_text(encoding="utf-8"))))
    assert not wrong, "\n".join(wrong)


def test_wrong_names_are_found() -> None:
    text = (
        "`co.wake()`, `co.wakes()`; `homeloop.sync.Mutex` and `homeloop.sync.Mutexes`, `sync.Mutex(1)`; "
        "`context.loop.call_soon`; `nbd.serve()`, `core.loop`, `core.loops`; `asyncio.nothing`; `a/context.py`\n"
        "```\nco.nothing()\n```\n"
    )
    found = [name.partition(" ")[0].rstrip(":") for name in wrong_names(text)]
    assert found == ["co.wakes", "homeloop.sync.Mutexes", "core.loops"]
