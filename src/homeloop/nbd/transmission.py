"""Pure codec of the transmission phase: requests in (replies.py writes the answers), and the client's mirror of it.

    reader = RequestReader()
    count = sock.recvmsg_into(reader.targets())[0]
    reader.received(count)
    while batch := reader.next_batch(256):
        for command, flags, cookie, offset, length, payload in batch: ...

The reader owns the memory that is received into, so that a 4 KiB WRITE reaches the driver as a view of the
receive buffer and a 1 MiB WRITE is received straight into a buffer of its own; nothing is copied twice.
Requests are plain tuples: building an object for each costs more than all the parsing (0.3 µs a request).
No sockets, clock or asyncio here.

Source: doc/proto.md, "Transmission phase"; ids as in the test names.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from homeloop.errors import PeerError
from homeloop.nbd.protocol import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    PAYLOAD_BYTES_DEFAULT_MAX,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
)

__all__ = [
    "DIRECT_BYTES_MIN",
    "RECEIVE_BYTES",
    "ReceiveBuffer",
    "Reply",
    "ReplyReader",
    "Request",
    "RequestReader",
    "pack_extended_request",
    "pack_request",
]

# command, command flags, cookie, offset, length, payload if one came (valid until the next targets())
Request: TypeAlias = tuple[int, int, int, int, int, memoryview | None]
# cookie, error number of the wire (0: none), and what was asked for: the payload of a READ (the receiver's own), the
# (length, flags) of a BLOCK_STATUS; of an error the server's text, if it gave one
Reply: TypeAlias = tuple[int, int, bytes | bytearray | list[tuple[int, int]] | str | None]

RECEIVE_BYTES: Final = 256 << 10
# From here on a payload that is not yet all there gets memory of its own; below, it is awaited in the buffer.
DIRECT_BYTES_MIN: Final = 32 << 10
# The memory of a larger one is not kept for the next: a client that asks for nothing must not hold 32 MiB.
_SPARE_BYTES_MAX: Final = 4 << 20
_WRITE: Final = Command.WRITE.value
_PAYLOAD_LEN: Final = CommandFlag.PAYLOAD_LEN.value


def pack_request(command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """Return the header of a request; the data of a WRITE follows it."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def pack_extended_request(command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """The same where extended headers are agreed; `flags` says if a payload follows, but for WRITE (X-3)."""
    if command == _WRITE:
        flags |= _PAYLOAD_LEN
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)


class ReceiveBuffer:
    """What has been received and not yet used, and at most one large payload that is on its way in.

    Memory held: one receive buffer, and one payload of at most what the subclass lets through.
    """

    def __init__(self, header_bytes: int, receive_bytes: int = RECEIVE_BYTES) -> None:
        assert receive_bytes >= 2 * DIRECT_BYTES_MIN, receive_bytes
        self._header_bytes = header_bytes
        self._buffer = bytearray(receive_bytes)
        self._view = memoryview(self._buffer)
        self._start = 0  # of what is not used yet
        self._end = 0  # of what was received
        self._direct: memoryview | None = None  # a payload with memory of its own
        self._direct_filled = 0
        self._narrow = False  # the last message had such a payload: the next one probably has, too
        self._lent: bytearray | None = None  # the memory of the last such payload, in the caller's hands
        self._spare: bytearray | None = None  # given back, for the next such payload

    @property
    def buffered_bytes(self) -> int:
        """Received and not yet used."""
        return self._end - self._start + self._direct_filled

    def targets(self) -> list[memoryview]:
        """Return where the next bytes go, for recvmsg_into(). Ends the life of payloads handed out before.

        To be called when next_batch() had nothing more: then there is room for the rest of what was begun.
        """
        direct = self._direct
        if direct is not None:
            # The buffer is empty now. Behind the payload there is room for one header only: what follows is
            # likely to be a header and again a large payload, which must not land in the buffer first.
            return [direct[self._direct_filled :], self._view[: self._header_bytes]]
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
            return [self._view[: self._header_bytes]] if self._narrow else [self._view]
        if start:
            self._view[: end - start] = self._view[start:end]
            self._start, self._end = 0, end - start
        assert self._end < len(self._buffer), "a batch was not taken"
        return [self._view[self._end :]]

    def received(self, count: int) -> None:
        """Take note that `count` bytes are in the targets now."""
        direct = self._direct
        if direct is not None:
            filled = min(count, len(direct) - self._direct_filled)
            self._direct_filled += filled
            count -= filled
        self._end += count
        assert self._end <= len(self._buffer), (self._end, len(self._buffer))

    def retire(self) -> None:
        """Go on with a new buffer: somebody keeps views of the present one beyond the next targets()."""
        left = self._end - self._start
        buffer = bytearray(len(self._buffer))
        buffer[:left] = self._view[self._start : self._end]
        self._buffer, self._view = buffer, memoryview(buffer)
        self._start, self._end = 0, left

    def _begin_direct(self, length: int, into: memoryview | None = None) -> None:
        """Give the payload that begins at _start memory of its own (`into`), and move what is there of it."""
        if into is None:
            spare, self._spare = self._spare, None
            if spare is None or not length <= len(spare) <= 2 * length:
                spare = bytearray(length)
            into = memoryview(spare)[:length]
        self._direct = into
        self._direct_filled = self._end - self._start
        self._direct[: self._direct_filled] = self._view[self._start : self._end]
        self._start = self._end = 0

    def _take_direct(self) -> memoryview | None:
        """Return the payload with memory of its own once it is whole; it is the caller's then."""
        direct = self._direct
        if direct is None or self._direct_filled < len(direct):
            return None
        self._direct = None
        self._direct_filled = 0
        self._narrow = True
        assert isinstance(direct.obj, bytearray), type(direct.obj)
        self._lent = direct.obj
        return direct


