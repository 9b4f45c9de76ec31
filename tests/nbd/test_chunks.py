"""Structured replies put together: any order, any pieces, any cuts; and servers that send nonsense."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeloop.errors import PeerError
from homeloop.nbd.chunks import ChunkReader
from homeloop.nbd.transmission import Reply
from tests.nbd import wire
from tests.nbd.test_transmission import receive

RECEIVE_BYTES = 64 << 10
OFFSET = 1 << 40
CONTEXT = 7
READ, EMPTY, STATUS, LARGE = 1, 2, 3, 4
LENGTHS = {READ: 1000, EMPTY: 0, STATUS: 0, LARGE: 200_000}


def replies(chunks: Iterable[bytes]) -> tuple[list[Reply], str | None]:
    """What comes of the bytes, in flight being the four above; and what the last error said."""
    reader = ChunkReader(CONTEXT, RECEIVE_BYTES)
    for cookie, length in LENGTHS.items():
        reader.expect(cookie, length, offset=OFFSET, wants_extents=cookie == STATUS)
    seen: list[Reply] = []
    try:
        for chunk in chunks:
            for _ in receive(reader, chunk):
                while batch := reader.next_batch():
                    seen += batch
    except PeerError as error:
        return seen, str(error)
    return seen, None


def data(begin: int, content: bytes, flags: int = 0, cookie: int = READ) -> bytes:
    return wire.data_chunk(cookie, OFFSET + begin, content, flags)


def hole(begin: int, length: int, flags: int = 0, cookie: int = READ) -> bytes:
    return wire.hole_chunk(cookie, OFFSET + begin, length, flags)


def status(*numbers: int, flags: int = 1, cookie: int = STATUS, context: int = CONTEXT) -> bytes:
    return wire.chunk(cookie, 5, struct.pack(f">{1 + len(numbers)}I", context, *numbers), flags)


DONE = wire.chunk(READ, 0)
A, B = b"a" * 400, b"b" * 600


@pytest.mark.parametrize("stream", [
    data(0, A + B, 1),
    data(0, A) + data(400, B, 1),
    data(400, B) + data(0, A, 1),
    data(0, A) + data(400, B) + DONE,
    data(0, A) + data(400, B[:1]) + data(999, B[:1]) + data(401, B[2:]) + DONE,
    data(0, A, 0xFFFE) + data(400, B, 0xFFFF),                          # R5: unknown flags are ignored
])
def test_r12_pieces_in_any_order(stream: bytes) -> None:
    assert replies([stream]) == ([(READ, 0, A + B)], None)


@pytest.mark.parametrize(("stream", "content"), [
    (hole(0, 1000, 1), bytes(1000)),
    (hole(0, 400) + data(400, B, 1), bytes(400) + B),
    (data(400, B) + hole(0, 399) + hole(399, 1, 1), bytes(400) + B),
])
def test_r12_holes_are_zeroes(stream: bytes, content: bytes) -> None:
    assert replies([stream]) == ([(READ, 0, content)], None)


def test_r3_success_without_data_may_be_simple_or_not() -> None:
    assert replies([wire.simple_reply(EMPTY)]) == ([(EMPTY, 0, None)], None)
    assert replies([wire.chunk(EMPTY, 0)]) == ([(EMPTY, 0, None)], None)
    assert replies([wire.simple_reply(EMPTY, 28) + wire.simple_reply(STATUS, 22)]) == (
        [(EMPTY, 28, None), (STATUS, 22, None)], None,
    )


def test_bs2_mc8_extents() -> None:
    assert replies([status(512, 3, 2**32 - 1, 0xFF00)]) == ([(STATUS, 0, [(512, 3), (2**32 - 1, 0xFF00)])], None)
    assert replies([status(512, 3, flags=0) + wire.chunk(STATUS, 0)]) == ([(STATUS, 0, [(512, 3)])], None)


def test_bs4_a_large_answer_has_its_own_memory() -> None:
    extents = [(512, number & 3) for number in range(20_000)]
    flat = [number for extent in extents for number in extent]
    assert replies([status(*flat), DONE[:0]]) == ([(STATUS, 0, extents)], None)


@pytest.mark.parametrize(("stream", "error", "text"), [
    (wire.error_chunk(READ, 5, "kaputt é".encode()), 5, "kaputt é"),
    (wire.error_chunk(READ, 4711), 4711, ""),
    (wire.error_chunk(READ, 0, b"x"), 22, "x"),
    (wire.error_chunk(READ, 5, b"at", offset=OFFSET + 3), 5, "at"),
    (data(0, A) + wire.error_chunk(READ, 5, b"1", 0, offset=OFFSET + 3) + wire.error_chunk(READ, 28, b"2"), 5, "1"),
    (wire.error_chunk(READ, 5, b"x", 0) + DONE, 5, "x"),
    (wire.chunk(READ, 32999, struct.pack(">IH", 5, 2) + b"xy" + b"whatever"), 5, "xy"),    # an error from the future
    (wire.error_chunk(READ, 5, b"\xff\0"), 5, "\ufffd"),
])
def test_r8_r12_errors(stream: bytes, error: int, text: str) -> None:
    assert replies([stream]) == ([(READ, error, text)], None)


@pytest.mark.parametrize(("stream", "says"), [
    (wire.simple_reply(READ, 0, bytes(1000)), "a simple reply to cookie 0x1"),                  # R3
    (wire.simple_reply(READ, 5), "a simple reply to cookie 0x1"),
    (wire.simple_reply(STATUS), "a simple reply to cookie 0x3"),                                # R14
    (wire.chunk(99, 0), "cookie 0x63"),
    (DONE, "does not tell all of 1000"),
    (data(0, A, 1), "does not tell all of 1000"),
    (data(0, A) + data(399, B), "overlap"),                                                     # R6
    (data(400, B) + data(0, A + b"x"), "overlap"),
    (data(0, A) + hole(100, 5), "overlap"),
    (data(-1, A), "bytes -1 to 399"),
    (data(601, A), "bytes 601 to 1001"),
    (hole(0, 1001), "bytes 0 to 1001"),
    (hole(5, 0), "bytes 5 to 5"),
    (data(0, A + B + b"x"), "type 1 with flags 0x0 and 1009 bytes"),
    (data(0, b""), "type 1 with"),
    (data(0, A, cookie=STATUS), "type 1 with"),
    (hole(0, 1, cookie=STATUS), "type 2 with"),
    (wire.chunk(READ, 2, bytes(11)), "type 2 with flags 0x1 and 11 bytes"),
    (wire.chunk(READ, 0, b"x"), "type 0 with"),                                                 # R4
    (wire.chunk(READ, 0, flags=0), "type 0 with"),
    (wire.chunk(READ, 3), "unknown type 3"),                                                    # R12
    (wire.chunk(READ, 32769, bytes(5)), "type 32769 with"),
    (wire.chunk(READ, 32769, bytes(5000)), "type 32769 with"),
    (wire.chunk(READ, 32769, struct.pack(">IH", 5, 3) + b"xy"), "a text of 3"),
    (wire.chunk(READ, 32769, struct.pack(">IH", 5, 1) + b"xy"), "a text of 1"),
    (wire.chunk(READ, 32770, struct.pack(">IH", 5, 2) + b"xy"), "a text of 2"),
    (wire.chunk(READ, 32999, struct.pack(">IH", 5, 3) + b"xy"), "a text of 3"),
    (status(512, 0, cookie=READ), "type 5 with"),
    (status(), "type 5 with"),
    (status(512), "type 5 with"),
    (status(0, 0), "length 0"),
    (status(512, 0, context=8), "context 8"),
    (status(512, 0, flags=0) + status(512, 0), "context 7"),
    (wire.chunk(STATUS, 0), "tells no extents"),
    (bytes(16), "reply magic is 0x00000000"),
])
def test_a_broken_server(stream: bytes, says: str) -> None:
    """What was right before comes out before."""
    seen, error = replies([wire.simple_reply(EMPTY) + stream])
    assert seen == [(EMPTY, 0, None)]
    assert error is not None
    assert says in error


def test_sizes_are_checked_before_anything_is_kept() -> None:
    header = struct.pack(">IHHQI", 0x668E33EF, 0, 5, STATUS, 4 + 8 * ((1 << 20) + 1))
    assert "type 5 with" in (replies([header])[1] or "")


def test_r13_gaps_have_a_limit() -> None:
    """A server that tells every second byte of a large read must not make us keep a list of them all."""
    stream = b"".join(data(begin, b"x", cookie=LARGE) for begin in range(0, 2 * 4097, 2))
    assert "more than 4096 pieces" in (replies([stream])[1] or "")


def scattered(dice: random.Random, cookie: int, content: bytes) -> list[bytes]:
    """A reply in chunks of any size and order; zeroes as holes, sometimes."""
    cuts = sorted({0, len(content), *(dice.randrange(len(content)) for _ in range(dice.choice([0, 1, 2, 9])))})
    spans = list(itertools.pairwise(cuts))
    dice.shuffle(spans)
    chunks = []
    for begin, end in spans:
        if any(content[begin:end]) or dice.random() < 0.5:
            chunks.append(data(begin, content[begin:end], cookie=cookie))
        else:
            chunks.append(hole(begin, end - begin, cookie=cookie))
    return [*chunks, wire.chunk(cookie, 0)]


@given(st.integers(0, 2**32))
def test_x3_any_cut_gives_the_same(number: int) -> None:
    """Chunks of several replies between each other, in any pieces."""
    dice = random.Random(number)
    contents = {cookie: dice.randbytes(LENGTHS[cookie]) for cookie in (READ, LARGE)}
    contents[LARGE] = contents[LARGE][:100_000] + bytes(100_000) if dice.random() < 0.5 else contents[LARGE]
    lines = [scattered(dice, cookie, content) for cookie, content in contents.items()]
    lines += [[wire.simple_reply(EMPTY)], [status(512, 3, 512, 0)]]
    stream = b""
    while lines:
        line = dice.choice(lines)
        stream += line.pop(0)
        lines = [line for line in lines if line]
    whole, error = replies([stream])
    assert error is None
    assert {cookie: value for cookie, _, value in whole} == {**contents, EMPTY: None, STATUS: [(512, 3), (512, 0)]}
    cuts = sorted(dice.randrange(len(stream) + 1) for _ in range(10))
    assert replies(stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)) == (whole, None)


@given(st.lists(st.sampled_from([
    data(0, A), data(400, B), data(400, B, 1), hole(0, 400), DONE, wire.simple_reply(EMPTY), status(512, 1),
    wire.error_chunk(READ, 5, b"x"), wire.chunk(READ, 3), wire.chunk(EMPTY, 0), data(5, A), b"\0",
]), max_size=6))
def test_byte_by_byte_gives_the_same(chunks: list[bytes]) -> None:
    stream = b"".join(chunks)
    assert replies(stream[i:i + 1] for i in range(len(stream))) == replies([stream])


HEADS = [b"", wire.chunk(READ, 1)[:4], wire.chunk(READ, 32769)[:16], data(0, A)[:20]]


@given(st.binary(max_size=120), st.sampled_from(HEADS))
def test_any_bytes_parse_or_are_the_peers_error(tail: bytes, head: bytes) -> None:
    replies([head + tail])


@given(st.integers(0, 65535), st.integers(0, 65535), st.sampled_from([*LENGTHS, 9]), st.binary(max_size=40))
def test_any_chunk_parses_or_is_the_peers_error(flags: int, kind: int, cookie: int, payload: bytes) -> None:
    replies([wire.chunk(cookie, kind, payload, flags)])
    replies([wire.chunk(cookie, kind % 8, payload, flags & 1)])
    replies([wire.chunk(cookie, 32768 + kind % 4, payload, flags & 1)])
