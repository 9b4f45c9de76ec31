"""The numbers of the NBD protocol: magics, enums, flags and the layouts of its fixed parts.

Source: doc/proto.md of the NetworkBlockDevice/nbd project; of extended headers its branch extension-ext-header.
All integers are unsigned and big-endian. Nothing here does anything but pack and unpack; who may send what and when
stands in handshake.py and transmission.py.
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum, IntFlag
from typing import Final

from homeloop.errors import PeerError

__all__ = [
    "BASE_ALLOCATION",
    "BLOCK_STATUS_EXTENT",
    "BLOCK_STATUS_HEADER",
    "CHUNK",
    "CHUNK_DONE",
    "CHUNK_ERROR",
    "CLIENT_FLAGS",
    "DATA_CHUNK",
    "ERROR_HEADER",
    "EXPORT_NAME_REPLY",
    "EXPORT_NAME_ZEROES",
    "EXTENDED_CHUNK",
    "EXTENDED_DATA_CHUNK",
    "EXTENDED_EXTENT",
    "EXTENDED_REPLY_MAGIC",
    "EXTENDED_REQUEST",
    "EXTENDED_REQUEST_MAGIC",
    "EXTENDED_STATUS_HEADER",
    "GREETING",
    "GREETING_MAGIC",
    "HOLE_CHUNK",
    "INFO_BLOCK_SIZE",
    "INFO_EXPORT",
    "OLDSTYLE_MAGIC",
    "OPTION",
    "OPTION_MAGIC",
    "OPTION_REPLY",
    "OPTION_REPLY_MAGIC",
    "PAYLOAD_BYTES_DEFAULT_MAX",
    "PORT",
    "REPLY_ERROR",
    "REQUEST",
    "REQUEST_MAGIC",
    "SIMPLE_REPLY",
    "SIMPLE_REPLY_MAGIC",
    "STRING_BYTES_MAX",
    "STRUCTURED_REPLY_MAGIC",
    "AllocationFlag",
    "ChunkType",
    "ClientFlag",
    "Command",
    "CommandFlag",
    "HandshakeFlag",
    "Info",
    "Option",
    "OptionReply",
    "TransmissionFlag",
    "errno_of_wire",
    "pack_string",
    "unpack_string",
    "wire_errno",
]

PORT: Final = 10809
BASE_ALLOCATION: Final = "base:allocation"  # the meta context that everybody knows

GREETING_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
OLDSTYLE_MAGIC: Final = 0x0000420281861253  # dead since nbd 3.10; known only to name it in an error
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

STRING_BYTES_MAX: Final = 4096  # H9: the hard limit of every string
PAYLOAD_BYTES_DEFAULT_MAX: Final = 1 << 25  # Z9: a payload up to here is never an attack

GREETING: Final = struct.Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, reply type, length
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")  # size, transmission flags
EXPORT_NAME_ZEROES: Final = bytes(124)
INFO_EXPORT: Final = struct.Struct(">HQH")  # information type, size, transmission flags
INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")  # information type, minimum, preferred, maximum
REQUEST: Final = struct.Struct(">IHHQQI")  # magic, command flags, command, cookie, offset, length
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = struct.Struct(">IHHQI")  # magic, chunk flags, chunk type, cookie, length of the payload
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")  # ... and of OFFSET_DATA the offset; data follow
HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")  # ... and of OFFSET_HOLE the offset and the size: that is all
ERROR_HEADER: Final = struct.Struct(">IH")  # error, bytes of text; text and, of ERROR_OFFSET, an offset follow
BLOCK_STATUS_HEADER: Final = struct.Struct(">I")  # context id; extents follow
BLOCK_STATUS_EXTENT: Final = struct.Struct(">II")  # length, flags
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")  # as REQUEST; the length is of the payload, or of the effect
EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, the request's offset, payload's length
EXTENDED_DATA_CHUNK: Final = struct.Struct(">IHHQQQQ")  # ... and of OFFSET_DATA the offset; data follow
EXTENDED_STATUS_HEADER: Final = struct.Struct(">II")  # context id, how many extents follow
EXTENDED_EXTENT: Final = struct.Struct(">QQ")  # length, flags

REPLY_ERROR: Final = 1 << 31  # set in the type of every option reply that says no
CHUNK_DONE: Final = 1  # flag of the last chunk of a reply
CHUNK_ERROR: Final = 1 << 15  # set in the type of every chunk that says no


class HandshakeFlag(IntFlag):
    """What the server offers in its greeting."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class ClientFlag(IntFlag):
    """What the client takes of the server's offer."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client can ask during the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4  # withdrawn
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """The types of a reply to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REPLY_ERROR + 1
    ERR_POLICY = REPLY_ERROR + 2
    ERR_INVALID = REPLY_ERROR + 3
    ERR_PLATFORM = REPLY_ERROR + 4
    ERR_TLS_REQD = REPLY_ERROR + 5
    ERR_UNKNOWN = REPLY_ERROR + 6
    ERR_SHUTDOWN = REPLY_ERROR + 7
    ERR_BLOCK_SIZE_REQD = REPLY_ERROR + 8
    ERR_TOO_BIG = REPLY_ERROR + 9
    ERR_EXT_HEADER_REQD = REPLY_ERROR + 10


