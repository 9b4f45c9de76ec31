"""Replies on the wire, byte for byte: packed here with struct, so that a wrong layout is seen."""

from __future__ import annotations

import struct

import pytest

from homeloop.nbd.replies import (
    ERROR_TEXT_BYTES_MAX,
    pack_block_status,
    pack_data_header,
    pack_error,
    pack_hole,
    pack_none,
    pack_simple_reply,
)
from tests.nbd import wire

COOKIE = 2**64 - 1
OFFSET = 2**63 - 512


def chunk(kind: int, payload: bytes) -> bytes:
    """A chunk that is the only one of its reply (R4: DONE)."""
    return struct.pack(">IHHQI", 0x668E33EF, 1, kind, COOKIE, len(payload)) + payload


def test_layouts() -> None:
    assert pack_simple_reply(22, COOKIE) == wire.simple_reply(COOKIE, 22)
    assert pack_data_header(COOKIE, OFFSET, 5) + b"abcde" == chunk(1, struct.pack(">Q", OFFSET) + b"abcde")
    assert pack_hole(COOKIE, OFFSET, 2**32 - 1) == chunk(2, struct.pack(">QI", OFFSET, 2**32 - 1))
    assert pack_error(COOKIE, 5, "é") == chunk(32769, struct.pack(">IH", 5, 2) + b"\xc3\xa9")
    extents = [(512, True, True), (2**32 - 1, False, False), (1, True, False), (2, False, True)]
    told = struct.pack(">9I", 7, 512, 3, 2**32 - 1, 0, 1, 1, 2, 2)
    assert pack_block_status(COOKIE, 7, extents) == chunk(5, told)


def test_r4_none_is_empty_and_last() -> None:
    assert pack_none(COOKIE) == chunk(0, b"")


@pytest.mark.parametrize(("text", "sent"), [
    ("x" * 5000, b"x" * ERROR_TEXT_BYTES_MAX),
    ("x" + "é" * 5000, b"x" + "é".encode() * ((ERROR_TEXT_BYTES_MAX - 1) // 2)),
    ("a\0b", b"ab"),
    ("\ud800", b"?"),
    ("", b""),
])
def test_r8_h9_error_texts(text: str, sent: bytes) -> None:
    """Whatever an exception says: short, UTF-8, no NUL."""
    assert pack_error(COOKIE, 5, text) == chunk(32769, struct.pack(">IH", 5, len(sent)) + sent)
