"""An export: a device under a name, at home in a context, with the clients that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from homeloop.block.device import Device, DeviceStatistics
from homeloop.core.context import AioContext
from homeloop.errors import BlockError
from homeloop.nbd.connection import Connection
from homeloop.nbd.counting import ConnectionStatistics
from homeloop.nbd.handshake import ExportInfo
from homeloop.nbd.protocol import TransmissionFlag, pack_string

__all__ = ["Export", "ExportStatistics", "Offers", "OnError", "transmission_flags"]

OnError: TypeAlias = Callable[[int, BlockError], object]  # of a request that failed: its command, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportStatistics:
    """One moment of one export; counts are of all its clients since it was added."""

    name: str
    context: str
    size: int
    read_only: bool
    clients: int  # there were so many
    requests: int
    errors: int
    received_bytes: int
    sent_bytes: int
    connections: tuple[ConnectionStatistics, ...]  # that are there
    device: DeviceStatistics


def transmission_flags(device: Device, read_only: bool) -> TransmissionFlag:
    """Return what an export of the device tells its clients that it can do (X4)."""
    flags = TransmissionFlag.HAS_FLAGS
    offered = {
        TransmissionFlag.SEND_FLUSH: device.can_flush,
        TransmissionFlag.SEND_FUA: device.can_fua,
        TransmissionFlag.SEND_TRIM: device.can_trim and not read_only,
        TransmissionFlag.SEND_WRITE_ZEROES: device.can_write_zeroes and not read_only,
        TransmissionFlag.SEND_FAST_ZERO: device.can_fast_zero and not read_only,
        TransmissionFlag.SEND_CACHE: device.can_cache,
        TransmissionFlag.READ_ONLY: read_only,
        TransmissionFlag.CAN_MULTI_CONN: device.can_multi_conn,
    }
    for flag, there in offered.items():
        if there:
            flags |= flag
    return flags


class Export:
    """A device under a name. Belongs to the server's context; the device and the connections to `context`."""

    def __init__(
        self,
        name: str,
        device: Device,
        context: AioContext,
        *,
        number: int = 0,
        description: str = "",
        read_only: bool = False,
        tls_only: bool = False,
        on_error: OnError | None = None,
        payload_bytes_max: int,
    ) -> None:
        """Raises ValueError for a name or description that the protocol cannot carry (H9).

        number: the server's own for it. It tells a client of this export from one of another that had its name.
        """
        pack_string(name, "export name")
        pack_string(description, "description")
        self.name = name
        self.device = device
        self.context = context
        self.on_error = on_error
        self.number = number
        self.read_only = read_only or device.read_only
        self._info = ExportInfo(
            name=name,
            number=number,
            size=device.size,
            flags=transmission_flags(device, self.read_only),
            description=description,
            block_size_minimum=device.block_size.minimum,
            block_size_preferred=device.block_size.preferred,
            payload_bytes_max=min(device.block_size.maximum, payload_bytes_max),
            tls_only=tls_only,
        )
        # The server's context only, from here on.
        self.connections: set[Connection] = set()  # handed over to `context` and not yet reported as closed
        self._clients = 0
        self._gone = [0, 0, 0, 0]  # requests, errors, received and sent bytes of those that have left

    def __repr__(self) -> str:
        return f"<Export {self.name!r} of {self.device!r} at {self.context.name} clients={len(self.connections)}>"

    @property
    def info(self) -> ExportInfo:
        """What a client is told that comes now: the device may have been resized. The server's context."""
        if self._info.size != self.device.size:
            self._info = replace(self._info, size=self.device.size)
        return self._info

    def attach(self, connection: Connection) -> None:
        """A client has come. The server's context."""
        self.connections.add(connection)
        self._clients += 1

    def detach(self, connection: Connection) -> None:
        """A client has left; its counts stay. The server's context, once."""
        self.connections.remove(connection)
        last = connection.statistics()
        counts = (last.requests, last.errors, last.received_bytes, last.sent_bytes)
        self._gone = [have + more for have, more in zip(self._gone, counts, strict=True)]

    def statistics(self) -> ExportStatistics:
        """Return the counts. The server's context; those of connections are of about the same moment."""
        now = tuple(connection.statistics() for connection in self.connections)
        return ExportStatistics(
            name=self.name,
            context=self.context.name,
            size=self.info.size,
            read_only=self.read_only,
            clients=self._clients,
            requests=self._gone[0] + sum(one.requests for one in now),
            errors=self._gone[1] + sum(one.errors for one in now),
            received_bytes=self._gone[2] + sum(one.received_bytes for one in now),
            sent_bytes=self._gone[3] + sum(one.sent_bytes for one in now),
            connections=now,
            device=self.device.statistics(),
        )


class Offers(Mapping[str, ExportInfo]):
    """The exports of a server as a handshake sees them: as they are at this moment. The server's context."""

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self._exports = exports  # the server's own

    def __getitem__(self, name: str) -> ExportInfo:
        return self._exports[name].info

    def __iter__(self) -> Iterator[str]:
        return iter(self._exports)

    def __len__(self) -> int:
        return len(self._exports)
