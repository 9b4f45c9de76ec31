"""The client's side of the NBD handshake: bytes in, one turn at a time out.

STARTTLS first if there is to be TLS (T10). Then EXTENDED_HEADERS, else STRUCTURED_REPLY, and where the server has
either, SET_META_CONTEXT for base:allocation (SR3, BS1); whatever comes of them, then GO with the information this
client can honour, and EXPORT_NAME when the server does not know GO (EN2, IN11). Driven as handshake.py is; PeerError
when the server breaks the protocol.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Final

from homeloop.errors import PeerError
from homeloop.nbd.protocol import (
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    GREETING_MAGIC,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OLDSTYLE_MAGIC,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_BYTES_DEFAULT_MAX,
    REPLY_ERROR,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
    pack_string,
    unpack_string,
)

__all__ = ["ClientHandshake", "ClientTurn", "Entered", "Refused", "ServerInfo"]

_U32: Final = struct.Struct(">I")
_U16: Final = struct.Struct(">H")
_REPLY_BYTES_MAX: Final = 16 << 10  # data of one option reply: two strings of 4096 at most
_REPLIES_MAX: Final = 64  # information replies to one GO; there are four types
_WANTED: Final = (Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What the server told of the export; the block sizes are the protocol's defaults where it told none."""

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    block_size_minimum: int = 1
    block_size_preferred: int = 4096
    payload_bytes_max: int = PAYLOAD_BYTES_DEFAULT_MAX
    structured: bool = False  # replies are, or more than that
    extended: bool = False  # headers are; replies are structured, too
    allocation_id: int | None = None  # of base:allocation, if it is selected


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """Transmission has begun; `leftover` is what came behind the handshake."""

    info: ServerInfo
    leftover: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The server said no, in order; `reply` is an error type (maybe one unknown to us), `text` for people."""

    reply: int
    text: str


@dataclass(frozen=True, slots=True)
class ClientTurn:
    """Bytes for the server, and whether the handshake is over."""

    data: bytes = b""
    end: Entered | Refused | None = None
    starttls: bool = False  # before the data are sent, shake hands for TLS: what is fed from here on came through it


class _Waiting(Enum):
    GREETING = "greeting"
    STARTTLS_REPLY = "reply to STARTTLS"
    EXTENDED_REPLY = "reply to EXTENDED_HEADERS"
    STRUCTURED_REPLY = "reply to STRUCTURED_REPLY"
    SET_META_REPLY = "reply to SET_META_CONTEXT"
    GO_REPLY = "reply to GO"
    EXPORT_NAME_REPLY = "reply to EXPORT_NAME"
    NOTHING = "nothing: it is over"


class ClientHandshake:
    """One handshake for one export. Not for two threads at once. tls: with TLS, or not at all."""

    def __init__(self, export_name: str, *, tls: bool = False) -> None:
        self._tls = tls
        self._name = pack_string(export_name, "export name")
        self._buffer = bytearray()
        self._waiting = _Waiting.GREETING
        self._no_zeroes = False  # agreed by both sides
        self._replies_seen = 0
        self._structured = False
        self._extended = False
        self._allocation_id: int | None = None
        self._told: dict[str, int | str] = {}  # fields of ServerInfo, as they come
        self._told["name"] = export_name

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the server sent. Drain next_turn() before the next feed."""
        assert self._waiting is not _Waiting.NOTHING, "feed() after the end of the handshake"
        self._buffer += data

    def next_turn(self) -> ClientTurn | None:
        """Return what to do about the next whole thing in the buffer, or None until more is fed."""
        try:
            turn = self._take_next()
        except PeerError:
            self._waiting = _Waiting.NOTHING
            raise
        if turn is not None and turn.end is not None:
            self._waiting = _Waiting.NOTHING
        return turn

    def _take_next(self) -> ClientTurn | None:
        match self._waiting:
            case _Waiting.GREETING:
                return self._take_greeting()
            case _Waiting.STARTTLS_REPLY:
                return self._take_starttls_reply()
            case _Waiting.EXTENDED_REPLY:
                return self._take_headers_reply(Option.EXTENDED_HEADERS)
            case _Waiting.STRUCTURED_REPLY:
                return self._take_headers_reply(Option.STRUCTURED_REPLY)
            case _Waiting.SET_META_REPLY:
                return self._take_set_meta_reply()
            case _Waiting.GO_REPLY:
                return self._take_go_reply()
            case _Waiting.EXPORT_NAME_REPLY:
                return self._take_export_name_reply()
            case _Waiting.NOTHING:
                return None

    def _take_greeting(self) -> ClientTurn | None:
        if len(self._buffer) < GREETING.size:
            return None
        magic, option_magic, offered = GREETING.unpack_from(self._buffer)
        if magic != GREETING_MAGIC:
            raise PeerError(f"greeting begins with {magic:#018x}, not {GREETING_MAGIC:#018x}: no NBD server")
        if option_magic == OLDSTYLE_MAGIC:
            raise PeerError("the server speaks the oldstyle handshake, dead since nbd 3.10")
        if option_magic != OPTION_MAGIC:
            raise PeerError(f"second magic of the greeting is {option_magic:#018x}, not {OPTION_MAGIC:#018x}")
        if not offered & HandshakeFlag.FIXED_NEWSTYLE:
            raise PeerError(f"handshake flags {offered:#x}: the server does not speak fixed newstyle")
        del self._buffer[: GREETING.size]
        flags = ClientFlag.FIXED_NEWSTYLE
        if offered & HandshakeFlag.NO_ZEROES:
            self._no_zeroes = True
            flags |= ClientFlag.NO_ZEROES
        if self._tls:
            self._waiting = _Waiting.STARTTLS_REPLY
            return ClientTurn(CLIENT_FLAGS.pack(flags) + _option(Option.STARTTLS, b""))
        self._waiting = _Waiting.EXTENDED_REPLY
        return ClientTurn(CLIENT_FLAGS.pack(flags) + _option(Option.EXTENDED_HEADERS, b""))

    def _take_starttls_reply(self) -> ClientTurn | None:
        if (reply := self._take_option_reply(Option.STARTTLS)) is None:
            return None
        kind, data = reply
        if kind & REPLY_ERROR:
            return self._left(kind, b"no TLS: " + data)  # T10
        if kind != OptionReply.ACK:
            raise PeerError(f"reply type {kind} to STARTTLS")
        if self._buffer:  # T14: from anybody on the way, and to be read as if it came from the server
            raise PeerError(f"{len(self._buffer)} bytes in clear behind the reply to STARTTLS")
        self._waiting = _Waiting.EXTENDED_REPLY
        return ClientTurn(_option(Option.EXTENDED_HEADERS, b""), starttls=True)

    def _take_headers_reply(self, asked: Option) -> ClientTurn | None:
        """Of EXTENDED_HEADERS, and of STRUCTURED_REPLY where there are none."""
        if (reply := self._take_option_reply(asked)) is None:
            return None
        kind, data = reply
        if kind == OptionReply.ERR_SHUTDOWN:
            return self._left(kind, data)  # O7
        if kind & REPLY_ERROR:
            if asked is Option.STRUCTURED_REPLY:
                return self._go()  # SR3: it has none
            self._waiting = _Waiting.STRUCTURED_REPLY
            return ClientTurn(_option(Option.STRUCTURED_REPLY, b""))
        if kind != OptionReply.ACK:
            raise PeerError(f"reply type {kind} to {asked.name}")
        self._structured, self._extended = True, asked is Option.EXTENDED_HEADERS
        return self._select()

    def _select(self) -> ClientTurn:
        self._waiting = _Waiting.SET_META_REPLY
        query = BASE_ALLOCATION.encode()
        contexts = _U32.pack(len(self._name)) + self._name + _U32.pack(1) + _U32.pack(len(query)) + query
        return ClientTurn(_option(Option.SET_META_CONTEXT, contexts))

    def _take_set_meta_reply(self) -> ClientTurn | None:
        if (reply := self._take_option_reply(Option.SET_META_CONTEXT)) is None:
            return None
        kind, data = reply
        if kind == OptionReply.ERR_SHUTDOWN:
            return self._left(kind, data)
        if kind == OptionReply.META_CONTEXT:
            if len(data) < _U32.size:
                raise PeerError(f"meta context of {len(data)} bytes")
            if unpack_string(data[_U32.size :], "meta context") != BASE_ALLOCATION or self._allocation_id is not None:
                raise PeerError(f"meta context {data[_U32.size :][:64]!r}: asked was once for {BASE_ALLOCATION}")
            (self._allocation_id,) = _U32.unpack_from(data)
            return ClientTurn()
        if kind & REPLY_ERROR:
            self._allocation_id = None  # MC6
        elif kind != OptionReply.ACK:
            raise PeerError(f"reply type {kind} to SET_META_CONTEXT")
        return self._go()

    def _go(self) -> ClientTurn:
        self._waiting = _Waiting.GO_REPLY
        wanted = struct.pack(f">H{len(_WANTED)}H", len(_WANTED), *_WANTED)
        return ClientTurn(_option(Option.GO, _U32.pack(len(self._name)) + self._name + wanted))

    def _take_option_reply(self, asked: Option) -> tuple[int, bytes] | None:
        """Return type and data of the next reply, which must be to that option; None until it is there."""
        if len(self._buffer) < OPTION_REPLY.size:
            return None
        magic, number, kind, length = OPTION_REPLY.unpack_from(self._buffer)
        if magic != OPTION_REPLY_MAGIC:
            raise PeerError(f"option reply magic is {magic:#018x}, not {OPTION_REPLY_MAGIC:#018x}")
        if number != asked:
            raise PeerError(f"reply to option {number}, asked was {asked}")
        if length > _REPLY_BYTES_MAX:
            raise PeerError(f"option reply of {length} bytes, the limit is {_REPLY_BYTES_MAX}")
        end = OPTION_REPLY.size + length
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[OPTION_REPLY.size : end])
        del self._buffer[:end]
        return kind, data

    def _take_go_reply(self) -> ClientTurn | None:
        if (reply := self._take_option_reply(Option.GO)) is None:
            return None
        kind, data = reply
        if kind == OptionReply.ACK:
            if "size" not in self._told:
                raise PeerError("GO was acknowledged without the size of the export")
            return ClientTurn(b"", self._entered())
        if kind & REPLY_ERROR:
            return self._refused(kind, data)
        if kind != OptionReply.INFO:
            raise PeerError(f"reply type {kind} to GO")
        self._replies_seen += 1
        if self._replies_seen > _REPLIES_MAX:
            raise PeerError(f"more than {_REPLIES_MAX} information replies to one GO")
        self._take_info(data)
        return ClientTurn()

    def _refused(self, kind: int, data: bytes) -> ClientTurn:
        if kind == OptionReply.ERR_UNSUP and not self._extended:  # with those, GO is there
            self._waiting = _Waiting.EXPORT_NAME_REPLY
            self._told = {"name": self._told["name"]}
            return ClientTurn(_option(Option.EXPORT_NAME, self._name))
        return self._left(kind, data)

    def _left(self, kind: int, data: bytes) -> ClientTurn:
        # O4: the polite way out. Nobody waits for its ACK (AB2).
        return ClientTurn(_option(Option.ABORT, b""), Refused(reply=kind, text=data.decode(errors="replace")))

    def _take_info(self, data: bytes) -> None:
        if len(data) < _U16.size:
            raise PeerError(f"information reply of {len(data)} bytes")
        (kind,) = _U16.unpack_from(data)
        if kind == Info.EXPORT:
            if len(data) != INFO_EXPORT.size:
                raise PeerError(f"INFO_EXPORT of {len(data)} bytes, not {INFO_EXPORT.size}")
            _kind, self._told["size"], self._told["flags"] = INFO_EXPORT.unpack(data)
        elif kind == Info.NAME:
            self._told["name"] = unpack_string(data[_U16.size :], "export name")
        elif kind == Info.DESCRIPTION:
            self._told["description"] = unpack_string(data[_U16.size :], "description")
        elif kind == Info.BLOCK_SIZE:
            self._take_block_size(data)
        # IN5: others are not for us.

    def _take_block_size(self, data: bytes) -> None:
        if len(data) != INFO_BLOCK_SIZE.size:
            raise PeerError(f"INFO_BLOCK_SIZE of {len(data)} bytes, not {INFO_BLOCK_SIZE.size}")
        _kind, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(data)
        if not (0 < minimum <= 65536 and minimum & (minimum - 1) == 0):
            raise PeerError(f"minimum block size {minimum}: no power of two up to 65536")
        if preferred < minimum or preferred & (preferred - 1) or maximum < minimum:
            raise PeerError(f"block sizes {minimum}, {preferred}, {maximum} do not fit together")
        self._told["block_size_minimum"] = minimum
        self._told["block_size_preferred"] = preferred
        self._told["payload_bytes_max"] = maximum

    def _take_export_name_reply(self) -> ClientTurn | None:
        end = EXPORT_NAME_REPLY.size + (0 if self._no_zeroes else len(EXPORT_NAME_ZEROES))
        if len(self._buffer) < end:
            return None
        self._told["size"], self._told["flags"] = EXPORT_NAME_REPLY.unpack_from(self._buffer)
        del self._buffer[:end]
        return ClientTurn(b"", self._entered())

    def _entered(self) -> Entered:
        told = dict(self._told)
        flags = TransmissionFlag(int(told.pop("flags")))
        leftover = bytes(self._buffer)
        self._buffer.clear()
        info = ServerInfo(
            flags=flags,
            structured=self._structured,
            extended=self._extended,
            allocation_id=self._allocation_id,
            **told,  # type: ignore[arg-type]
        )
        return Entered(info=info, leftover=leftover)


def _option(option: Option, data: bytes) -> bytes:
    return OPTION.pack(OPTION_MAGIC, option, len(data)) + data
