"""Which way to answer goes with what was agreed, byte for byte."""

from __future__ import annotations

import struct

import pytest

from homeloop.block.zeroes import zeroes
from homeloop.nbd.answers import answers_for
from homeloop.nbd.handshake import Agreed
from tests.nbd import wire

EXTENTS = [(5, True, True), (6, False, False)]


def test_r1_simple() -> None:
    answers = answers_for(Agreed())
    assert answers.content(0, 1, 512, 3, b"abc") == (wire.simple_reply(1), b"abc")
    assert answers.done(1, 512) == wire.simple_reply(1)
    assert answers.refused(1, 512, 22, "no") == wire.simple_reply(1, 22)
    with pytest.raises(AssertionError, match="without structured"):
        answers.extents(1, 512, 7, EXTENTS)


def test_r3_r9_structured() -> None:
    answers = answers_for(Agreed(structured=True))
    assert b"".join(answers.content(0, 1, 512, 3, b"abc")) == wire.data_chunk(1, 512, b"abc")
    assert b"".join(answers.content(0, 1, 512, 3, zeroes(3))) == wire.hole_chunk(1, 512, 3)
    assert b"".join(answers.content(wire.DF, 1, 512, 3, zeroes(3))) == wire.data_chunk(1, 512, bytes(3))
    assert answers.done(1, 512) == wire.simple_reply(1)
    assert answers.refused(1, 512, 22, "no") == wire.error_chunk(1, 22, b"no")
    assert answers.extents(1, 512, 7, EXTENTS) == wire.chunk(1, 5, struct.pack(">5I", 7, 5, 3, 6, 0))


def test_x_2_x_6_x_7_extended() -> None:
    answers = answers_for(Agreed(structured=True, extended=True))
    assert b"".join(answers.content(0, 1, 512, 3, b"abc")) == wire.ext_data(1, 512, b"abc")
    assert b"".join(answers.content(0, 1, 512, 3, zeroes(3))) == wire.ext_chunk(1, 2, 512, struct.pack(">QI", 512, 3))
    assert b"".join(answers.content(wire.DF, 1, 512, 3, zeroes(3))) == wire.ext_data(1, 512, bytes(3))
    assert answers.content(0, 1, 512, 0, b"") == (wire.ext_chunk(1, 0, 512), b"")
    assert answers.done(1, 512) == wire.ext_chunk(1, 0, 512)
    assert answers.refused(1, 512, 22, "no") == wire.ext_error(1, 512, 22, b"no")
    assert answers.extents(1, 512, 7, EXTENTS) == wire.ext_extents(1, 512, 7, (5, 3), (6, 0))
