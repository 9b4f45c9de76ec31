"""The client's handshake: what it asks, what it makes of the answers, and what it refuses to believe."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeloop.errors import PeerError
from homeloop.nbd.client_handshake import ClientHandshake, ClientTurn, Entered, Refused, ServerInfo
from homeloop.nbd.handshake import Agreed, ExportInfo, Handshake, Negotiated
from homeloop.nbd.protocol import TransmissionFlag
from tests.nbd import wire

DISK = ExportInfo(
    name="disk", size=99 << 20, flags=TransmissionFlag(0x45), description="text", block_size_minimum=512,
    payload_bytes_max=1 << 20,
)


def reply(kind: int, data: bytes = b"", number: int = wire.GO) -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, number, kind, len(data)) + data


def hello(flags: int = 3) -> bytes:
    """Of a server that has no extended headers."""
    return b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags) + reply(wire.UNSUP, number=wire.EXT)


def greeting(flags: int = 3) -> bytes:
    """Of a server that has no structured replies."""
    return hello(flags) + reply(wire.UNSUP, number=wire.STRUCTURED)


EXPORT = reply(wire.INFO_REPLY, struct.pack(">HQH", 0, 4096, 1))
ACK = reply(wire.ACK)


def turns(*chunks: bytes, name: str = "disk") -> tuple[bytes, Entered | Refused | None]:
    handshake = ClientHandshake(name)
    said = b""
    end = None
    for chunk in chunks:
        if end is None:
            handshake.feed(chunk)
        while (turn := handshake.next_turn()) is not None:
            said += turn.data
            end = turn.end
    return said, end


ASKED = wire.client_flags(3) + wire.option(wire.EXT) + wire.option(wire.STRUCTURED)
GO = wire.info(wire.GO, "disk", (3, 1, 2))
SET = wire.meta(wire.SET_META, "disk", ("base:allocation",))
STRUCTURED_ACK = reply(wire.ACK, number=wire.STRUCTURED)
SET_ACK = reply(wire.ACK, number=wire.SET_META)


def context(name: bytes = b"base:allocation", number: int = 77) -> bytes:
    return reply(wire.META_REPLY, struct.pack(">I", number) + name, wire.SET_META)


def test_en2_in1_z5_go_comes_before_export_name() -> None:
    said, end = turns(greeting())
    assert said == ASKED + GO
    assert end is None


def test_o1_sr3_bs1_mc2_options_wait_for_their_replies() -> None:
    said, end = turns(hello())
    assert said == ASKED
    said, end = turns(hello(), STRUCTURED_ACK)
    assert said == ASKED + SET
    said, end = turns(hello(), STRUCTURED_ACK, context())
    assert said == ASKED + SET
    said, end = turns(hello(), STRUCTURED_ACK, context(), SET_ACK, EXPORT + ACK)
    assert said == ASKED + SET + GO
    assert isinstance(end, Entered)
    assert (end.info.structured, end.info.allocation_id) == (True, 77)


@pytest.mark.parametrize("answer", [
    SET_ACK, reply(wire.UNSUP, number=wire.SET_META), reply(wire.UNKNOWN, number=wire.SET_META),
    context() + reply(wire.TOO_BIG, number=wire.SET_META),
])
def test_sr3_mc6_no_context(answer: bytes) -> None:
    said, end = turns(hello() + STRUCTURED_ACK + answer + EXPORT + ACK)
    assert said == ASKED + SET + GO
    assert isinstance(end, Entered)
    assert (end.info.structured, end.info.allocation_id) == (True, None)


@pytest.mark.parametrize("answers", [
    reply(wire.SHUTDOWN, b"bye", wire.STRUCTURED), STRUCTURED_ACK + reply(wire.SHUTDOWN, b"bye", wire.SET_META),
])
def test_o7_a_server_that_shuts_down(answers: bytes) -> None:
    said, end = turns(hello() + answers)
    assert said.endswith(wire.option(wire.ABORT))
    assert end == Refused(reply=wire.SHUTDOWN, text="bye")


def test_h6_no_zeroes_only_if_offered() -> None:
    said, _ = turns(greeting(1))
    assert said[:4] == wire.client_flags(1)


def test_h5_unknown_handshake_flags_are_ignored() -> None:
    said, _ = turns(greeting(0xFF03))
    assert said[:4] == wire.client_flags(3)


@pytest.mark.parametrize(("data", "says"), [
    (b"SSH-2.0-OpenSSH_9.2p1 Debian", "no NBD server"),
    (b"NBDMAGIC" + struct.pack(">QH", 0x420281861253, 0), "oldstyle"),
    (b"NBDMAGIC" + bytes(10), "second magic"),
    (greeting(2), "fixed newstyle"),
    (hello() + ACK, "reply to option 7, asked was 8"),
    (hello() + reply(wire.SERVER, number=wire.STRUCTURED), "reply type 2 to STRUCTURED_REPLY"),
    (hello() + STRUCTURED_ACK + reply(wire.SERVER, number=wire.SET_META), "reply type 2 to SET_META"),
    (hello() + STRUCTURED_ACK + reply(wire.META_REPLY, b"abc", wire.SET_META), "meta context of 3 bytes"),
    (hello() + STRUCTURED_ACK + context(b"x:y"), "meta context b'x:y'"),
    (hello() + STRUCTURED_ACK + context() * 2, "asked was once"),
    (hello() + STRUCTURED_ACK + context(b"\xff"), "UTF-8"),
    (greeting() + bytes(20), "option reply magic"),
    (greeting() + reply(wire.ACK, number=wire.LIST), "reply to option 3"),
    (greeting() + ACK, "without the size"),
    (greeting() + reply(wire.SERVER), "reply type 2"),
    (greeting() + reply(wire.INFO_REPLY, b"\0"), "of 1 bytes"),
    (greeting() + reply(wire.INFO_REPLY, bytes(11)), "INFO_EXPORT of 11 bytes"),
    (greeting() + reply(wire.INFO_REPLY, b"\0\x03" + bytes(11)), "INFO_BLOCK_SIZE of 13 bytes"),
    (greeting() + reply(wire.INFO_REPLY, struct.pack(">HIII", 3, 3, 4096, 4096)), "minimum block size 3"),
    (greeting() + reply(wire.INFO_REPLY, struct.pack(">HIII", 3, 512, 256, 4096)), "do not fit"),
    (greeting() + reply(wire.INFO_REPLY, struct.pack(">HIII", 3, 512, 1024, 1)), "do not fit"),
    (greeting() + reply(wire.INFO_REPLY, b"\0\x01\xff"), "UTF-8"),
    (greeting() + struct.pack(">QIII", 0x0003E889045565A9, wire.GO, 3, 1 << 30), "reply of 1073741824 bytes"),
    (greeting() + reply(wire.INFO_REPLY, b"\x47\x11") * 65, "more than 64"),
])
def test_a_broken_server(data: bytes, says: str) -> None:
    with pytest.raises(PeerError, match=says):
        turns(data)


def test_in5_unknown_information_in_any_order() -> None:
    unknown, name = reply(wire.INFO_REPLY, b"\x47\x11xyz"), reply(wire.INFO_REPLY, b"\0\x01n")
    _, end = turns(greeting(), unknown, name + EXPORT, ACK)
    assert end == Entered(info=ServerInfo(name="n", size=4096, flags=TransmissionFlag(1)), leftover=b"")


def test_x5_unknown_transmission_flags_are_kept_as_numbers() -> None:
    _, end = turns(greeting(), reply(wire.INFO_REPLY, struct.pack(">HQH", 0, 1, 0xFFFF)), ACK)
    assert isinstance(end, Entered)
    assert int(end.info.flags) == 0xFFFF


@pytest.mark.parametrize(("flags", "zeroes"), [(3, 0), (1, 124)])
def test_in11_export_name_when_go_is_unknown(flags: int, zeroes: int) -> None:
    said, end = turns(
        greeting(flags), reply(wire.UNSUP), struct.pack(">QH", 4096, 3) + bytes(zeroes) + b"left"
    )
    assert said.endswith(wire.option(wire.EXPORT_NAME, b"disk"))
    info = ServerInfo(name="disk", size=4096, flags=TransmissionFlag(3))
    assert end == Entered(info=info, leftover=b"left")


@pytest.mark.parametrize("kind", [wire.UNKNOWN, wire.POLICY, wire.TLS_REQD, wire.SHUTDOWN, (1 << 31) + 4711])
def test_o4_o7_ab2_refusal_is_answered_with_abort(kind: int) -> None:
    said, end = turns(greeting(), reply(kind, b"not \xff today"))
    assert said.endswith(wire.option(wire.ABORT))
    assert end == Refused(reply=kind, text="not \ufffd today")


def test_h9_the_name_is_checked_here() -> None:
    with pytest.raises(ValueError, match="4097 bytes"):
        ClientHandshake("x" * 4097)


def test_both_sides_understand_each_other() -> None:
    server = Handshake({"disk": DISK})
    client = ClientHandshake("")
    client.feed(server.greeting())
    ends: list[object] = []
    while len(ends) < 2:
        while (turn := client.next_turn()) is not None:
            if turn.data:
                server.feed(turn.data)
            ends += [turn.end] if turn.end else []
        while (answer := server.next_turn()) is not None:
            if answer.data:
                client.feed(answer.data)
            ends += [answer.end] if answer.end else []
    agreed = Agreed(structured=True, extended=True, allocation_id=1)
    assert Negotiated(export=DISK, leftover=b"", agreed=agreed) in ends
    assert Entered(leftover=b"", info=ServerInfo(
        name="disk", size=99 << 20, flags=TransmissionFlag(0x45 | 0x80 | 0x1000), description="text",
        block_size_minimum=512, payload_bytes_max=1 << 20, structured=True, extended=True, allocation_id=1,
    )) in ends


@given(st.randoms(use_true_random=False), st.binary(max_size=3))
def test_any_cut_gives_the_same(dice: random.Random, leftover: bytes) -> None:
    start = dice.choice([greeting(), hello() + STRUCTURED_ACK + context() + SET_ACK])
    data = start + EXPORT + reply(wire.INFO_REPLY, b"\0\x02text") + ACK
    whole = turns(data + leftover)
    # The last byte of the handshake comes with what follows it, or `leftover` would depend on the cut.
    cuts = sorted(dice.randrange(len(data)) for _ in range(5))
    last = data[cuts[-1]:] + leftover
    assert turns(*[data[a:b] for a, b in zip([0, *cuts], cuts, strict=False)], last) == whole


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_the_peers_error(data: bytes) -> None:
    for before in (b"", greeting(), greeting() + EXPORT[:16]):
        try:
            turns(before + data)
        except PeerError:
            pass


def test_nothing_follows_the_end() -> None:
    handshake = ClientHandshake("")
    handshake.feed(greeting() + EXPORT + ACK)
    ends: list[ClientTurn] = []
    while (turn := handshake.next_turn()) is not None:
        ends.append(turn)
    assert [turn.end is not None for turn in ends] == [False, False, False, False, True]
