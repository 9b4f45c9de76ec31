"""docs/rules.md and the tests agree: each rule has tests that are named after it, and the page links to them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "rules.md"
RULES = range(1, 20)
NAMED = re.compile(r"def test_rule(\d+)_")
RULE_MENTIONED = re.compile(r"\brule (\d+)\b", re.IGNORECASE)


def files_by_rule() -> dict[int, set[str]]:
    """Rule -> the files that have a test of its name."""
    found: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for number in NAMED.findall(path.read_text(encoding="utf-8")):
            found.setdefault(int(number), set()).add(path.relative_to(ROOT).as_posix())
    return found


def sections(text: str) -> dict[int, str]:
    """Rule -> what the page says of it."""
    parts = re.split(r"^## Rule (\d+): .*$", text, flags=re.MULTILINE)
    return {int(number): part for number, part in zip(parts[1::2], parts[2::2], strict=True)}


def linked(section: str) -> set[str]:
    return set(re.findall(r"\]\(\.\./(tests/[^)#]+)\)", section))


TESTS = files_by_rule()
SECTIONS = sections(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_every_rule_once_and_no_other() -> None:
    assert list(SECTIONS) == list(RULES)
    assert set(TESTS) == set(RULES), "a test is named after a rule that there is not, or a rule has no test"


@pytest.mark.parametrize("number", RULES)
def test_rule_links_to_its_tests(number: int) -> None:
    """To some: a further file of tests needs no change of the page."""
    links = ", ".join(f"[{name.removeprefix('tests/')}](../{name})" for name in sorted(TESTS[number]))
    assert TESTS[number] & linked(SECTIONS[number]), f"docs/rules.md, rule {number}: add one of {links}"


@pytest.mark.parametrize("number", RULES)
def test_rule_links_to_no_file_without_a_test_of_its_name(number: int) -> None:
    """But for those that run through interleavings, or soak: they are about several rules at once."""
    others = {name for name in linked(SECTIONS[number]) - TESTS[number] if not name.startswith("tests/proof/")}
    assert others <= {"tests/core/test_soak.py"}


def test_rules_that_the_code_speaks_of_are_there() -> None:
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]:
        spoken = {int(number) for number in RULE_MENTIONED.findall(path.read_text(encoding="utf-8"))}
        assert spoken <= set(RULES), f"{path.relative_to(ROOT)} speaks of a rule that there is not"
