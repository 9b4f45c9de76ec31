"""The two ends of a copy: an NBD export, a file, or any device; and what one lane of the copy uses of each.

An End is opened once and knows sizes and limits. A lane is a thread with a context of its own that does nothing but
copy; end.side() opens what that lane uses: a connection of its own to an export that allows several, the shared
descriptor of a file, whose system calls it makes itself, for nobody else waits in that thread. A device of any other
kind has one home, so there is one lane.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from types import CoroutineType
from typing import Final, Protocol, TypeVar, cast

from homeloop.block.device import Device
from homeloop.block.driver import PAYLOAD_BYTES_MAX, SIZE_BYTES_MAX, traits_of
from homeloop.block.extents import Extent
from homeloop.block.file import File
from homeloop.block.opening import open_driver
from homeloop.core.workers import to_worker
from homeloop.errors import BlockError, UsageError
from homeloop.nbd.client import Client
from homeloop.nbd.protocol import TransmissionFlag
from homeloop.nbd.sending import BytesLike
from homeloop.nbd.session import Session, open_session
from homeloop.nbd.uri import NbdUri, parse_uri

__all__ = ["DeviceEnd", "End", "FileEnd", "NbdEnd", "Side", "open_source", "open_target"]

T = TypeVar("T")
_LANES_MAX: Final = 16
_EFFECT_BYTES_MAX: Final = 1 << 30  # of one zero(): a server may need long for it
_NBD: Final = ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://")


class Side(Protocol):
    """What a lane does with one end. All at the lane's home."""

    async def read(self, offset: int, length: int) -> BytesLike: ...

    async def write(self, offset: int, data: BytesLike) -> None: ...

    async def zero(self, offset: int, length: int) -> None:
        """Make it read as zeroes, as a hole if that can be."""

    async def extents(self, offset: int, length: int) -> list[Extent]: ...

    async def flush(self) -> None:
        """All that was written through any side of this end is stable, or the end cannot do that."""

    async def close(self) -> None: ...


class End(Protocol):
    """One end of a copy."""

    spec: str  # as the person wrote it
    size: int
    read_only: bool
    granule: int  # offsets and lengths are multiples of it
    payload_bytes_max: int
    lanes_max: int
    is_zero: bool  # it is known to read as zeroes: it was made just now
    waits: bool  # its side lets the lane's loop run while it works

    async def side(self) -> Side:
        """Open what a lane uses. In a coroutine of that lane's context."""

    async def close(self) -> None:
        """After all sides; a device where it is at home."""


class NbdEnd:
    """An export: a connection for each lane, if it allows several."""

    is_zero = False
    waits = True

    def __init__(self, spec: str, uri: NbdUri, session: Session) -> None:
        info = session.info
        self.spec = spec
        self.size = info.size
        self.read_only = bool(info.flags & TransmissionFlag.READ_ONLY)
        self.granule = info.block_size_minimum
        self.payload_bytes_max = info.payload_bytes_max
        self.lanes_max = _LANES_MAX if info.flags & TransmissionFlag.CAN_MULTI_CONN else 1  # X8
        self._uri = uri
        self._first: Session | None = session  # the first lane's, which runs before there is another

    @classmethod
    async def open(cls, spec: str) -> NbdEnd:
        try:
            uri = parse_uri(spec)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return cls(spec, uri, await open_session(uri, None))

    async def side(self) -> Side:
        session, self._first = self._first, None
        if session is None:
            session = await open_session(self._uri, None)
            if session.info.size != self.size:
                session.close()
                raise BlockError(errno.EIO, f"the export has {session.info.size} bytes now, not {self.size}")
        return _NbdSide(Client(session.sock, session.info, session.leftover))

    async def close(self) -> None:
        if self._first is not None:
            self._first.close()
            self._first = None


class _NbdSide:
    def __init__(self, client: Client) -> None:
        self._client = client
        self.read = client.read
        self.write = client.write
        self.extents = client.extents
        self.close = client.close

    async def zero(self, offset: int, length: int) -> None:
        client, info = self._client, self._client.info
        can = client.can(TransmissionFlag.SEND_WRITE_ZEROES)
        step = _EFFECT_BYTES_MAX if can else max(info.block_size_minimum, min(info.payload_bytes_max, 1 << 20))
        zeroes = b"" if can else bytes(min(step, length))
        while length:
            piece = min(step, length)
            if can:
                await client.write_zeroes(offset, piece)
            else:
                await client.write(offset, memoryview(zeroes)[:piece])
            offset, length = offset + piece, length - piece

    async def flush(self) -> None:
        if self._client.can(TransmissionFlag.SEND_FLUSH):
            await self._client.flush()


