"""Pure: in which line of a TOML text a key stands. tomllib reads values, and says nothing of places.

Knows only as much of TOML as that needs: headers, keys, where values end. For texts that tomllib has accepted.
"""

from __future__ import annotations

import ast
import re
from typing import Final, TypeAlias

__all__ = ["KeyPath", "line_of", "lines_of"]

KeyPath: TypeAlias = tuple[str | int, ...]      # ("listen", 1, "port"): key of the second [[listen]]

_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY: Final = re.compile(r"""[ \t]*(?:"((?:[^"\\\n]|\\.)*)"|'([^'\n]*)'|([A-Za-z0-9_-]+))[ \t]*""")
_VALUE: Final = re.compile(
    r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|#[^\n]*|[\[\]{}\n]''', re.DOTALL
)


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """Return the line of a key, or of the nearest thing around it that has one; 1 if there is none."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return 1


def lines_of(text: str) -> dict[KeyPath, int]:
    """Return the line, counted from 1, of every key and table that is written out."""
    found: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}     # of each array of tables: its elements so far
    table: KeyPath = ()
    at = _skip(text, 0)
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        header = 2 if text.startswith("[[", at) else 1 if text[at] == "[" else 0
        keys, at = _keys(text, at + header)
        if not keys:
            break                       # not TOML: tomllib has said so
        if header:
            table = _table(keys, counts, is_array=header == 2)
            found.setdefault(table, line)
            at = _skip(text, at + header)
            continue
        for count in range(1, len(keys) + 1):
            found.setdefault((*table, *keys[:count]), line)
        at = _skip(text, _value_end(text, at + 1))
    return found


def _table(keys: tuple[str, ...], counts: dict[KeyPath, int], *, is_array: bool) -> KeyPath:
    """The path of a header: in an array of tables it means the last element."""
    path: KeyPath = ()
    for key in keys[:-1]:
        path = (*path, key)
        if path in counts:
            path = (*path, counts[path] - 1)
    path = (*path, keys[-1])
    if is_array:
        counts[path] = counts.get(path, 0) + 1
        path = (*path, counts[path] - 1)
    return path


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return at if blank is None else blank.end()


def _keys(text: str, at: int) -> tuple[tuple[str, ...], int]:
    """A dotted key, and where it ends."""
    keys: list[str] = []
    while (found := _KEY.match(text, at)) is not None:
        quoted, literal, bare = found.groups()
        keys.append(_unquoted(quoted) if quoted is not None else literal if literal is not None else bare)
        at = found.end()
        if not text.startswith(".", at):
            break
        at += 1
    return tuple(keys), at


def _unquoted(inside: str) -> str:
    try:
        return str(ast.literal_eval(f'"{inside}"'))
    except (SyntaxError, ValueError):
        return inside


def _value_end(text: str, at: int) -> int:
    depth = 0
    for found in _VALUE.finditer(text, at):
        mark = found[0]
        if mark == "\n" and not depth:
            return found.end()
        depth += (mark in "[{") - (mark in "]}") if len(mark) == 1 else 0
    return len(text)
