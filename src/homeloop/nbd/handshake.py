"""The server's side of the NBD handshake: bytes in, one turn at a time out.

    handshake = Handshake(exports)
    send(handshake.greeting())
    handshake.feed(received)
    while (turn := handshake.next_turn()) is not None:
        send(turn.data)                     # may be empty
        if turn.starttls: ...               # after its data: shake hands for TLS, go on in that
        if turn.end is not None: ...        # Negotiated: transmission begins; Ended: hang up

One option is one turn, so that who drives this can send (and wait for a slow client) between two of them: a
16-byte LIST may have an answer of a hundred kilobytes. Held at any time: what the caller fed and did not yet
drain by next_turn(), and at most one option's data. No sockets, clock or asyncio here.

Source: doc/proto.md, "Handshake phase"; the ids (H4, EN1...) are those of the test names.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
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
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    STRING_BYTES_MAX,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
    unpack_string,
)

__all__ = [
    "Agreed",
    "Ended",
    "ExportInfo",
    "Handshake",
    "HandshakeLimits",
    "Negotiated",
    "TlsMode",
    "Turn",
    "find_export",
]

_U32: Final = struct.Struct(">I")
_U16: Final = struct.Struct(">H")
_INFO_REQUEST_BYTES_MIN: Final = _U32.size + _U16.size
_META_REQUEST_BYTES_MIN: Final = _U32.size + _U32.size
_LISTED_ID: Final = 0  # MC5
_ALLOCATION_ID: Final = 1
# An int: ~ of an IntFlag keeps to the flags it knows, and would see no unknown one.
_CLIENT_FLAGS_KNOWN: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)

# The options whose data are looked at, besides EXPORT_NAME.
_WITH_DATA: Final = frozenset({Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT})


class TlsMode(Enum):
    """What a server makes of TLS: the same for the life of a connection (T1)."""

    NONE = "NOTLS"  # STARTTLS is an option like any unknown one (T2)
    SELECTIVE = "SELECTIVETLS"  # some exports need it (T6)
    REQUIRED = "FORCEDTLS"  # nothing goes without (T5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """What a client may learn of an export: a value, checked by who made it (strings: H9, sizes: Z1)."""

    name: str
    size: int
    flags: TransmissionFlag
    number: int = 0  # tells an export from another that had its name
    description: str = ""
    block_size_minimum: int = 1
    block_size_preferred: int = 4096
    payload_bytes_max: int = 1 << 25
    tls_only: bool = False  # not for clients without TLS


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeLimits:
    """What a client may cost us before it has chosen an export."""

    options_max: int = 4096  # enough to ask twice for each of two thousand exports
    option_bytes_max: int = 16 << 10  # held for one option; the longest useful GO has 4110
    skip_bytes_max: int = 1 << 25  # an option with more data than this is an attack, not a mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What a client has asked for, and was given, beyond the baseline."""

    structured: bool = False  # structured replies, or what is more
    extended: bool = False  # extended headers; structured, too
    allocation_id: int | None = None  # under which BLOCK_STATUS tells base:allocation; None: not selected


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """The client has chosen; what it sent behind its last option is `leftover`: transmission begins there."""

    export: ExportInfo
    leftover: bytes
    agreed: Agreed = Agreed()


