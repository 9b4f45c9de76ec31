"""The protocol's rules, one id each, and for each a test that carries it in its name or says it in its docstring.

An id is a line of our checklist of doc/proto.md and doc/uri.md of the NetworkBlockDevice/nbd project: what a server or
a client MUST and SHOULD (not) do, by section. In a test's name ids stand in front, in lower case: test_t14_o9_...;
X-1 (extended headers) is x_1. A rule that is nobody's here has a reason instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

SECTIONS = {
    "B": 8, "H": 9, "O": 9, "EN": 3, "AB": 2, "LI": 3, "IN": 11, "SR": 4, "MC": 12, "T": 14,     # handshake
    "Z": 9,                                                                                     # sizes
    "X": 14, "D": 4, "F": 5, "R": 14, "W": 2, "TR": 1, "CA": 1, "WZ": 3, "BS": 7, "E": 4,       # transmission
    "X-": 10,                                                                                   # extended headers
}
IDS = [f"{section}{number}" for section, last in SECTIONS.items() for number in range(1, last + 1)]

NOT_OURS = {
    "B7": "our client asks for block sizes",
    "B8": "says what may be in the baseline one day",
    "D2": "a Client is one connection; who opens several decides what its flush is to cover",
    "R7": "the data of a READ are all there before the first byte of its answer is made",
    "R11": "a READ above the maximum payload is refused, and that is far below 2^32 bytes",
}


def ids_of(name: str, docstring: str) -> Iterator[str]:
    """The ids that stand in front of a test's name, and those in its docstring."""
    words = name.removeprefix("test_").split("_")
    while words:
        if words[0] == "x" and len(words) > 1 and words[1].isdigit():
            yield f"X-{words[1]}"
            del words[:2]
        elif words[0].upper() in IDS:
            yield words.pop(0).upper()
        else:
            break
    yield from (found for found in re.findall(r"\b[A-Z]{1,2}-?[0-9]+\b", docstring) if found in IDS)


def carried() -> dict[str, list[str]]:
    """By id, the tests that carry it."""
    tests: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                for found in ids_of(node.name, ast.get_docstring(node) or ""):
                    tests.setdefault(found, []).append(f"{path.name}::{node.name}")
    return tests


def test_ids_of_a_test() -> None:
    assert list(ids_of("test_t14_o9_x_10_nothing_t3", "See MC3; not Q7 or UTF-8.")) == ["T14", "O9", "X-10", "MC3"]
    assert list(ids_of("test_x1_any", "")) == ["X1"]
    assert list(ids_of("test_any_t3", "")) == []
    assert len(IDS) == len(set(IDS)) == sum(SECTIONS.values())


def test_every_rule_has_a_test_or_a_reason() -> None:
    tests = carried()
    assert set(NOT_OURS) <= set(IDS)
    missing = [one for one in IDS if one not in tests and one not in NOT_OURS]
    assert not missing, f"no test carries {', '.join(missing)}"
