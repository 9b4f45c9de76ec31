"""The stream of JSON values: whole, byte by byte and at any cut it gives the same; any bytes end clean."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeloop.daemon.qmp.parsing import DEPTH_MAX, JsonError, TooLong, ValueReader, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)


def read_all(reader: ValueReader) -> list[object]:
    """All that is there: values, and errors as their texts."""
    found: list[object] = []
    while True:
        try:
            value = reader.next_value()
        except JsonError as error:
            found.append(str(error))
            if isinstance(error, TooLong):
                return found
            continue
        if value is None:
            return found
        found += value


def whole(data: bytes) -> list[object]:
    reader = ValueReader()
    reader.feed(data)
    return read_all(reader)


def in_pieces(data: bytes, cuts: list[int]) -> list[object]:
    reader, found = ValueReader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        reader.feed(data[start:stop])
        found += read_all(reader)
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(OBJECTS, max_size=3), st.booleans(), st.sampled_from(["", " ", "\r\n"]))
def test_what_json_writes_is_read(values: list[object], ascii_only: bool, between: str) -> None:
    """Without anything between two objects, too; and at every cut the same."""
    data = between.join(json.dumps(value, ensure_ascii=ascii_only) for value in values).encode()
    if b"\x7f" in data or any(part in data for part in (b"\xf5", b"\xc0")):
        return                      # DEL is a control character here
    assert whole(data) == values
    assert in_pieces(data, list(range(1, len(data)))) == values


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40) | st.text("{}[]\"',:\\ ntfu01e-.", max_size=40).map(str.encode), st.randoms())
def test_any_bytes_end_clean(data: bytes, chance: random.Random) -> None:
    """Values or JsonErrors, the same at every cut, and nothing else; then the reader is as good as new."""
    expected = whole(data)
    assert in_pieces(data, list(range(1, len(data)))) == expected
    assert in_pieces(data, sorted(chance.sample(range(len(data) + 1), min(3, len(data))))) == expected
    reader = ValueReader()
    reader.feed(data)
    read_all(reader)
    reader.feed(b"\x01")            # a client that lost its place
    read_all(reader)
    reader.feed(b'{"a":1}')
    assert read_all(reader) == [{"a": 1}]
    assert reader.buffered_bytes == 0


@pytest.mark.parametrize(("text", "value"), [
    (b"{'execute':'x'}", {"execute": "x"}),
    (rb'{"a":"\u00e4\ud83d\ude00\u0000\"\/"}', {"a": 'ä😀\0"/'}),
    (rb"{'a':'\''}", {"a": "'"}),
    (b'{"a":[1,-0,1.5,1e3,true,false,null,[],{}]}', {"a": [1, 0, 1.5, 1000.0, True, False, None, [], {}]}),
])
def test_what_is_read(text: bytes, value: object) -> None:
    assert whole(text) == [value]


@pytest.mark.parametrize(("text", "says"), [
    (b'{"a":1,"a":2}', "duplicate key"),
    (b'{"a":01}', "stray '01'"),
    (b'{"a":nope}', "invalid keyword 'nope'"),
    (b'{"a":1e400}', "out of range"),
    (b'{"a":' + b"9" * 5000 + b"}", "out of range"),
    (rb'{"a":"\x"}', "invalid escape"),
    (rb'{"a":"\ud800"}', "invalid Unicode"),
    (b'{"a":"\xe4"}', "invalid UTF-8"),
    (b'{"a",}', "missing :"),
    (b'{"a" 1}', "missing :"),
    (b'{"a":}', "expecting value"),
    (b'{"a":1,}', "expecting value"),
    (b'{"a":1 "b":2}', "separator in dict"),
    (b'{"a":[1 2]}', "separator in list"),
    (b'{"a":[1,]}', "expecting value"),
    (b"{1:2}", "key is not a string"),
    (b"{[]:2}", "expecting value"),
    (b'{"a":"\n"}', "control character"),
])
def test_what_is_refused(text: bytes, says: str) -> None:
    """One error, and the next object is read."""
    errors = whole(text + b'{"next":1}')
    assert len(errors) == 2
    assert says in str(errors[0])
    assert errors[1] == {"next": 1}


@pytest.mark.parametrize("bad", [b"\x00", b"\x01", b"\x1f", b"\x7f", b"\xff", b"\xc0"])
def test_a_control_character_resets(bad: bytes) -> None:
    for before in (b'{"open":[{', b'{"open":"', b'{"open":"\\', b"tru"):
        first, second = whole(before + bad + b'{"next":1}')
        assert "stray" in str(first), before
        assert second == {"next": 1}


def test_a_closing_bracket_that_fits_nothing() -> None:
    assert [str(item) for item in whole(b'}{"a":[}{"b":1}')] == [
        "JSON parse error, expecting value", "JSON parse error, unexpected '}'", "{'b': 1}",
    ]


def test_depth_is_bounded() -> None:
    assert whole(b"[" * DEPTH_MAX + b"]" * DEPTH_MAX)[0] != ""
    found = whole(b"[" * 100_000)
    assert all("nesting depth" in str(error) for error in found)
    with pytest.raises(JsonError, match="nesting depth"):
        parse(b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1))


def test_size_is_bounded() -> None:
    reader = ValueReader(size_bytes_max=100)
    reader.feed(b'{"a":"' + b"x" * 100)
    with pytest.raises(TooLong, match="more than 100 bytes"):
        reader.next_value()


def test_a_long_value_in_small_pieces_is_looked_at_once() -> None:
    """Each byte is looked at once, not again with every piece."""
    reader = ValueReader()
    reader.feed(b'{"a":"')
    for _ in range(2000):
        reader.feed(b"x" * 100)
        assert reader.next_value() is None
    reader.feed(b'"}')
    assert reader.next_value() == ({"a": "x" * 200_000},)


@pytest.mark.parametrize(("text", "says"), [
    (b"", "premature EOI"), (b"{", "premature EOI"), (b"1 2", "expecting value"),
])
def test_parse_takes_one_whole_value(text: bytes, says: str) -> None:
    with pytest.raises(JsonError, match=says):
        parse(text)
