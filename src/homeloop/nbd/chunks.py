"""Pure reading of structured replies: bytes of the server in, whole replies out.

A reply comes in chunks, in any order and with those of other replies between them; it is put together here and handed
out when its last chunk has come. The data of a large chunk are received where they are returned. Held at most: one
receive buffer, the memory of the reads in flight, one status chunk, and 4096 gaps a read.

With extended headers every reply comes in chunks, which carry the offset of their request, and extents have 64 bits.

Source: doc/proto.md, "Structured reply chunk message"; ids as in the test names.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from homeloop.errors import PeerError
from homeloop.nbd.protocol import (
    BLOCK_STATUS_EXTENT,
    BLOCK_STATUS_HEADER,
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
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
    STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
)
from homeloop.nbd.transmission import DIRECT_BYTES_MIN, RECEIVE_BYTES, ReceiveBuffer, Reply

__all__ = ["ChunkReader"]

_U32: Final = struct.Struct(">I")
_HOLE: Final = struct.Struct(">QI")
_OFFSET_BYTES: Final = DATA_CHUNK.size - CHUNK.size
_HOLE_BYTES: Final = HOLE_CHUNK.size - CHUNK.size
_EXTENTS_MAX: Final = 1 << 20  # BS4
_ERROR_BYTES_MAX: Final = ERROR_HEADER.size + STRING_BYTES_MAX + 64  # and an offset, or what an unknown type has
_PIECES_MAX: Final = 4096  # with gaps between them, of one read
_WIRE_EINVAL: Final = 22


@dataclass(frozen=True, slots=True)
class _Layout:
    """What differs between the chunks of structured replies and of extended headers."""

    magic: int
    header: struct.Struct
    data_header: struct.Struct  # of an OFFSET_DATA, with its own offset
    status_kind: ChunkType
    status_header: struct.Struct
    extent: struct.Struct


_STRUCTURED: Final = _Layout(
    STRUCTURED_REPLY_MAGIC, CHUNK, DATA_CHUNK, ChunkType.BLOCK_STATUS, BLOCK_STATUS_HEADER, BLOCK_STATUS_EXTENT
)
_EXTENDED: Final = _Layout(
    EXTENDED_REPLY_MAGIC,
    EXTENDED_CHUNK,
    EXTENDED_DATA_CHUNK,
    ChunkType.BLOCK_STATUS_EXT,
    EXTENDED_STATUS_HEADER,
    EXTENDED_EXTENT,
)


class _Pending:
    """One request in flight, and what has come of its reply."""

    __slots__ = ("_covered", "_memory", "_whole", "error", "extents", "length", "offset", "text", "wants_extents")

    def __init__(self, offset: int, length: int, wants_extents: bool) -> None:
        self.offset = offset
        self.length = length  # of data: not 0 for a READ only
        self.wants_extents = wants_extents
        self.error = 0
        self.text = ""
        self.extents: list[tuple[int, int]] | None = None
        self._whole: bytes | None = None  # all data, if they came in one piece
        self._memory: bytearray | None = None  # else; zeroes where nothing has come
        self._covered: list[tuple[int, int]] = []  # begin and end of what has come; sorted, with gaps between

    def cover(self, begin: int, end: int) -> None:
        """Note that this part of the data is told; PeerError for one told twice, or not asked for (R6, R13)."""
        if not 0 <= begin < end <= self.length:
            raise PeerError(f"a chunk of bytes {begin} to {end} in the reply to a READ of {self.length} bytes")
        covered = self._covered
        index = bisect_right(covered, (begin, end))
        before = covered[index - 1] if index else (-1, -1)
        after = covered[index] if index < len(covered) else (self.length + 1, 0)
        if before[1] > begin or after[0] < end:
            raise PeerError(f"bytes {begin} to {end} overlap with another chunk of the reply")
        low, high = index, index
        if before[1] == begin:
            low, begin = index - 1, before[0]
        if after[0] == end:
            high, end = index + 1, after[1]
        covered[low:high] = [(begin, end)]
        if len(covered) > _PIECES_MAX:
            raise PeerError(f"a reply in more than {_PIECES_MAX} pieces with gaps between")

    def put(self, begin: int, data: memoryview) -> None:
        """Keep data that were received into the buffer."""
        if len(data) == self.length:
            self._whole = bytes(data)
        else:
            self.place(begin, len(data))[:] = data

    def place(self, begin: int, length: int) -> memoryview:
        """Return the memory of a part of the data, to be received into."""
        if self._memory is None:
            self._memory = bytearray(self.length)
        return memoryview(self._memory)[begin : begin + length]

    def reply(self, cookie: int) -> Reply:
        """Return what has come, after the last chunk."""
        if self.error:
            return cookie, self.error, self.text
        if self.wants_extents:
            if self.extents is None:
                raise PeerError(f"the reply to cookie {cookie:#x} tells no extents")
            return cookie, 0, self.extents
        if not self.length:
            return cookie, 0, None
        if self._covered != [(0, self.length)]:
            raise PeerError(f"the reply to cookie {cookie:#x} does not tell all of {self.length} bytes")
        if self._whole is not None:
            return cookie, 0, self._whole
        return cookie, 0, self._memory if self._memory is not None else bytes(self.length)


class ChunkReader(ReceiveBuffer):
    """The client's side where structured replies are agreed. The owner says what it waits for."""

    def __init__(
        self, context_id: int | None = None, receive_bytes: int = RECEIVE_BYTES, *, extended: bool = False
    ) -> None:
        """context_id: the one meta context that is selected; extended: so the headers are."""
        self._layout = _EXTENDED if extended else _STRUCTURED
        super().__init__(self._layout.data_header.size, receive_bytes)
        self._context_id = context_id
        self._pending: dict[int, _Pending] = {}  # by cookie
        self._awaiting = (0, 0, 0)  # cookie, flags and type of the chunk whose payload is on its way
        self._failure: PeerError | None = None  # raised by the next call

    def expect(self, cookie: int, payload_bytes: int, *, offset: int = 0, wants_extents: bool = False) -> None:
        """Wait for the reply to a request; cookies in flight are distinct (X2). payload_bytes: of a READ."""
        assert cookie not in self._pending, cookie
        self._pending[cookie] = _Pending(offset, payload_bytes, wants_extents)

    def next_batch(self) -> list[Reply]:
        """Return the next whole replies; none until more is received.

        Raises PeerError on bytes that no later byte can make right; the whole replies before them were returned
        by the call before.
        """
        if self._failure is not None:
            raise self._failure
        batch: list[Reply] = []
        try:
            if self._direct is not None and not self._take_large(batch):
                return batch
            while self._take_message(batch):
                self._narrow = False
        except PeerError as error:
            self._failure = error
            if not batch:
                raise
        return batch

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise PeerError(f"reply to cookie {cookie:#x}, for which no request is in flight")
        return pending

    def _take_large(self, batch: list[Reply]) -> bool:
        """Take a payload that has memory of its own; False: it is not all there."""
        payload = self._take_direct()
        if payload is None:
            return False
        self._lent = None  # never given back: it is the reply's
        cookie, flags, kind = self._awaiting
        pending = self._find(cookie)
        if kind == self._layout.status_kind:
            self._take_status(pending, payload)
        self._maybe_done(batch, cookie, flags, pending)
        return True

    def _take_message(self, batch: list[Reply]) -> bool:
        """Take one simple reply or chunk from the buffer; False: it is not all there."""
        position, there = self._start, self._end - self._start
        if there < SIMPLE_REPLY.size:
            return False
        (magic,) = _U32.unpack_from(self._buffer, position)
        layout = self._layout
        if magic == SIMPLE_REPLY_MAGIC and layout is _STRUCTURED:
            _, error, cookie = SIMPLE_REPLY.unpack_from(self._buffer, position)
            pending = self._find(cookie)
            if pending.length or (pending.wants_extents and not error):
                raise PeerError(f"a simple reply to cookie {cookie:#x}, which asks for a structured one")  # R3, R14
            self._start += SIMPLE_REPLY.size
            del self._pending[cookie]
            batch.append((cookie, error, None))
            return True
        if magic != layout.magic:
            raise PeerError(f"reply magic is {magic:#010x}, not {layout.magic:#010x}")
        if there < layout.header.size:
            return False
        _, flags, kind, cookie, *told, length = layout.header.unpack_from(self._buffer, position)
        pending = self._find(cookie)
        if told and told[0] != pending.offset:
            raise PeerError(f"reply with offset {told[0]} to a request with offset {pending.offset}")
        _check_chunk(layout, kind, flags, length, pending)
        if kind == ChunkType.OFFSET_DATA:
            return self._take_data(batch, cookie, flags, length - _OFFSET_BYTES, pending)
        payload_start = position + layout.header.size
        if there < layout.header.size + length:
            if length >= DIRECT_BYTES_MIN:
                self._awaiting = cookie, flags, kind
                self._start = payload_start
                self._begin_direct(length)
            return False
        self._start = payload_start + length
        payload = self._view[payload_start : self._start]
        if kind == ChunkType.OFFSET_HOLE:
            offset, hole_bytes = _HOLE.unpack(payload)
            pending.cover(offset - pending.offset, offset - pending.offset + hole_bytes)
        elif kind == layout.status_kind:
            self._take_status(pending, payload)
        elif kind & CHUNK_ERROR:
            _take_error(pending, kind, payload)
        self._maybe_done(batch, cookie, flags, pending)
        return True

    def _take_data(
        self, batch: list[Reply], cookie: int, flags: int, data_bytes: int, pending: _Pending
    ) -> bool:
        position, there, header = self._start, self._end - self._start, self._layout.data_header
        if there < header.size:
            return False
        begin = header.unpack_from(self._buffer, position)[-1] - pending.offset
        if there < header.size + data_bytes:
            if data_bytes < DIRECT_BYTES_MIN:
                return False
            pending.cover(begin, begin + data_bytes)
            self._awaiting = cookie, flags, ChunkType.OFFSET_DATA
            self._start += header.size
            self._begin_direct(data_bytes, pending.place(begin, data_bytes))
            return False
        pending.cover(begin, begin + data_bytes)
        data_start = position + header.size
        pending.put(begin, self._view[data_start : data_start + data_bytes])
        self._start = data_start + data_bytes
        self._maybe_done(batch, cookie, flags, pending)
        return True

    def _take_status(self, pending: _Pending, payload: memoryview) -> None:
        layout = self._layout
        context_id, *count = layout.status_header.unpack_from(payload)
        if context_id != self._context_id or pending.extents is not None:
            raise PeerError(f"extents of context {context_id}; asked was once for {self._context_id}")  # BS2
        pending.extents = list(layout.extent.iter_unpack(payload[layout.status_header.size :]))
        if count and count[0] != len(pending.extents):
            raise PeerError(f"{count[0]} extents announced, {len(pending.extents)} follow")
        if any(not length for length, _flags in pending.extents):
            raise PeerError("an extent of length 0")

    def _maybe_done(self, batch: list[Reply], cookie: int, flags: int, pending: _Pending) -> None:
        if flags & CHUNK_DONE:  # R5: other flags are ignored
            del self._pending[cookie]
            batch.append(pending.reply(cookie))


