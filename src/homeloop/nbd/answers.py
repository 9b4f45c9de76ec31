"""The three ways to answer the requests of one connection: answers_for() picks one, once.

What is sent is packed by replies.py; here stands what is said when. `offset` is the request's throughout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from homeloop.block.zeroes import are_zeroes
from homeloop.nbd.handshake import Agreed
from homeloop.nbd.protocol import CommandFlag
from homeloop.nbd.replies import (
    pack_block_status,
    pack_data_header,
    pack_error,
    pack_extended_data_header,
    pack_extended_error,
    pack_extended_extents,
    pack_extended_hole,
    pack_extended_none,
    pack_hole,
    pack_none,
    pack_simple_reply,
)
from homeloop.nbd.sending import BytesLike

__all__ = ["ExtendedAnswers", "SimpleAnswers", "StructuredAnswers", "answers_for"]

_DF: Final = CommandFlag.DF.value


class SimpleAnswers:
    """The baseline (R1): a header, and the data of a READ."""

    form = "simple"  # for statistics

    def content(self, flags: int, cookie: int, offset: int, length: int, data: Any) -> tuple[bytes, BytesLike]:
        """Return the answer to a READ: its header, and its data, none of a hole."""
        return pack_simple_reply(0, cookie), data

    def done(self, cookie: int, offset: int) -> bytes:
        """Return the answer to what has no content. R3: right with structured replies, too, and the shorter one."""
        return pack_simple_reply(0, cookie)

    def refused(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """Return what says no; `error` is a number of the wire."""
        return pack_simple_reply(error, cookie)

    def extents(self, cookie: int, offset: int, context_id: int, extents: Iterable[tuple[int, bool, bool]]) -> bytes:
        """Return the answer to a BLOCK_STATUS: (length, hole, zero) from its offset on."""
        raise AssertionError("BLOCK_STATUS without structured replies")


class StructuredAnswers(SimpleAnswers):
    """Chunks where they are of use. Zeroes are data with DF (R9)."""

    form = "structured"

    def content(self, flags: int, cookie: int, offset: int, length: int, data: Any) -> tuple[bytes, BytesLike]:
        """As in SimpleAnswers."""
        if not length:
            return pack_none(cookie), b""
        if are_zeroes(data) and not flags & _DF:
            return pack_hole(cookie, offset, length), b""
        return pack_data_header(cookie, offset, length), data

    def refused(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """With the text, for people."""
        return pack_error(cookie, error, text)

    def extents(self, cookie: int, offset: int, context_id: int, extents: Iterable[tuple[int, bool, bool]]) -> bytes:
        """32-bit lengths: no extent is longer than its request."""
        return pack_block_status(cookie, context_id, extents)


class ExtendedAnswers(SimpleAnswers):
    """Chunks only (X-2), with 64-bit lengths."""

    form = "extended"

    def content(self, flags: int, cookie: int, offset: int, length: int, data: Any) -> tuple[bytes, BytesLike]:
        """As in StructuredAnswers."""
        if not length:
            return pack_extended_none(cookie, offset), b""
        if are_zeroes(data) and not flags & _DF:
            return pack_extended_hole(cookie, offset, length), b""
        return pack_extended_data_header(cookie, offset, length), data

    def done(self, cookie: int, offset: int) -> bytes:
        """A chunk without content."""
        return pack_extended_none(cookie, offset)

    def refused(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """With the text, for people."""
        return pack_extended_error(cookie, offset, error, text)

    def extents(self, cookie: int, offset: int, context_id: int, extents: Iterable[tuple[int, bool, bool]]) -> bytes:
        """As in SimpleAnswers."""
        return pack_extended_extents(cookie, offset, context_id, extents)


def answers_for(agreed: Agreed) -> SimpleAnswers:
    """Return the way to answer that was agreed; extended headers win (X-2)."""
    if agreed.extended:
        return ExtendedAnswers()
    return StructuredAnswers() if agreed.structured else SimpleAnswers()
