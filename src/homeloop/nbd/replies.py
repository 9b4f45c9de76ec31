"""Pure writing of replies: simple ones, and the chunks of structured ones.

Every function returns bytes that go out as they are; the data of a READ follow its header as a piece of their own
and are never copied. A READ is answered by one content chunk and no more: OFFSET_DATA, or OFFSET_HOLE for what the
driver says is all zeroes; so the DF flag changes nothing but that (R9).

Source: doc/proto.md, "Structured reply chunk message"; ids as in the test names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from homeloop.nbd.protocol import (
    BLOCK_STATUS_EXTENT,
    BLOCK_STATUS_HEADER,
    CHUNK,
    CHUNK_DONE,
    DATA_CHUNK,
    ERROR_HEADER,
    EXTENDED_CHUNK,
    EXTENDED_DATA_CHUNK,
    EXTENDED_EXTENT,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_STATUS_HEADER,
    HOLE_CHUNK,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    AllocationFlag,
    ChunkType,
)

__all__ = [
    "ERROR_TEXT_BYTES_MAX",
    "pack_block_status",
    "pack_data_header",
    "pack_error",
    "pack_extended_data_header",
    "pack_extended_error",
    "pack_extended_extents",
    "pack_extended_hole",
    "pack_extended_none",
    "pack_hole",
    "pack_none",
    "pack_simple_reply",
]

ERROR_TEXT_BYTES_MAX: Final = 256  # H9: what a string should keep to; the hard limit is 4096

_DATA: Final = ChunkType.OFFSET_DATA.value
_HOLE: Final = ChunkType.OFFSET_HOLE.value
_FLAG_HOLE: Final = AllocationFlag.HOLE.value
_FLAG_ZERO: Final = AllocationFlag.ZERO.value
_OFFSET_BYTES: Final = DATA_CHUNK.size - CHUNK.size
_HOLE_PAYLOAD: Final = struct.Struct(">QI")  # offset, size


def pack_simple_reply(error: int, cookie: int) -> bytes:
    """Return the header of a simple reply; `error` is a number of the wire, 0 for success."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def pack_data_header(cookie: int, offset: int, length: int) -> bytes:
    """Return what stands before the `length` bytes of a READ's only chunk."""
    return DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _DATA, cookie, length + _OFFSET_BYTES, offset)


def pack_hole(cookie: int, offset: int, length: int) -> bytes:
    """Return the whole reply to a READ of zeroes."""
    payload_bytes = HOLE_CHUNK.size - CHUNK.size
    return HOLE_CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _HOLE, cookie, payload_bytes, offset, length)


def pack_none(cookie: int) -> bytes:
    """Return a structured reply without content: success."""
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.NONE, cookie, 0)


def pack_error(cookie: int, error: int, text: str) -> bytes:
    """Return a structured reply that says no, with a text for people, shortened if need be (R8)."""
    payload = _error_payload(error, text)
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.ERROR, cookie, len(payload)) + payload


def pack_block_status(cookie: int, context_id: int, extents: Iterable[tuple[int, bool, bool]]) -> bytes:
    """Return the reply to a BLOCK_STATUS: the (length, hole, zero) of the extents from its offset on."""
    payload = BLOCK_STATUS_HEADER.pack(context_id) + b"".join(
        BLOCK_STATUS_EXTENT.pack(length, hole * _FLAG_HOLE + zero * _FLAG_ZERO) for length, hole, zero in extents
    )
    header = CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.BLOCK_STATUS, cookie, len(payload))
    return header + payload



def pack_extended_data_header(cookie: int, offset: int, length: int) -> bytes:
    """Return what stands before the data of a READ's only chunk, with extended headers (X-6: twice the offset)."""
    payload_bytes = length + _OFFSET_BYTES
    return EXTENDED_DATA_CHUNK.pack(EXTENDED_REPLY_MAGIC, CHUNK_DONE, _DATA, cookie, offset, payload_bytes, offset)


def pack_extended_hole(cookie: int, offset: int, length: int) -> bytes:
    """Return the whole reply to a READ of zeroes: a READ's length has 32 bits here, too."""
    return _extended(ChunkType.OFFSET_HOLE, cookie, offset, _HOLE_PAYLOAD.pack(offset, length))


def pack_extended_none(cookie: int, offset: int) -> bytes:
    """Return a reply without content: success."""
    return _extended(ChunkType.NONE, cookie, offset, b"")


def pack_extended_error(cookie: int, offset: int, error: int, text: str) -> bytes:
    """Return a reply that says no, as pack_error() does."""
    return _extended(ChunkType.ERROR, cookie, offset, _error_payload(error, text))


def pack_extended_extents(
    cookie: int, offset: int, context_id: int, extents: Iterable[tuple[int, bool, bool]]
) -> bytes:
    """Return the reply to a BLOCK_STATUS: lengths of 64 bits, and of the flags the upper 32 bits zero (X-7)."""
    told = [EXTENDED_EXTENT.pack(length, hole * _FLAG_HOLE + zero * _FLAG_ZERO) for length, hole, zero in extents]
    payload = EXTENDED_STATUS_HEADER.pack(context_id, len(told)) + b"".join(told)
    return _extended(ChunkType.BLOCK_STATUS_EXT, cookie, offset, payload)


def _extended(kind: int, cookie: int, offset: int, payload: bytes) -> bytes:
    return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, CHUNK_DONE, kind, cookie, offset, len(payload)) + payload


def _error_payload(error: int, text: str) -> bytes:
    raw = text.replace("\0", "").encode(errors="replace")[:ERROR_TEXT_BYTES_MAX]
    raw = raw.decode(errors="ignore").encode()  # the cut may have gone through a character
    return ERROR_HEADER.pack(error, len(raw)) + raw
