"""The server's handshake, rule by rule; the ids are those of the protocol checklist."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeloop.errors import PeerError
from homeloop.nbd.handshake import Agreed, Ended, ExportInfo, Handshake, HandshakeLimits, Negotiated, TlsMode
from homeloop.nbd.protocol import TransmissionFlag
from tests.nbd import wire
from tests.nbd.wire import OptionAnswer

DISK = ExportInfo(
    name="disk", size=1 << 20, flags=TransmissionFlag(0x45), description="a disk", block_size_minimum=512,
    payload_bytes_max=1 << 24,
)
OTHER = ExportInfo(name="other", size=7, flags=TransmissionFlag(3))
BOTH = {"disk": DISK, "other": OTHER}
LIMITS = HandshakeLimits(options_max=20, option_bytes_max=8192, skip_bytes_max=1 << 17)


class Talk:
    """One handshake, and all that came out of it."""

    def __init__(
        self,
        exports: dict[str, ExportInfo] | None = None,
        flags: bytes | None = None,
        tls: TlsMode = TlsMode.NONE,
    ) -> None:
        self.handshake = Handshake(BOTH if exports is None else exports, limits=LIMITS, tls=tls)
        self.sent = b""
        self.secure = 0     # how often TLS has begun
        self.end: Negotiated | Ended | None = None
        self.say(wire.client_flags() if flags is None else flags)

    def say(self, *chunks: bytes) -> list[OptionAnswer]:
        """Feed, and return what was answered to that."""
        before = len(self.sent)
        self.feed(chunks)
        return wire.option_answers(self.sent[before:])

    def feed(self, chunks: Iterable[bytes]) -> None:
        for chunk in chunks:
            if self.end is not None:
                return
            self.handshake.feed(chunk)
            while (turn := self.handshake.next_turn()) is not None:
                self.sent += turn.data
                self.end = turn.end
                self.secure += turn.starttls

    def say_kinds(self, *chunks: bytes) -> list[int]:
        return [answer.kind for answer in self.say(*chunks)]


def test_h1_h2_greeting() -> None:
    assert Talk().handshake.greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 8, 1 << 31, 7])
def test_h4_unknown_client_flag(flags: int) -> None:
    with pytest.raises(PeerError, match=f"client flags {flags:#x}"):
        Talk(flags=wire.client_flags(flags))


def test_h3_without_fixed_newstyle_only_export_name() -> None:
    with pytest.raises(PeerError, match="LIST without fixed newstyle"):
        Talk(flags=wire.client_flags(2)).say(wire.option(wire.LIST))
    talk = Talk(flags=wire.client_flags(0))
    talk.feed([wire.option(wire.EXPORT_NAME, b"disk")])
    assert talk.sent == struct.pack(">QH124x", DISK.size, 0x45)


def test_h7_no_zeroes_agreed() -> None:
    talk = Talk()
    talk.feed([wire.option(wire.EXPORT_NAME, b"disk")])
    assert talk.sent == struct.pack(">QH", DISK.size, 0x45)
    assert talk.end == Negotiated(export=DISK, leftover=b"")


def test_h7_go_never_has_zeroes() -> None:
    talk = Talk(flags=wire.client_flags(1))
    assert talk.say(wire.info(wire.GO, "disk"))[-1] == OptionAnswer(wire.GO, wire.ACK, b"")


@pytest.mark.parametrize(("name", "kind"), [
    (b"a\0b", wire.INVALID),
    (b"\xff", wire.INVALID),
    (b"x" * 4097, wire.TOO_BIG),
    (b"x" * 4096, wire.UNKNOWN),
])
def test_h9_names(name: bytes, kind: int) -> None:
    data = struct.pack(">I", len(name)) + name + b"\0\0"
    assert Talk().say_kinds(wire.option(wire.GO, data)) == [kind]


@pytest.mark.parametrize("name", [b"a\0b", b"\xff", b"x" * 4097, b"x" * 70000])
def test_h9_names_in_export_name(name: bytes) -> None:
    with pytest.raises(PeerError, match=r"export name|EXPORT_NAME"):
        Talk().say(wire.option(wire.EXPORT_NAME, name))


@pytest.mark.parametrize("number", [0, wire.PEEK, 12, 0x7654321])
def test_b3_unknown_option_is_skipped(number: int) -> None:
    talk = Talk()
    assert talk.say_kinds(wire.option(number, b"data"), wire.option(wire.LIST)) == [
        wire.UNSUP, wire.SERVER, wire.SERVER, wire.ACK,
    ]


def flags_told(answers: list[OptionAnswer]) -> list[int]:
    """The transmission flags in every INFO_EXPORT."""
    infos = [struct.unpack(">HQH", a.data) for a in answers if a.kind == wire.INFO_REPLY and len(a.data) == 12]
    return [flags for kind, _, flags in infos if kind == 0]


@pytest.mark.parametrize("number", [wire.INFO, wire.GO])
def test_sr2_sr4_x6_df_is_offered_once_structured_replies_are_agreed(number: int) -> None:
    talk = Talk()
    assert flags_told(talk.say(wire.info(wire.INFO, "disk"))) == [0x45]
    assert talk.say_kinds(wire.option(wire.STRUCTURED)) == [wire.ACK]
    assert flags_told(talk.say(wire.info(number, "disk"))) == [0x45 | 0x80]


def test_sr1_structured_reply_has_no_data() -> None:
    talk = Talk()
    assert talk.say_kinds(wire.option(wire.STRUCTURED, b"x")) == [wire.INVALID]
    assert flags_told(talk.say(wire.info(wire.GO, "disk"))) == [0x45]
    assert isinstance(talk.end, Negotiated)
    assert talk.end.agreed == Agreed()


def test_sr2_agreed_holds_for_export_name_too() -> None:
    talk = Talk()
    talk.say(wire.option(wire.STRUCTURED))
    talk.feed([wire.option(wire.EXPORT_NAME, b"other")])
    assert talk.sent.endswith(struct.pack(">QH", 7, 3 | 0x80))
    assert talk.end == Negotiated(export=OTHER, leftover=b"", agreed=Agreed(structured=True))


def test_t2_starttls_without_tls() -> None:
    kinds = Talk().say_kinds(wire.option(wire.STARTTLS), wire.info(wire.GO, "disk"))
    assert kinds[0] in (wire.UNSUP, wire.POLICY)
    assert wire.TLS_REQD not in kinds
    assert kinds[-1] == wire.ACK


@given(st.integers(0, 2**32 - 1))
def test_o2_replies_carry_the_option(number: int) -> None:
    if number == wire.EXPORT_NAME:
        return
    answers = Talk().say(wire.option(number))
    assert answers
    assert {answer.option for answer in answers} == {number}


def test_o3_o8_mistakes_are_answered() -> None:
    """Whatever is asked wrongly, the next option is still heard."""
    talk = Talk()
    assert talk.say_kinds(
        wire.option(wire.GO, b""),
        wire.option(wire.INFO, b"\0\0\0\x05disk\0\0"),
        wire.option(wire.GO, b"\0\0\0\x04disk\0\x02\0\0"),
        wire.option(wire.GO, b"\0\0\0\x04disk\0\x00\0\0"),
        wire.option(wire.LIST, b"x"),
        wire.info(wire.GO, "no"),
    ) == [wire.INVALID] * 5 + [wire.UNKNOWN]
    assert talk.end is None
    assert talk.say_kinds(wire.info(wire.GO, "disk"))[-1] == wire.ACK


def test_o3_option_above_the_limit_is_skipped() -> None:
    talk = Talk()
    data = bytes(LIMITS.option_bytes_max + 1)
    assert talk.say_kinds(wire.option(wire.GO, data)) == [wire.TOO_BIG]
    assert talk.say_kinds(wire.option(4711, data)) == [wire.UNSUP]
    assert talk.say_kinds(wire.option(wire.LIST, data)) == [wire.INVALID]
    assert talk.say_kinds(wire.info(wire.INFO, "disk"))[-1] == wire.ACK


def test_o3_skipped_data_is_not_kept() -> None:
    talk = Talk()
    talk.say(struct.pack(">QII", wire.IHAVEOPT, wire.GO, LIMITS.skip_bytes_max))
    for _ in range(LIMITS.skip_bytes_max // 1024 - 1):
        assert talk.say(bytes(1024)) == []
        assert talk.handshake.buffered_bytes == 0
    assert [answer.kind for answer in talk.say(bytes(1024))] == [wire.TOO_BIG]


def test_o3_what_looks_like_an_attack() -> None:
    with pytest.raises(PeerError, match=f"LIST with {LIMITS.skip_bytes_max + 1} bytes"):
        Talk().say(struct.pack(">QII", wire.IHAVEOPT, wire.LIST, LIMITS.skip_bytes_max + 1))
    talk = Talk()
    talk.say(wire.option(wire.LIST) * LIMITS.options_max)
    with pytest.raises(PeerError, match="more than 20 options"):
        talk.say(wire.option(wire.LIST))


def test_o3_option_magic() -> None:
    with pytest.raises(PeerError, match="option magic is 0x0000000000000000"):
        Talk().say(bytes(16))


def test_o6_shutting_down() -> None:
    talk = Talk()
    talk.handshake.shutting_down = True
    assert talk.say_kinds(
        wire.option(wire.LIST), wire.info(wire.GO, "disk"), wire.info(wire.INFO, "disk"), wire.option(4711),
    ) == [wire.SHUTDOWN] * 4
    assert talk.say_kinds(wire.option(wire.ABORT)) == [wire.ACK]
    assert talk.end == Ended()
    talk = Talk()
    talk.handshake.shutting_down = True
    talk.feed([wire.option(wire.EXPORT_NAME, b"disk")])
    assert isinstance(talk.end, Ended)


@pytest.mark.parametrize("name", [b"no", b""])
def test_en1_unknown_export_ends_the_session(name: bytes) -> None:
    talk = Talk()
    assert talk.say(wire.option(wire.EXPORT_NAME, name)) == []
    assert isinstance(talk.end, Ended)
    assert repr(name.decode()) in talk.end.reason


def test_en3_the_empty_name() -> None:
    only = Talk({"disk": DISK})
    answers = only.say(wire.info(wire.GO, "", (1,)))
    assert OptionAnswer(wire.GO, wire.INFO_REPLY, b"\0\x01disk") in answers
    assert isinstance(only.end, Negotiated)
    assert Talk().say_kinds(wire.info(wire.GO, "")) == [wire.UNKNOWN]
    named_so = Talk({"disk": DISK, "": OTHER})
    named_so.say(wire.info(wire.GO, ""))
    assert isinstance(named_so.end, Negotiated)
    assert named_so.end.export is OTHER


@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_ab1_abort(data: bytes) -> None:
    talk = Talk()
    assert talk.say(wire.option(wire.ABORT, data)) == [OptionAnswer(wire.ABORT, wire.ACK, b"")]
    assert talk.end == Ended("")


def test_li1_li3_list() -> None:
    assert Talk().say(wire.option(wire.LIST)) == [
        OptionAnswer(wire.LIST, wire.SERVER, b"\0\0\0\x04diska disk"),
        OptionAnswer(wire.LIST, wire.SERVER, b"\0\0\0\x05other"),
        OptionAnswer(wire.LIST, wire.ACK, b""),
    ]
    assert Talk({}).say_kinds(wire.option(wire.LIST)) == [wire.ACK]


def test_li2_list_with_data() -> None:
    assert Talk().say_kinds(wire.option(wire.LIST, b"x")) == [wire.INVALID]


@pytest.mark.parametrize("number", [wire.INFO, wire.GO])
def test_in3_in8_information(number: int) -> None:
    answers = Talk().say(wire.info(number, "disk", (1, 2, 3)))
    assert answers == [
        OptionAnswer(number, wire.INFO_REPLY, struct.pack(">HQH", 0, 1 << 20, 0x45)),
        OptionAnswer(number, wire.INFO_REPLY, b"\0\x01disk"),
        OptionAnswer(number, wire.INFO_REPLY, b"\0\x02a disk"),
        OptionAnswer(number, wire.INFO_REPLY, struct.pack(">HIII", 3, 512, 4096, 1 << 24)),
        OptionAnswer(number, wire.ACK, b""),
    ]


def test_in2_in4_unknown_and_doubled_types() -> None:
    talk = Talk()
    answers = talk.say(wire.info(wire.INFO, "disk", (4711, 1, 1, 3, 3, 0, 0)))
    types = [struct.unpack_from(">H", answer.data)[0] for answer in answers if answer.kind == wire.INFO_REPLY]
    assert sorted(types) == [0, 1, 3]


def test_in6_unknown_comes_alone() -> None:
    assert Talk().say_kinds(wire.info(wire.INFO, "no", (1, 2, 3))) == [wire.UNKNOWN]


def test_in7_nobody_must_ask_for_block_sizes() -> None:
    assert wire.BLOCK_SIZE_REQD not in Talk().say_kinds(wire.info(wire.GO, "disk"))


def test_in9_info_then_go() -> None:
    talk = Talk()
    asked = talk.say(wire.info(wire.INFO, "disk", (3, 1)))
    entered = talk.say(wire.info(wire.GO, "disk", (3, 1)))
    assert [(a.kind, a.data) for a in asked] == [(a.kind, a.data) for a in entered]


def test_in10_what_follows_go_is_transmission() -> None:
    talk = Talk()
    talk.feed([wire.info(wire.GO, "disk") + b"requests"])
    assert talk.end == Negotiated(export=DISK, leftover=b"requests")
    assert talk.handshake.next_turn() is None


def test_exports_are_looked_up_when_asked() -> None:
    exports = {"disk": DISK}
    talk = Talk(exports)
    del exports["disk"]
    assert talk.say_kinds(wire.info(wire.GO, "disk")) == [wire.UNKNOWN]


# Meta contexts


ALLOCATION = b"base:allocation"


def meta_talk() -> Talk:
    talk = Talk()
    assert talk.say_kinds(wire.option(wire.STRUCTURED)) == [wire.ACK]
    return talk


def contexts(answers: list[OptionAnswer]) -> list[tuple[int, bytes]]:
    """The contexts in a reply that is in order: (id, name) of each."""
    assert answers[-1].kind == wire.ACK
    assert {answer.kind for answer in answers[:-1]} <= {wire.META_REPLY}
    return [(int.from_bytes(answer.data[:4], "big"), answer.data[4:]) for answer in answers[:-1]]


@pytest.mark.parametrize("number", [wire.LIST_META, wire.SET_META])
def test_mc1_not_before_structured_replies(number: int) -> None:
    assert Talk().say_kinds(wire.meta(number, "disk", ("base:allocation",))) == [wire.INVALID]


@pytest.mark.parametrize(("queries", "listed"), [
    ((), True), (("base:",), True), (("base:allocation",), True), (("x-y:z", "base:allocation", "base:"), True),
    (("base:alloc",), False), (("qemu:dirty-bitmap:x",), False), (("base",), False), (("",), False),
])
def test_mc4_mc5_mc9_mc11_list(queries: tuple[str, ...], listed: bool) -> None:
    answers = meta_talk().say(wire.meta(wire.LIST_META, "disk", queries))
    assert contexts(answers) == ([(0, ALLOCATION)] if listed else [])


@pytest.mark.parametrize(("queries", "selected"), [
    (("base:allocation",), True), (("x-y:z", "base:allocation", "base:allocation"), True),
    ((), False), (("base:",), False), (("base:alloc",), False), (("no colon",), False), (("x-y:",), False),
])
def test_mc3_mc7_mc9_mc10_set(queries: tuple[str, ...], selected: bool) -> None:
    talk = meta_talk()
    found = contexts(talk.say(wire.meta(wire.SET_META, "disk", queries)))
    talk.say(wire.info(wire.GO, "disk"))
    assert isinstance(talk.end, Negotiated)
    number = talk.end.agreed.allocation_id
    assert found == ([(number, ALLOCATION)] if selected else [])
    assert (number is not None) == selected


def test_mc4_listing_selects_nothing() -> None:
    talk = meta_talk()
    talk.say(wire.meta(wire.LIST_META, "disk", ("base:allocation",)), wire.info(wire.GO, "disk"))
    assert talk.end == Negotiated(export=DISK, leftover=b"", agreed=Agreed(structured=True))


@pytest.mark.parametrize(("again", "kind"), [
    (wire.meta(wire.SET_META, "disk"), wire.ACK),
    (wire.meta(wire.SET_META, "no", ("base:allocation",)), wire.UNKNOWN),
    (wire.option(wire.SET_META, b"\0"), wire.INVALID),
    (wire.option(wire.SET_META, bytes(LIMITS.option_bytes_max + 1)), wire.TOO_BIG),
])
def test_mc7_the_last_one_counts_also_when_it_fails(again: bytes, kind: int) -> None:
    talk = meta_talk()
    talk.say(wire.meta(wire.SET_META, "disk", ("base:allocation",)))
    assert talk.say_kinds(again) == [kind]
    talk.say(wire.info(wire.GO, "disk"))
    assert isinstance(talk.end, Negotiated)
    assert talk.end.agreed.allocation_id is None


def test_bs1_what_was_selected_for_another_export_does_not_count() -> None:
    talk = meta_talk()
    talk.say(wire.meta(wire.SET_META, "other", ("base:allocation",)))
    talk.say(wire.info(wire.INFO, "other"))
    talk.say(wire.info(wire.GO, "disk"))
    assert isinstance(talk.end, Negotiated)
    assert talk.end.agreed.allocation_id is None


@pytest.mark.parametrize(("data", "kind"), [
    (b"", wire.INVALID),
    (bytes(7), wire.INVALID),
    (b"\0\0\0\x05disk\0\0\0\0", wire.INVALID),                                 # the name's length
    (b"\xff\xff\xff\xffdisk\0\0\0\0", wire.INVALID),
    (b"\0\0\0\x04disk\0\0\0\x01", wire.INVALID),                               # no query there
    (b"\0\0\0\x04disk\xff\xff\xff\xff\0\0\0\0", wire.INVALID),
    (b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x02a", wire.INVALID),                    # the query's length
    (b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x04aaaa", wire.INVALID),                 # the second query's
    (b"\0\0\0\x04disk\0\0\0\x00x", wire.INVALID),                              # something behind
    (b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x01\0", wire.INVALID),                   # NUL
    (b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x01\xff", wire.INVALID),                 # UTF-8
    (b"\0\0\0\x04disk\0\0\0\x01\0\0\x10\x01" + b"a" * 4097, wire.TOO_BIG),
    (b"\0\0\0\x02no\0\0\0\0", wire.UNKNOWN),
])
@pytest.mark.parametrize("number", [wire.LIST_META, wire.SET_META])
def test_mc3_malformed(number: int, data: bytes, kind: int) -> None:
    """Answered, and the next option is heard."""
    assert meta_talk().say_kinds(wire.option(number, data), wire.option(wire.LIST)) == [
        kind, wire.SERVER, wire.SERVER, wire.ACK,
    ]


def test_mc3_many_queries_are_no_work() -> None:
    talk = meta_talk()
    data = b"\0\0\0\x04disk" + struct.pack(">I", 2000) + bytes(8000)
    assert talk.say_kinds(wire.option(wire.LIST_META, data)) == [wire.ACK]


SESSIONS = st.lists(
    st.one_of(
        st.tuples(st.integers(2, 14), st.binary(max_size=40)).map(lambda o: wire.option(*o)),
        st.sampled_from(["", "disk", "no"]).map(lambda name: wire.info(wire.INFO, name, (1, 2, 3, 9))),
        st.just(wire.option(wire.STRUCTURED)),
        st.builds(
            wire.meta, st.sampled_from([wire.LIST_META, wire.SET_META]), st.sampled_from(["", "disk", "no"]),
            st.lists(st.sampled_from(["base:", "base:allocation", b"\xff", "x"]), max_size=3).map(tuple),
        ),
        st.tuples(st.sampled_from([wire.LIST_META, wire.SET_META]), st.binary(max_size=40)).map(
            lambda o: wire.option(*o)
        ),
        st.just(wire.option(wire.GO, bytes(LIMITS.option_bytes_max + 3))),
    ),
    max_size=6,
).map(b"".join)
ENDS = st.sampled_from([wire.info(wire.GO, "disk") + b"xyz", wire.option(wire.ABORT), b"garbage!" * 3, b""])


def run(chunks: Iterable[bytes]) -> tuple[bytes, object, object]:
    talk = Talk(flags=b"")
    error = None
    try:
        talk.feed(chunks)
    except PeerError as caught:
        error = str(caught)
    end = talk.end
    # How much of what follows is already there depends on the cut; that it is a beginning of it does not.
    if isinstance(end, Negotiated):
        assert b"xyz".startswith(end.leftover)
        end = end.export
    return talk.sent, end, error


@given(SESSIONS, ENDS, st.randoms(use_true_random=False))
def test_any_cut_gives_the_same(session: bytes, end: bytes, dice: random.Random) -> None:
    data = wire.client_flags() + session + end
    whole = run([data])
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(6))
    assert run(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)) == whole
    if len(data) < 2000:
        assert run(data[i:i + 1] for i in range(len(data))) == whole


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_parse_or_are_the_peers_error(data: bytes, with_magic: bool) -> None:
    if with_magic:
        data = wire.client_flags() + struct.pack(">Q", wire.IHAVEOPT) + data
    run([data])
