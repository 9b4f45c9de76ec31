"""What arguments must look like, and QEMU's words for what is wrong: tests/daemon/qmp/test_qemu.py compares them."""

from __future__ import annotations

from typing import Any

import pytest

from homeloop.daemon.qmp.arguments import (
    ANY,
    BOOL,
    INT,
    SIZE,
    STRING,
    ArgumentError,
    Choice,
    Enum,
    Integer,
    ListOf,
    Member,
    Struct,
    Union,
)

INNER = Struct(Member("port", STRING), Member("flag", BOOL, optional=True))
OUTER = Struct(
    Member("s", STRING), Member("i", INT, optional=True), Member("e", Enum("on", "off"), optional=True),
    Member("o", INNER, optional=True), Member("l", ListOf(INT, length_max=2), optional=True),
    Member("z", SIZE, optional=True), Member("any", ANY, optional=True),
    Member("r", Integer(low=1, high=5), optional=True),
)
CHILD = Choice("BlockdevRef", {str: lambda: STRING, dict: lambda: TREE})
TREE: Any = Union("driver", {"leaf": (), "node": (Member("file", CHILD),)}, Member("name", STRING, optional=True))


@pytest.mark.parametrize("value", [
    {"s": ""}, {"s": "x", "i": -1, "e": "on", "o": {"port": "1"}, "l": [1, 2], "z": 0, "any": [None], "r": 5},
])
def test_good_arguments_come_back(value: dict[str, object]) -> None:
    assert OUTER.check(value) == value


@pytest.mark.parametrize(("value", "says"), [
    ({}, "Parameter 's' is missing"),
    ({"s": 1}, "Invalid parameter type for 's', expected: string"),
    ({"s": "", "x": 1}, "Parameter 'x' is unexpected"),
    ({"s": "", "i": True}, "Invalid parameter type for 'i', expected: integer"),
    ({"s": "", "i": 1.0}, "Invalid parameter type for 'i', expected: integer"),
    ({"s": "", "i": 1 << 63}, "Invalid parameter type for 'i', expected: integer"),
    ({"s": "", "e": "no"}, "Parameter 'e' does not accept value 'no'"),
    ({"s": "", "e": 1}, "Invalid parameter type for 'e', expected: string"),
    ({"s": "", "o": []}, "Invalid parameter type for 'o', expected: object"),
    ({"s": "", "o": {}}, "Parameter 'o.port' is missing"),
    ({"s": "", "o": {"port": "", "flag": 1}}, "Invalid parameter type for 'o.flag', expected: boolean"),
    ({"s": "", "o": {"port": "", "x": 1}}, "Parameter 'o.x' is unexpected"),
    ({"s": "", "l": {}}, "Invalid parameter type for 'l', expected: array"),
    ({"s": "", "l": [1, "a"]}, "Invalid parameter type for 'l[1]', expected: integer"),
    ({"s": "", "l": [1, 2, 3]}, "Parameter 'l' has 3 elements, at most 2 fit"),
    ({"s": "", "z": -1}, "Parameter 'z' expects a non-negative number below 2^64"),
    ({"s": "", "r": 0}, "Parameter 'r' expects a number from 1 to 5"),
    ([], "Invalid parameter type for 'arguments', expected: object"),
])
def test_what_is_wrong(value: object, says: str) -> None:
    with pytest.raises(ArgumentError) as failed:
        OUTER.check(value)
    assert str(failed.value) == says


@pytest.mark.parametrize(("value", "says"), [
    ({}, "Parameter 'driver' is missing"),
    ({"driver": "x"}, "Parameter 'driver' does not accept value 'x'"),
    ({"driver": "leaf", "file": "a"}, "Parameter 'file' is unexpected"),
    ({"driver": "node"}, "Parameter 'file' is missing"),
    ({"driver": "node", "file": 1}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ({"driver": "node", "file": {"driver": "leaf", "x": 1}}, "Parameter 'file.x' is unexpected"),
    ({"driver": "node", "file": {}}, "Parameter 'file.driver' is missing"),
    ([], "Invalid parameter type for 'arguments', expected: object"),
])
def test_unions(value: object, says: str) -> None:
    with pytest.raises(ArgumentError) as failed:
        TREE.check(value)
    assert str(failed.value) == says


def test_a_union_in_a_union() -> None:
    value = {"driver": "node", "name": "a", "file": {"driver": "node", "file": "b"}}
    assert TREE.check(value) == value