@dataclass(frozen=True, slots=True)
class Ended:
    """Hang up. `reason` is for the log; empty if the client left in order."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """The answer to one thing that the client sent: bytes for it, and whether the handshake is over."""

    data: bytes = b""
    end: Negotiated | Ended | None = None
    starttls: bool = False  # send the data, then shake hands for TLS: what is fed from here on came through it


class _Refused(Exception):
    """An option gets an error reply; the handshake goes on. Never leaves this module."""

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


def find_export(exports: Mapping[str, ExportInfo], name: str) -> ExportInfo | None:
    """Return the export of that name; the empty name also means the only export, if there is one (EN3)."""
    export = exports.get(name)
    if export is None and not name and len(exports) == 1:
        (export,) = exports.values()
    return export


class Handshake:
    """One client's handshake. Not for two threads at once; when next_turn() raises PeerError it is over."""

    def __init__(
        self,
        exports: Mapping[str, ExportInfo],
        *,
        limits: HandshakeLimits | None = None,
        tls: TlsMode = TlsMode.NONE,
    ) -> None:
        self._exports = exports  # the owner's, live: may change between two turns
        self._tls = tls
        self._secure = False  # what is fed came through TLS
        self._limits = limits if limits is not None else HandshakeLimits()
        self._buffer = bytearray()  # received, not yet used
        self._client_flags: ClientFlag | None = None  # None until the client has sent them
        self._option: tuple[int, int] | None = None  # number and length of the option whose data is coming
        self._skip_bytes = 0  # of that option's data, still to be thrown away
        self._options_seen = 0
        self._structured = False  # structured replies are agreed
        self._extended = False  # extended headers are, and win
        self._allocation_of: ExportInfo | None = None  # the export whose base:allocation is selected
        self._ended = False
        self.shutting_down = False  # set by the owner at any time: from then on ERR_SHUTDOWN (O6)

    @property
    def buffered_bytes(self) -> int:
        """Fed and not yet used."""
        return len(self._buffer)

    def greeting(self) -> bytes:
        """Return what the server says first."""
        offered = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        return GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, offered)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent. Drain next_turn() before the next feed: only that bounds the buffer."""
        assert not self._ended, "feed() after the end of the handshake"
        self._buffer += data

    def next_turn(self) -> Turn | None:
        """Return the answer to the next whole thing in the buffer, or None until more is fed.

        Raises PeerError on what no later byte can make right; hang up then.
        """
        if self._ended:
            return None
        try:
            turn = self._take_flags() if self._client_flags is None else self._take_option()
        except PeerError:
            self._ended = True
            raise
        if turn is not None and turn.end is not None:
            self._ended = True
        return turn

    def _take_flags(self) -> Turn | None:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return None
        (flags,) = CLIENT_FLAGS.unpack_from(self._buffer)
        del self._buffer[: CLIENT_FLAGS.size]
        if flags & ~_CLIENT_FLAGS_KNOWN:
            raise PeerError(f"client flags {flags:#x}, known are {_CLIENT_FLAGS_KNOWN:#x}")
        self._client_flags = ClientFlag(flags)
        return Turn()

    def _take_option(self) -> Turn | None:
        if self._option is None:
            if len(self._buffer) < OPTION.size:
                return None
            self._option = self._take_option_header()
        number, length = self._option
        if self._skip_bytes:
            taken = min(self._skip_bytes, len(self._buffer))
            del self._buffer[:taken]
            self._skip_bytes -= taken
            if self._skip_bytes:
                return None
            data = b""
        elif self._holds_data(number, length):
            if len(self._buffer) < length:
                return None
            data = bytes(self._buffer[:length])
            del self._buffer[:length]
        else:
            data = b""
        self._option = None
        return self._answer(number, length, data)

    def _take_option_header(self) -> tuple[int, int]:
        magic, number, length = OPTION.unpack_from(self._buffer)
        del self._buffer[: OPTION.size]
        if magic != OPTION_MAGIC:
            raise PeerError(f"option magic is {magic:#018x}, not {OPTION_MAGIC:#018x}")
        self._options_seen += 1
        if self._options_seen > self._limits.options_max:
            raise PeerError(f"more than {self._limits.options_max} options in one handshake")
        assert self._client_flags is not None
        if number != Option.EXPORT_NAME and ClientFlag.FIXED_NEWSTYLE not in self._client_flags:
            # Plain newstyle has no option replies: there is no way to say no.
            raise PeerError(f"option {_option_name(number)} without fixed newstyle")
        if number == Option.EXPORT_NAME and length > STRING_BYTES_MAX:
            raise PeerError(f"EXPORT_NAME of {length} bytes, the limit is {STRING_BYTES_MAX}")
        if length > self._limits.skip_bytes_max:
            limit = self._limits.skip_bytes_max
            raise PeerError(f"option {_option_name(number)} with {length} bytes, the limit is {limit}")
        if not self._holds_data(number, length):
            self._skip_bytes = length
        return number, length

    def _holds_data(self, number: int, length: int) -> bool:
        """Whether that option's data is read at all: what nobody will look at is not kept."""
        if number == Option.EXPORT_NAME:
            return True
        return number in _WITH_DATA and length <= self._limits.option_bytes_max

    def _answer(self, number: int, length: int, data: bytes) -> Turn:
        if number == Option.EXPORT_NAME:
            return self._export_name(data)
        if number == Option.ABORT:
            return Turn(_reply(number, OptionReply.ACK), Ended())
        try:
            if self.shutting_down:
                raise _Refused(OptionReply.ERR_SHUTDOWN, "this server is shutting down")
            if number == Option.STARTTLS and self._tls is not TlsMode.NONE:
                return self._starttls(length)
            if self._tls is TlsMode.REQUIRED and not self._secure:
                raise _Refused(OptionReply.ERR_TLS_REQD, "this server is for TLS only: STARTTLS comes first")
            if number == Option.LIST:
                return Turn(self._list(length))
            if number in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
                self._agree(number, length)
                return Turn(_reply(number, OptionReply.ACK))
            if number == Option.SET_META_CONTEXT:
                self._allocation_of = None  # MC7: whatever comes of it
            if number in _WITH_DATA:
                if length > self._limits.option_bytes_max:
                    text = f"{length} bytes of option data, the limit is {self._limits.option_bytes_max}"
                    raise _Refused(OptionReply.ERR_TOO_BIG, text)
                if number in (Option.INFO, Option.GO):
                    return self._info(number, data)
                return Turn(self._meta_context(number, data))
            raise _Refused(OptionReply.ERR_UNSUP, f"option {_option_name(number)} is not supported")
        except _Refused as refusal:
            return Turn(_reply(number, refusal.reply, refusal.text.encode()))

    def _starttls(self, length: int) -> Turn:
        if self._secure or length:
            text = f"STARTTLS carries {length} bytes of data, it has none" if length else "this is TLS already"
            raise _Refused(OptionReply.ERR_INVALID, text)
        if self._buffer:
            # T14: sent in clear by anybody on the way, and to be read as if it came from the client.
            raise PeerError(f"{len(self._buffer)} bytes in clear behind STARTTLS")
        # O9: whoever it was who asked for these.
        self._structured = self._extended = False
        self._allocation_of = None
        self._secure = True
        return Turn(_reply(Option.STARTTLS, OptionReply.ACK), starttls=True)

    def _is_closed(self, export: ExportInfo) -> bool:
        """Whether it is only for clients with TLS, and this is none (yet)."""
        return export.tls_only and not self._secure

    def _export_name(self, data: bytes) -> Turn:
        name = unpack_string(data, "export name")
        if self.shutting_down:
            return Turn(b"", Ended("EXPORT_NAME while shutting down"))
        if self._tls is TlsMode.REQUIRED and not self._secure:
            return Turn(b"", Ended("EXPORT_NAME before STARTTLS"))
        export = find_export(self._exports, name)
        if self._extended:
            return Turn(b"", Ended("EXPORT_NAME after extended headers were agreed"))
        if export is None:  # EN1: there is no reply that would say so
            return Turn(b"", Ended(f"EXPORT_NAME asks for export {name!r}, which does not exist"))
        if self._is_closed(export):
            return Turn(b"", Ended(f"EXPORT_NAME asks for export {name!r} without TLS"))
        answer = EXPORT_NAME_REPLY.pack(export.size, self._flags(export))
        assert self._client_flags is not None
        if ClientFlag.NO_ZEROES not in self._client_flags:
            answer += EXPORT_NAME_ZEROES
        return Turn(answer, self._negotiated(export))

    def _agree(self, number: int, length: int) -> None:
        """STRUCTURED_REPLY and EXTENDED_HEADERS: neither has data, and the latter wins (X-1, X-10)."""
        if length:
            text = f"{_option_name(number)} carries {length} bytes of data, it has none"
            raise _Refused(OptionReply.ERR_INVALID, text)
        if number == Option.EXTENDED_HEADERS:
            self._extended = self._structured = True
        elif self._extended:
            raise _Refused(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are agreed: they have it all")
        else:
            self._structured = True

    def _list(self, length: int) -> bytes:
        if length:
            raise _Refused(OptionReply.ERR_INVALID, f"LIST carries {length} bytes of data, it has none")
        replies = bytearray()
        for export in self._exports.values():
            if self._is_closed(export):
                continue
            name = export.name.encode()
            replies += _reply(
                Option.LIST, OptionReply.SERVER, _U32.pack(len(name)) + name + export.description.encode()
            )
        return bytes(replies) + _reply(Option.LIST, OptionReply.ACK)

    def _info(self, number: int, data: bytes) -> Turn:
        name, wanted = _unpack_info_request(data)
        export = find_export(self._exports, name)
        if export is None:
            raise _Refused(OptionReply.ERR_UNKNOWN, f"there is no export named {name[:256]!r}")
        if self._is_closed(export):
            raise _Refused(OptionReply.ERR_TLS_REQD, f"export {export.name[:256]!r} is for TLS only")
        replies = [INFO_EXPORT.pack(Info.EXPORT, export.size, self._flags(export))]
        if Info.NAME in wanted:
            replies.append(_U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            replies.append(_U16.pack(Info.DESCRIPTION) + export.description.encode())
        if Info.BLOCK_SIZE in wanted:
            replies.append(
                INFO_BLOCK_SIZE.pack(
                    Info.BLOCK_SIZE,
                    export.block_size_minimum,
                    export.block_size_preferred,
                    export.payload_bytes_max,
                )
            )
        answer = b"".join(_reply(number, OptionReply.INFO, reply) for reply in replies)
        answer += _reply(number, OptionReply.ACK)
        return Turn(answer, self._negotiated(export) if number == Option.GO else None)

    def _meta_context(self, number: int, data: bytes) -> bytes:
        """LIST_META_CONTEXT and SET_META_CONTEXT. There is one context: base:allocation."""
        if not self._structured:
            raise _Refused(OptionReply.ERR_INVALID, f"{_option_name(number)} before STRUCTURED_REPLY")  # MC1
        name, queries = _unpack_meta_request(data)
        export = find_export(self._exports, name)
        if export is None:
            raise _Refused(OptionReply.ERR_UNKNOWN, f"there is no export named {name[:256]!r}")
        if self._is_closed(export):  # T6: TLS_REQD is for INFO and GO
            raise _Refused(OptionReply.ERR_POLICY, f"export {export.name[:256]!r} is for TLS only")
        if number == Option.SET_META_CONTEXT:
            matches, context_id = BASE_ALLOCATION in queries, _ALLOCATION_ID
            self._allocation_of = export if matches else None
        else:  # MC4, MC9: no query is all, the namespace alone is all of it
            matches, context_id = not queries or not queries.isdisjoint({BASE_ALLOCATION, "base:"}), _LISTED_ID
        told = _U32.pack(context_id) + BASE_ALLOCATION.encode()
        answer = _reply(number, OptionReply.META_CONTEXT, told) if matches else b""
        return answer + _reply(number, OptionReply.ACK)

    def _flags(self, export: ExportInfo) -> TransmissionFlag:
        """X6, SR4: DF is there if and only if structured replies are. X-9: a filter, if there is what to filter."""
        flags = export.flags
        if self._structured:
            flags |= TransmissionFlag.SEND_DF
        if self._extended and self._selected(export):
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

    def _selected(self, export: ExportInfo) -> bool:
        """Whether its base:allocation is."""
        selected = self._allocation_of
        return selected is not None and (selected.name, selected.number) == (export.name, export.number)

    def _negotiated(self, export: ExportInfo) -> Negotiated:
        leftover = bytes(self._buffer)
        self._buffer.clear()
        # BS1: what was selected for another export does not count.
        allocation_id = _ALLOCATION_ID if self._selected(export) else None
        agreed = Agreed(structured=self._structured, extended=self._extended, allocation_id=allocation_id)
        return Negotiated(export=export, leftover=leftover, agreed=agreed)


def _reply(number: int, reply: OptionReply, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, number, reply, len(data)) + data


def _option_name(number: int) -> str:
    try:
        return Option(number).name
    except ValueError:
        return str(number)


def _unpack_name(data: bytes, bytes_min: int) -> tuple[str, int]:
    """Return the export's name that stands first, and where it ends; `bytes_min`: of all data with an empty one."""
    if len(data) < bytes_min:
        raise _Refused(OptionReply.ERR_INVALID, f"{len(data)} bytes of data do not hold a name and a count")
    (name_bytes,) = _U32.unpack_from(data)
    if name_bytes > len(data) - bytes_min:
        raise _Refused(OptionReply.ERR_INVALID, f"name of {name_bytes} bytes in {len(data)} bytes of data")
    end = _U32.size + name_bytes
    return _unpack_text(data[_U32.size : end], "name"), end


def _unpack_text(data: bytes, what: str) -> str:
    if len(data) > STRING_BYTES_MAX:
        raise _Refused(OptionReply.ERR_TOO_BIG, f"{what} of {len(data)} bytes, the limit is {STRING_BYTES_MAX}")
    try:
        return unpack_string(data, what)
    except PeerError as error:
        raise _Refused(OptionReply.ERR_INVALID, str(error)) from error


def _unpack_info_request(data: bytes) -> tuple[str, frozenset[int]]:
    """Return name and wanted information types of INFO or GO; a type asked for twice counts once (IN4)."""
    name, position = _unpack_name(data, _INFO_REQUEST_BYTES_MIN)
    (count,) = _U16.unpack_from(data, position)
    position += _U16.size
    if len(data) - position != count * _U16.size:
        text = f"{count} information types announced, {len(data) - position} bytes follow"
        raise _Refused(OptionReply.ERR_INVALID, text)
    return name, frozenset(struct.unpack_from(f">{count}H", data, position))


def _unpack_meta_request(data: bytes) -> tuple[str, frozenset[str]]:
    """Return name and queries of LIST_META_CONTEXT or SET_META_CONTEXT (MC3)."""
    name, position = _unpack_name(data, _META_REQUEST_BYTES_MIN)
    (count,) = _U32.unpack_from(data, position)
    position += _U32.size
    if count > (len(data) - position) // _U32.size:
        text = f"{count} queries announced, {len(data) - position} bytes follow"
        raise _Refused(OptionReply.ERR_INVALID, text)
    queries = set()
    for number in range(count):
        query_end = position + _U32.size
        if query_end <= len(data):
            query_end += _U32.unpack_from(data, position)[0]
        if query_end > len(data):
            raise _Refused(OptionReply.ERR_INVALID, f"query {number + 1} of {count} does not fit into the data")
        queries.add(_unpack_text(data[position + _U32.size : query_end], "query"))
        position = query_end
    if position != len(data):
        raise _Refused(OptionReply.ERR_INVALID, f"{len(data) - position} bytes behind the last query")
    return name, frozenset(queries)
