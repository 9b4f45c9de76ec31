"""A block driver over an NBD client: an export of another server as a device, to be served again or copied.

Passes on what the server told: size, block sizes, read-only, flush, FUA, trim, zeroes (fast ones too), cache, extents,
multi-conn. What it does not offer the driver does not have, and the Device does without or emulates it. Requests larger
than the server takes are split. The connection comes back after a loss: see homeloop.nbd.reconnecting for what that
promises.

Importing it makes nbd://, nbd+unix:// and their TLS forms kinds of devices.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from homeloop.block.driver import PAYLOAD_BYTES_MAX
from homeloop.block.extents import Extent
from homeloop.block.opening import Spec, register_kind
from homeloop.errors import BlockError, PeerError, UsageError
from homeloop.nbd.attempt import Attempt
from homeloop.nbd.client_handshake import ServerInfo
from homeloop.nbd.protocol import TransmissionFlag
from homeloop.nbd.reconnecting import ReconnectingClient
from homeloop.nbd.sending import BytesLike
from homeloop.nbd.uri import NbdUri, parse_uri

__all__ = ["RECONNECT_DELAY_S", "NbdDriver", "open_nbd"]

RECONNECT_DELAY_S: Final = 30.0  # requests of a proxied export wait so long for a lost server
_EFFECT_BYTES_MAX: Final = 1 << 31  # of one trim or the like: below 2^32, and a multiple of every block size
_PREFERRED_MIN: Final = 512  # Z1


class NbdDriver:
    """The driver of one export. Its methods run at the home of the device; the first call makes that the client's.

    A change that is cancelled ends when the server has answered it, or the connection is lost; cancelled once more, at
    once.
    """

    def __init__(self, client: ReconnectingClient) -> None:
        """Take over a client whose export is known. Any thread."""
        info = client.info
        self._client = client
        client.finishes_changes = True      # a Device takes a change that has ended for one that does no more
        self._payload_bytes_max = _whole_blocks(info)
        self.size = info.size
        self.read_only = client.read_only
        self.block_size_min = info.block_size_minimum
        self.block_size_preferred = min(
            max(info.block_size_preferred, self.block_size_min, _PREFERRED_MIN), PAYLOAD_BYTES_MAX
        )
        self.multi_conn = client.can(TransmissionFlag.CAN_MULTI_CONN)
        # A driver that has a method can do it: what the server does not offer is taken away from this one.
        missing = {
            "flush": not client.can(TransmissionFlag.SEND_FLUSH),
            "write_fua": not client.can(TransmissionFlag.SEND_FUA),
            "trim": not client.can(TransmissionFlag.SEND_TRIM),
            "write_zeroes": not client.can(TransmissionFlag.SEND_WRITE_ZEROES),
            "cache": not client.can(TransmissionFlag.SEND_CACHE),
            "extents": info.allocation_id is None,
        }
        for name, is_missing in missing.items():
            if is_missing:
                setattr(self, name, None)
        if not missing["write_zeroes"] and not client.can(TransmissionFlag.SEND_FAST_ZERO):
            self.write_zeroes = self._write_zeroes_slowly  # type: ignore[assignment,method-assign]

    def __repr__(self) -> str:
        return f"<NbdDriver {self._client!r}>"

    async def read(self, offset: int, length: int) -> BytesLike:
        if length <= self._payload_bytes_max:
            return await self._client.read(offset, length)
        data = bytearray()
        for at, piece_bytes in _pieces(offset, length, self._payload_bytes_max):
            data += await self._client.read(at, piece_bytes)
        return data

    async def write(self, offset: int, data: BytesLike) -> None:
        await self._write(offset, data, fua=False)

    async def write_fua(self, offset: int, data: BytesLike) -> None:
        await self._write(offset, data, fua=True)

    async def flush(self) -> None:
        await self._client.flush()

    async def trim(self, offset: int, length: int) -> None:
        for at, piece_bytes in _pieces(offset, length, _EFFECT_BYTES_MAX):
            await self._client.trim(at, piece_bytes)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
        for at, piece_bytes in _pieces(offset, length, _EFFECT_BYTES_MAX):
            await self._client.write_zeroes(at, piece_bytes, may_trim=may_trim, fast=fast)

    async def cache(self, offset: int, length: int) -> None:
        for at, piece_bytes in _pieces(offset, length, _EFFECT_BYTES_MAX):
            await self._client.cache(at, piece_bytes)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self._client.extents(offset, min(length, _EFFECT_BYTES_MAX))

    async def close(self) -> None:
        """Say goodbye to the server."""
        await self._client.close()

    def abandon(self) -> None:
        """Drop a driver that has never been used. Any thread."""
        self._client.abandon()

    async def _write(self, offset: int, data: BytesLike, *, fua: bool) -> None:
        view = memoryview(data)
        for at, piece_bytes in _pieces(offset, len(view), self._payload_bytes_max):
            await self._client.write(at, view[at - offset : at - offset + piece_bytes], fua=fua)

    async def _write_zeroes_slowly(self, offset: int, length: int, *, may_trim: bool) -> None:
        """write_zeroes() where the server cannot tell whether it would be fast."""
        for at, piece_bytes in _pieces(offset, length, _EFFECT_BYTES_MAX):
            await self._client.write_zeroes(at, piece_bytes, may_trim=may_trim)


def open_nbd(
    uri: str | NbdUri, *, read_only: bool = False, reconnect_delay: float = RECONNECT_DELAY_S
) -> NbdDriver:
    """Connect, and return the driver of the export. Blocks: for a thread that may.

    ValueError for what is no NBD URI, OSError if nobody listens, BlockError if the server refuses, PeerError if it is
    none. read_only: the driver refuses changes, whatever the server would do.
    """
    uri = parse_uri(uri) if isinstance(uri, str) else uri
    session = Attempt(uri).run()
    driver = NbdDriver(ReconnectingClient(uri, reconnect_delay=reconnect_delay, session=session))
    driver.read_only |= read_only
    return driver


def _whole_blocks(info: ServerInfo) -> int:
    """The largest payload that is a multiple of the minimum block."""
    return info.payload_bytes_max - info.payload_bytes_max % info.block_size_minimum


def _pieces(offset: int, length: int, piece_bytes_max: int) -> Iterator[tuple[int, int]]:
    """Cut a range: (offset, length) of each piece."""
    end = offset + length
    while offset < end:
        piece_bytes = min(piece_bytes_max, end - offset)
        yield offset, piece_bytes
        offset += piece_bytes


def _open_spec(spec: Spec) -> NbdDriver:
    """For open_driver()."""
    spec.refuse_size()
    try:
        uri = parse_uri(spec.text)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        return open_nbd(uri, read_only=spec.read_only)
    except PeerError as error:
        raise BlockError(errno.EPROTO, f"{uri}: {error}") from error
    except OSError as error:
        raise BlockError(error.errno or errno.EIO, f"{uri}: {error.strerror or error}") from error


def _name_of(spec: Spec) -> str:
    """The export's name, where there is one."""
    try:
        return parse_uri(spec.text).export or "nbd"
    except ValueError:  # said when it is opened
        return "nbd"


for _kind, _form in {
    "nbd": "nbd://HOST/EXPORT",
    "nbd+unix": "nbd+unix:///EXPORT?socket=PATH",
    "nbds": "nbds://HOST/EXPORT",
    "nbds+unix": "nbds+unix:///EXPORT?socket=PATH",
}.items():
    register_kind(_kind, _open_spec, form=_form, name=_name_of)