def _check_chunk(layout: _Layout, kind: int, flags: int, length: int, pending: _Pending) -> None:
    """Look at a chunk's header before anything is kept for its payload."""
    if kind & CHUNK_ERROR:
        right = ERROR_HEADER.size <= length <= _ERROR_BYTES_MAX
    elif kind == ChunkType.NONE:
        right = length == 0 and bool(flags & CHUNK_DONE)  # R4
    elif kind == ChunkType.OFFSET_DATA:
        right = _OFFSET_BYTES < length <= _OFFSET_BYTES + pending.length
    elif kind == ChunkType.OFFSET_HOLE:
        right = length == _HOLE_BYTES and pending.length > 0
    elif kind == layout.status_kind:
        extents_bytes = length - layout.status_header.size
        right = pending.wants_extents and 0 < extents_bytes <= _EXTENTS_MAX * layout.extent.size
        right = right and extents_bytes % layout.extent.size == 0
    else:
        raise PeerError(f"chunk of unknown type {kind}")  # R12: what it means for the reply nobody knows
    if not right:
        raise PeerError(f"chunk of type {kind} with flags {flags:#x} and {length} bytes: not here")


def _take_error(pending: _Pending, kind: int, payload: memoryview) -> None:
    """Note that the request failed. The first error counts; types that are not known are like ERROR (R12)."""
    error, text_bytes = ERROR_HEADER.unpack_from(payload)
    room = len(payload) - ERROR_HEADER.size - (_OFFSET_BYTES if kind == ChunkType.ERROR_OFFSET else 0)
    exact = kind in (ChunkType.ERROR, ChunkType.ERROR_OFFSET)
    if text_bytes > room or text_bytes > STRING_BYTES_MAX or (exact and text_bytes != room):
        raise PeerError(f"error chunk of {len(payload)} bytes with a text of {text_bytes}")
    if not pending.error:
        pending.error = error or _WIRE_EINVAL
        text = payload[ERROR_HEADER.size : ERROR_HEADER.size + text_bytes]
        pending.text = bytes(text).decode(errors="replace").replace("\0", "")
