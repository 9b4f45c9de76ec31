"""One client's protocol, without a socket: the points of QEMU's specification that its clients lean on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from homeloop.daemon.qmp.session import Command, Refusal, Session

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "x"}


def session(*, negotiated: bool = True) -> Session:
    made = Session(VERSION)
    if negotiated:
        made.feed(b'{"execute":"qmp_capabilities"}')
        assert answer_of(made.next_item()) == {"return": {}}
    return made


def answer_of(item: object) -> Any:
    assert isinstance(item, Refusal), item
    assert item.line.endswith(b"\r\n")
    assert item.line.isascii()
    assert item.line.count(b"\n") == 1
    return json.loads(item.line)


def asked(text: str, *, negotiated: bool = True) -> Any:
    made = session(negotiated=negotiated)
    made.feed(text.encode())
    return made.next_item()


def test_greeting() -> None:
    assert json.loads(Session(VERSION).greeting()) == {"QMP": {"version": VERSION, "capabilities": []}}


@pytest.mark.parametrize("id", ["null", "[]", '{"a":[null]}', '"__qmp#00000"', "1.5", "true"])
def test_any_id_comes_back(id: str) -> None:
    command = asked(f'{{"execute":"x","id":{id}}}')
    assert isinstance(command, Command)
    assert json.loads(Session.answer(command, [1])) == {"return": [1], "id": json.loads(id)}
    refused = json.loads(Session.refuse(command, "GenericError", "no"))
    assert refused == {"error": {"class": "GenericError", "desc": "no"}, "id": json.loads(id)}
    assert answer_of(asked(f'{{"execute":1,"id":{id}}}'))["id"] == json.loads(id)


def test_no_id_no_id() -> None:
    command = asked('{"execute":"x","arguments":{"a":1}}')
    assert command == Command("x", {"a": 1}, {})
    assert json.loads(Session.answer(command, {})) == {"return": {}}


def test_before_negotiation() -> None:
    refused = answer_of(asked('{"execute":"query-version","id":1}', negotiated=False))
    text = "Expecting capabilities negotiation with 'qmp_capabilities'"
    assert refused == {"error": {"class": "CommandNotFound", "desc": text}, "id": 1}


def test_negotiation_takes_effect_for_what_follows_in_the_same_packet() -> None:
    made = session(negotiated=False)
    made.feed(b'{"execute":"x"}{"execute":"qmp_capabilities","arguments":{"enable":[]}}{"execute":"x"}')
    assert "error" in answer_of(made.next_item())
    assert not made.negotiated
    assert answer_of(made.next_item()) == {"return": {}}
    assert made.negotiated
    assert made.next_item() == Command("x", {}, {})
    assert made.next_item() is None


@pytest.mark.parametrize(("text", "says"), [
    ('{"execute":"qmp_capabilities","arguments":{"x":1}}', "Parameter 'x' is unexpected"),
    ('{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}', "Capability 'oob' not available"),
    ('{"execute":"qmp_capabilities","arguments":{"enable":1}}', "Invalid parameter type for 'enable', expected: array"),
])
def test_negotiation_refused(text: str, says: str) -> None:
    assert answer_of(asked(text, negotiated=False))["error"]["desc"] == says


def test_negotiation_twice() -> None:
    refused = answer_of(asked('{"execute":"qmp_capabilities","id":3}'))
    assert refused["id"] == 3
    assert refused["error"]["class"] == "CommandNotFound"
    assert "already complete" in refused["error"]["desc"]


@pytest.mark.parametrize(("text", "says"), [
    ("[1]", "QMP input must be a JSON object"),
    ('"x"', "QMP input must be a JSON object"),
    ("nope ", "JSON parse error, invalid keyword 'nope'"),
    ("{}", "QMP input lacks member 'execute'"),
    ('{"execute":5}', "QMP input member 'execute' must be a string"),
    ('{"execute":"x","arguments":[]}', "QMP input member 'arguments' must be an object"),
    ('{"execute":"x","foo":1}', "QMP input member 'foo' is unexpected"),
    ('{"exec-oob":"x"}', "QMP input member 'exec-oob' is unexpected"),
])
def test_what_is_no_command(text: str, says: str) -> None:
    assert answer_of(asked(text)) == {"error": {"class": "GenericError", "desc": says}}


def test_events() -> None:
    line = Session.event("GONE", {"id": "e"}, time_us=12_000_034)
    assert json.loads(line) == {"timestamp": {"seconds": 12, "microseconds": 34}, "event": "GONE", "data": {"id": "e"}}
    assert "data" not in json.loads(Session.event("GONE", {}, time_us=0))