class Info(IntEnum):
    """The information types of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 0x001
    READ_ONLY = 0x002
    SEND_FLUSH = 0x004
    SEND_FUA = 0x008
    ROTATIONAL = 0x010
    SEND_TRIM = 0x020
    SEND_WRITE_ZEROES = 0x040
    SEND_DF = 0x080
    CAN_MULTI_CONN = 0x100
    SEND_RESIZE = 0x200
    SEND_CACHE = 0x400
    SEND_FAST_ZERO = 0x800
    BLOCK_STATUS_PAYLOAD = 0x1000


class Command(IntEnum):
    """The commands of transmission."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class ChunkType(IntEnum):
    """The types of the chunks of a structured reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = CHUNK_ERROR + 1
    ERROR_OFFSET = CHUNK_ERROR + 2


class AllocationFlag(IntFlag):
    """What base:allocation says of an extent; none of them is always a safe answer (BS5)."""

    HOLE = 1
    ZERO = 2


class CommandFlag(IntFlag):
    """The flags of a command."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


# The wire has Linux's numbers, whatever the platform calls them (EOVERFLOW is 84 on macOS).
_WIRE_TO_ERRNO: Final = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.ENOTSUP,
    108: errno.ESHUTDOWN,
}

# ENOTSUP and EOVERFLOW are kept for FAST_ZERO and for oversize lengths (X13): from a driver that was asked
# for something else they mean "not like this". Whatever is not named here is an I/O error.
_ERRNO_TO_WIRE: Final = {
    errno.EPERM: 1,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOTSUP: 22,
    errno.EOPNOTSUPP: 22,
    errno.EOVERFLOW: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.ESHUTDOWN: 108,
}
_WIRE_EIO: Final = 5
_WIRE_ENOTSUP: Final = 95


def wire_errno(number: int, *, fast_zero: bool = False) -> int:
    """Return the error number to send for one of this platform's errno numbers; never 0.

    fast_zero: the request had that flag, so that ENOTSUP may be said (WZ2).
    """
    if fast_zero and number in (errno.ENOTSUP, errno.EOPNOTSUPP):
        return _WIRE_ENOTSUP
    return _ERRNO_TO_WIRE.get(number, _WIRE_EIO)


def errno_of_wire(error: int) -> int:
    """Return this platform's errno for an error number from the wire; unknown ones are EINVAL (X12)."""
    return _WIRE_TO_ERRNO.get(error, errno.EINVAL)


def pack_string(text: str, what: str) -> bytes:
    """Return a string as the protocol carries it (H9). Raises ValueError, naming `what`, if it cannot."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {text!r} is no UTF-8: {error.reason}") from error
    if b"\0" in data:
        raise ValueError(f"{what} {text!r} has a NUL in it")
    if len(data) > STRING_BYTES_MAX:
        raise ValueError(f"{what} has {len(data)} bytes, the protocol's limit is {STRING_BYTES_MAX}")
    return data


def unpack_string(data: bytes, what: str) -> str:
    """Return a string that the peer sent (H9). Raises PeerError, naming `what`, if it is none."""
    if len(data) > STRING_BYTES_MAX:
        raise PeerError(f"{what} has {len(data)} bytes, the limit is {STRING_BYTES_MAX}")
    if b"\0" in data:
        raise PeerError(f"{what} has a NUL at byte {data.index(0)}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PeerError(f"{what} is no UTF-8: {error.reason} at byte {error.start}") from error