class FileEnd:
    """A file or block device, through the page cache: its lanes make the system calls."""

    granule = 1
    payload_bytes_max = PAYLOAD_BYTES_MAX
    lanes_max = _LANES_MAX
    waits = False

    def __init__(self, spec: str, driver: File, *, is_zero: bool = False) -> None:
        self.spec = spec
        self.size = driver.size
        self.read_only = driver.read_only
        self.is_zero = is_zero
        self._driver = driver

    async def side(self) -> Side:
        return _FileSide(self._driver)

    async def close(self) -> None:
        await to_worker(self._driver.close)  # a network file system may take its time


class _FileSide:
    def __init__(self, driver: File) -> None:
        self._driver = driver

    async def read(self, offset: int, length: int) -> BytesLike:
        return self._driver.read(offset, length)

    async def write(self, offset: int, data: BytesLike) -> None:
        self._driver.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        self._driver.write_zeroes(offset, length, may_trim=True)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return list(self._driver.extents(offset, length))

    async def flush(self) -> None:
        self._driver.flush()

    async def close(self) -> None:
        pass


class DeviceEnd:
    """Any other device. Its home is the one lane."""

    payload_bytes_max = PAYLOAD_BYTES_MAX
    lanes_max = 1
    is_zero = False
    waits = False  # some answer inline

    def __init__(self, spec: str, device: Device) -> None:
        self.spec = spec
        self.size = device.size
        self.read_only = device.read_only
        self.granule = device.block_size.minimum
        self._device = device

    async def side(self) -> Side:
        return _DeviceSide(self._device)

    async def close(self) -> None:
        await self._device.close()  # at its home: Lanes.close()


class _DeviceSide:
    def __init__(self, device: Device) -> None:
        self._device = device

    async def read(self, offset: int, length: int) -> BytesLike:
        return await _answer(self._device.read(offset, length))

    async def write(self, offset: int, data: BytesLike) -> None:
        await _answer(self._device.write(offset, data))

    async def zero(self, offset: int, length: int) -> None:
        await _answer(self._device.write_zeroes(offset, length))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await _answer(self._device.extents(offset, length))

    async def flush(self) -> None:
        if self._device.can_flush:
            await _answer(self._device.flush())

    async def close(self) -> None:
        pass  # it may be used again: its end closes it


async def _answer(answer: T | Coroutine[object, object, T]) -> T:
    if type(answer) is CoroutineType:
        return await cast("Coroutine[object, object, T]", answer)
    return cast(T, answer)


async def open_source(spec: str) -> End:
    """Open what is copied from. UsageError, BlockError, OSError or PeerError if it cannot be."""
    if spec.startswith(_NBD):
        return await NbdEnd.open(spec)
    return await to_worker(_open_end, spec, True)


async def open_target(spec: str, size: int) -> End:
    """Open what is copied to; a file that is missing is made, with `size` bytes. Errors as with open_source()."""
    if spec.startswith(_NBD):
        return await NbdEnd.open(spec)
    try:
        return await to_worker(_open_end, spec, False)
    except BlockError as error:
        if error.errno != errno.ENOENT:
            raise
    return await to_worker(_make_file, spec, size)


def _open_end(spec: str, read_only: bool) -> End:
    driver = open_driver(spec, read_only=read_only)
    if isinstance(driver, File):
        return FileEnd(spec, driver)
    traits_of(driver)
    return DeviceEnd(spec, Device(driver, name=spec, read_only=True if read_only else None))


def _make_file(spec: str, size: int) -> End:
    assert size <= SIZE_BYTES_MAX, size
    driver = open_driver(spec, size=size, create=True)
    if not isinstance(driver, File):
        raise UsageError(f"{spec!r} cannot be made: it is no file")
    return FileEnd(spec, driver, is_zero=True)
