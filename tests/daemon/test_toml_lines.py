"""Where keys stand in a TOML text."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeloop.daemon.toml_lines import line_of, lines_of

TEXT = '''\
# a comment = no key
top = 1
"quoted key" = "a # no comment"   # a = comment

[daemon]
control = """
[not.a.header]
nor = 'a key'
"""
a.b = [
  1,   # one ]
  "]",
]
'literal' = { x = 1, y = [2] }
[[listen]]
socket = 'a'
[[listen]]   # second
port = 1
[listen.more]
deep = true
[nodes."my disk"]
driver = "file"
'''


@pytest.mark.parametrize(("path", "line"), [
    (("top",), 2), (("quoted key",), 3), (("daemon",), 5), (("daemon", "control"), 6), (("daemon", "a", "b"), 10),
    (("daemon", "literal"), 14), (("daemon", "literal", "y"), 14), (("listen", 0), 15), (("listen", 0, "socket"), 16),
    (("listen", 1), 17), (("listen", 1, "port"), 18), (("listen", 1, "more", "deep"), 20),
    (("nodes", "my disk"), 21), (("nodes", "my disk", "driver"), 22), (("nodes", "my disk", "none"), 21),
    (("no", "such"), 1),
])
def test_where(path: tuple[str | int, ...], line: int) -> None:
    assert line_of(lines_of(TEXT), path) == line


def keys_of(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """All key paths of what tomllib reads, but those in inline tables and lists."""
    found = set()
    for key, inner in value.items():
        found.add((*path, key))
        if isinstance(inner, dict):
            found |= keys_of(inner, (*path, key))
    return found


def test_the_text_is_toml() -> None:
    assert "daemon" in tomllib.loads(TEXT)


SCALARS = st.sampled_from([
    "1", "true", '"x # y"', "'\\'", '"""\nk = 1\n[h]\n"""', "'''\n]['''", "[1, [2,\n 3], # c ]\n]", "{a = '}'}",
    '"\\""', '""""quoted""""', "1979-05-27T07:32:00Z",
])
NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.data())
def test_every_key_is_found_in_the_line_that_has_it(names: list[str], data: Any) -> None:
    text, expected = "", {}
    for name in names:
        if data.draw(st.booleans()):
            text += f"[t.{name}]\n"
            expected["t", name] = text.count("\n")
        prefix = next(reversed(expected), ()) if text.startswith("[") else ()
        prefix = prefix[:2] if prefix else ()
        expected[(*prefix, f"k{name}")] = text.count("\n") + 1
        text += f"k{name} = {data.draw(SCALARS)} # end\n"
    tomllib.loads(text)
    lines = lines_of(text)
    for path, line in expected.items():
        if (path and path[0] == "t" and len(path) == 3) or (len(path) <= 2 and path in lines):
            assert lines[path] == line, text


@settings(max_examples=100, deadline=None)
@given(st.text("[]{}=\"'.#\n\\ab ", max_size=40))
def test_any_text_ends(text: str) -> None:
    lines_of(text)