class RequestReader(ReceiveBuffer):
    """The server's side: bytes of one client in, requests out.

    extended: so the headers are. Then it is a flag that says whether a payload follows, which any request may
    have (X-4: what does not expect one is for the caller to refuse).
    """

    def __init__(
        self,
        *,
        payload_bytes_max: int = PAYLOAD_BYTES_DEFAULT_MAX,
        receive_bytes: int = RECEIVE_BYTES,
        extended: bool = False,
    ) -> None:
        self._header, self._magic = (
            (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
        )
        super().__init__(self._header.size, receive_bytes)
        self._payload_flag = _PAYLOAD_LEN if extended else 0
        self._payload_bytes_max = payload_bytes_max
        self._awaiting: Request | None = None  # the one whose payload is on its way
        self.has_more = False  # next_batch() may have more to say before more is received

    def give_back(self, payload: memoryview) -> None:
        """Take a payload's memory for the next one: nobody uses it any more."""
        if self._lent is not None and payload.obj is self._lent:
            self._spare = self._lent if len(self._lent) <= _SPARE_BYTES_MAX else None
            self._lent = None

    def owns(self, payload: memoryview) -> bool:
        """Whether this payload lies in the receive buffer: if so, it is gone after the next targets()."""
        return payload.obj is self._buffer

    def next_batch(self, requests_max: int) -> list[Request]:
        """Return the next whole requests, at most `requests_max`; none until more is received.

        Raises PeerError on bytes that no later byte can make a request; the whole requests before them were
        returned by the call before. Sizes are checked before anything is kept for them.
        """
        batch: list[Request] = []
        self.has_more = False
        if self._direct is not None:
            payload = self._take_direct()
            if payload is None:
                return batch
            assert self._awaiting is not None
            command, flags, cookie, offset, length, _ = self._awaiting
            batch.append((command, flags, cookie, offset, length, payload))
        header_bytes, unpack_from = self._header.size, self._header.unpack_from
        expected_magic, payload_flag = self._magic, self._payload_flag
        buffer, position, end = self._buffer, self._start, self._end
        while end - position >= header_bytes and len(batch) < requests_max:
            magic, flags, command, cookie, offset, length = unpack_from(buffer, position)
            with_payload = command == _WRITE or (flags and flags & payload_flag)
            if magic != expected_magic or (
                with_payload and (length > self._payload_bytes_max or flags & payload_flag != payload_flag)
            ):
                if batch:
                    self.has_more = True
                    break  # the next call raises, from here
                self._refuse(magic, command, flags, length)
            if not with_payload:
                position += header_bytes
                self._narrow = False
                batch.append((command, flags, cookie, offset, length, None))
                continue
            payload_end = position + header_bytes + length
            if payload_end > end:
                if length >= DIRECT_BYTES_MIN:
                    self._awaiting = (command, flags, cookie, offset, length, None)
                    self._start = position + header_bytes
                    self._begin_direct(length)
                    return batch
                self._narrow = False
                break
            self._narrow = False
            payload = self._view[position + header_bytes : payload_end]
            position = payload_end
            batch.append((command, flags, cookie, offset, length, payload))
        self._start = position
        self.has_more |= len(batch) >= requests_max
        return batch

    def _refuse(self, magic: int, command: int, flags: int, length: int) -> None:
        if magic != self._magic:
            raise PeerError(f"request magic is {magic:#010x}, not {self._magic:#010x}")
        if command == _WRITE and flags & self._payload_flag != self._payload_flag:
            # does its payload follow, or not? Implementations differ, and a guess would read data as requests.
            raise PeerError(f"WRITE of {length} bytes with flags {flags:#x}: without PAYLOAD_LEN")
        what = "WRITE" if command == _WRITE else f"payload for command {command}"
        raise PeerError(f"{what} of {length} bytes, the limit is {self._payload_bytes_max}")


class ReplyReader(ReceiveBuffer):
    """The client's side: bytes of the server in, simple replies out. The owner says what it waits for."""

    def __init__(self, receive_bytes: int = RECEIVE_BYTES) -> None:
        super().__init__(SIMPLE_REPLY.size, receive_bytes)
        self._expected: dict[int, int] = {}  # cookie -> bytes of payload if the request succeeds
        self._awaiting = 0  # the cookie whose payload is on its way

    def expect(self, cookie: int, payload_bytes: int, *, offset: int = 0, wants_extents: bool = False) -> None:
        """Wait for the reply to a request; cookies in flight are distinct (X2). As in ChunkReader."""
        assert not wants_extents, "BLOCK_STATUS without structured replies"
        assert cookie not in self._expected, cookie
        self._expected[cookie] = payload_bytes

    def next_batch(self) -> list[Reply]:
        """Return the next whole replies; none until more is received. PeerError as in RequestReader."""
        batch: list[Reply] = []
        if self._take_direct() is not None:
            batch.append((self._awaiting, 0, self._lent))
            self._lent = None
        elif self._direct is not None:
            return batch
        header_bytes = SIMPLE_REPLY.size
        position, end = self._start, self._end
        while end - position >= header_bytes:
            magic, error, cookie = SIMPLE_REPLY.unpack_from(self._buffer, position)
            length = self._expected.get(cookie, -1)
            if magic != SIMPLE_REPLY_MAGIC or length < 0:
                if batch:
                    break  # the next call raises, from here
                self._refuse(magic, cookie)
            if error or not length:
                del self._expected[cookie]
                position += header_bytes
                self._narrow = False
                batch.append((cookie, error, None))
                continue
            payload_end = position + header_bytes + length
            if payload_end > end and length < DIRECT_BYTES_MIN:
                self._narrow = False
                break
            del self._expected[cookie]
            if payload_end > end:
                self._awaiting = cookie
                self._start = position + header_bytes
                self._begin_direct(length)
                return batch
            batch.append((cookie, 0, bytes(self._view[position + header_bytes : payload_end])))
            position = payload_end
            self._narrow = False
        self._start = position
        return batch

    def _refuse(self, magic: int, cookie: int) -> None:
        if magic == STRUCTURED_REPLY_MAGIC:
            raise PeerError("a structured reply, which was not agreed")
        if magic != SIMPLE_REPLY_MAGIC:
            raise PeerError(f"reply magic is {magic:#010x}, not {SIMPLE_REPLY_MAGIC:#010x}")
        raise PeerError(f"reply to cookie {cookie:#x}, for which no request is in flight")
