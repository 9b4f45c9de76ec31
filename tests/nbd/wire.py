"""Bytes as a client writes them and replies as it reads them, independent of the code under test.

Written out with struct on purpose: packed with the code's own structs, a wrong layout would pass.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

IHAVEOPT = 0x49484156454F5054
EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXT = range(1, 12)
ACK, SERVER, INFO_REPLY, META_REPLY = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT_REQD = (
    (1 << 31) + n for n in range(1, 11)
)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True, slots=True)
class OptionAnswer:
    """One reply of the option phase."""

    option: int
    kind: int
    data: bytes


def client_flags(flags: int = 3) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", IHAVEOPT, number, len(data)) + data


def info(number: int, name: str = "", types: tuple[int, ...] = ()) -> bytes:
    raw = name.encode()
    data = struct.pack(">I", len(raw)) + raw + struct.pack(f">H{len(types)}H", len(types), *types)
    return option(number, data)


def meta(number: int, name: str = "", queries: tuple[str | bytes, ...] = ()) -> bytes:
    """LIST_META or SET_META."""
    raw = name.encode()
    data = struct.pack(">I", len(raw)) + raw + struct.pack(">I", len(queries))
    for query in queries:
        query = query.encode() if isinstance(query, str) else query
        data += struct.pack(">I", len(query)) + query
    return option(number, data)


def option_answers(data: bytes) -> list[OptionAnswer]:
    """All replies in `data`; it must hold nothing else."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x0003E889045565A9, hex(magic)
        assert len(data) >= 20 + length, "a reply is cut"
        found.append(OptionAnswer(number, kind, data[20:20 + length]))
        data = data[20 + length:]
    return found


def request(command: int, cookie: int = 0, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def write(cookie: int, offset: int, data: bytes, flags: int = 0) -> bytes:
    return request(WRITE, cookie, offset, len(data), flags) + data


def chunk(cookie: int, kind: int, payload: bytes = b"", flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def data_chunk(cookie: int, offset: int, data: bytes, flags: int = 1) -> bytes:
    return chunk(cookie, 1, struct.pack(">Q", offset) + data, flags)


def hole_chunk(cookie: int, offset: int, length: int, flags: int = 1) -> bytes:
    return chunk(cookie, 2, struct.pack(">QI", offset, length), flags)


def error_chunk(cookie: int, error: int, text: bytes = b"", flags: int = 1, *, offset: int | None = None) -> bytes:
    payload = struct.pack(">IH", error, len(text)) + text
    if offset is None:
        return chunk(cookie, 32769, payload, flags)
    return chunk(cookie, 32770, payload + struct.pack(">Q", offset), flags)


def simple_reply(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def ext_request(
    command: int, cookie: int = 0, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
) -> bytes:
    """A request with extended headers; `length` is not looked at where a payload comes."""
    if payload:
        flags, length = flags | PAYLOAD_LEN, len(payload)
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + payload


def ext_chunk(cookie: int, kind: int, offset: int, payload: bytes = b"", flags: int = 1) -> bytes:
    return struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload)) + payload


def ext_data(cookie: int, offset: int, data: bytes, begin: int = 0, flags: int = 1) -> bytes:
    """Data from `begin` on of a request at `offset`."""
    return ext_chunk(cookie, 1, offset, struct.pack(">Q", offset + begin) + data, flags)


def ext_error(cookie: int, offset: int, error: int, text: bytes) -> bytes:
    return ext_chunk(cookie, 32769, offset, struct.pack(">IH", error, len(text)) + text)


def ext_extents(cookie: int, offset: int, context: int, *extents: tuple[int, int]) -> bytes:
    payload = struct.pack(">II", context, len(extents)) + b"".join(struct.pack(">QQ", *one) for one in extents)
    return ext_chunk(cookie, 6, offset, payload)
