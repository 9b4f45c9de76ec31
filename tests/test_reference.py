"""The reference is whole: every public name is in it, has a text, and says which thread may call what.

A public name is one in the `__all__` of a public package. docs/reference/ lists them as `::: homeloop.park`; what the
built pages show there are the docstrings (`make docs`).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from homeloop.cli import main as command
from homeloop.errors import HomeloopError

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
PUBLIC = (
    "homeloop", "homeloop.block", "homeloop.block.filters", "homeloop.debug", "homeloop.errors", "homeloop.nbd",
    "homeloop.sync", "homeloop.testing", "homeloop_pytest",
)
ENTRY = re.compile(r"^::: (\S+)\n(?:    options: \{(.*)\}\n)?", re.MULTILINE)
MEMBERS = re.compile(r"members: \[([^\]]*)\]")

# How a class says it: "any thread", "home thread", "one thread at a time", "at the home of", "a thread without a loop".
# "for people, at home" is none of these.
SAYS_THREAD = re.compile(
    r"\b(any|home|one|which|no|its|parent's) (?:\w+ )?thread"
    r"|\bthreads?\b[^.]*\b(may|call|calls|without|takes|has|use)\b"
    r"|\bplain threads\b|\bat the home of\b|\bthread-safe\b",
    re.IGNORECASE,
)


def resolved(dotted: str) -> Any:
    """The object of a dotted name; raises if there is none."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{dotted}: there is no such module")


def entries() -> Iterator[tuple[str, str]]:
    """(name, options) of each entry in the reference."""
    for page in PAGES:
        yield from ENTRY.findall(page.read_text(encoding="utf-8"))


ENTRIES = list(entries())
NAMES = [
    (package, name) for package in PUBLIC for name in importlib.import_module(package).__all__
]
CLASSES = sorted(
    {
        found
        for entry, _ in ENTRIES
        if inspect.isclass(found := resolved(entry))
    } | {
        found
        for package, name in NAMES
        if inspect.isclass(found := getattr(importlib.import_module(package), name))
    },
    key=lambda found: (found.__module__, found.__name__),
)


def text_of_value(module: ModuleType, name: str) -> str | None:
    """The string behind `name = ...`, which is the docstring of what cannot have one; looked for where it is made."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return text_of_value(importlib.import_module(node.module), name)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            return str(following.value.value) if is_text else None      # type: ignore[union-attr]
    return None


def test_public_packages_are_all_there_are() -> None:
    """A new public package gets a page: what has `__all__` in its __init__, or is named as public above."""
    inner = {"homeloop.cli", "homeloop.core", "homeloop.daemon", "homeloop.daemon.qmp"}
    found = {
        ".".join(path.parent.relative_to(ROOT / "src").parts)
        for path in (ROOT / "src").rglob("__init__.py")
    }
    assert found - inner == set(PUBLIC) - {"homeloop.errors"}


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda part: part)
def test_public_name_is_in_the_reference(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    by_name = {entry for entry, _ in ENTRIES}
    also = {id(resolved(entry)) for entry in by_name} if callable(value) else set()
    assert f"{package}.{name}" in by_name or id(value) in also, (
        f"add `::: {package}.{name}` to a page of docs/reference/"
    )


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda part: part)
def test_public_name_has_a_docstring(package: str, name: str) -> None:
    module = importlib.import_module(package)
    value = getattr(module, name)
    if inspect.isclass(value):
        text = value.__dict__.get("__doc__")
    elif inspect.isroutine(value):
        text = value.__doc__
    else:
        text = text_of_value(module, name) or getattr(value, "__doc__", None) * (package == "homeloop_pytest")
    assert text, f"{package}.{name} has no docstring (a value: a string in the line behind it)"


@pytest.mark.parametrize(("entry", "options"), ENTRIES, ids=[entry for entry, _ in ENTRIES])
def test_entry_is_there(entry: str, options: str) -> None:
    """mkdocstrings passes over a member that is not there, or has no docstring: then the page is silent about it."""
    found = resolved(entry)
    members = MEMBERS.search(options)
    for name in members[1].split(", ") if members else []:
        text = inspect.getattr_static(found, name).__doc__
        assert text, f"{entry}.{name} has no docstring"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_class_says_which_thread_may_call(cls: type) -> None:
    if issubclass(cls, HomeloopError) and cls is not HomeloopError:
        return                          # HomeloopError says it for all of them
    assert SAYS_THREAD.search(cls.__doc__ or ""), (
        f"{cls.__name__} does not say which thread may call its methods: "
        f"'Any thread.', 'Home thread.', 'A value, for any thread.'"
    )


def test_words_of_threads_are_told_from_others() -> None:
    said = "Any thread.", "made anywhere; its methods are for the home thread of x", "a thread without a loop"
    unsaid = "A lock.", "Shown at home.", "One of several threads.", "Ends the thread."
    assert [bool(SAYS_THREAD.search(text)) for text in (*said, *unsaid)] == [True] * len(said) + [False] * len(unsaid)


def test_every_subcommand_shows_its_help() -> None:
    choices = next(action.choices for action in command._parser()._actions if isinstance(action.choices, dict))
    page = (ROOT / "docs" / "reference" / "command.md").read_text(encoding="utf-8")
    assert re.findall(r"^<!-- help of homeloop ?(.*) -->$", page, re.MULTILINE) == ["", *choices]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"- (\S+\.md)$", navigation, re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages), "docs/ and the list at the end of mkdocs.yml differ"
