"""What a device counts, and the frozen value in which it tells it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counts", "DeviceStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatistics:
    """What a device has answered so far; one moment's values, for any thread.

    Only what succeeded is counted as done, zero-length requests and the parts of an emulated request are not.
    """

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    flushes: int            # asked for as such: not those behind a fua request
    trims: int
    trimmed_bytes: int
    write_zeroes: int
    zeroed_bytes: int
    caches: int             # hints taken
    cached_bytes: int       # what they were about
    extents: int            # questions answered
    extents_bytes: int      # what the answers reach over
    errors: int             # requests refused, or failed by the driver
    waited: int             # requests that were not answered inline (of all that began, also failed ones)
    in_flight: int
    in_flight_max: int


class Counts:
    """The counts of one device. Home thread only; each list: requests, bytes."""

    __slots__ = (
        "caches", "errors", "extents", "flushes", "in_flight", "in_flight_max", "reads", "trims", "waited", "writes",
        "zeroings",
    )

    def __init__(self) -> None:
        self.reads = [0, 0]
        self.writes = [0, 0]
        self.flushes = [0, 0]
        self.trims = [0, 0]
        self.zeroings = [0, 0]
        self.caches = [0, 0]
        self.extents = [0, 0]
        self.errors = 0
        self.waited = 0
        self.in_flight = 0              # requests between their first step and their end
        self.in_flight_max = 0

    def statistics(self) -> DeviceStatistics:
        """Return them. Any thread: each is right, together they may be of neighbouring moments."""
        return DeviceStatistics(
            reads=self.reads[0],
            read_bytes=self.reads[1],
            writes=self.writes[0],
            written_bytes=self.writes[1],
            flushes=self.flushes[0],
            trims=self.trims[0],
            trimmed_bytes=self.trims[1],
            write_zeroes=self.zeroings[0],
            zeroed_bytes=self.zeroings[1],
            caches=self.caches[0],
            cached_bytes=self.caches[1],
            extents=self.extents[0],
            extents_bytes=self.extents[1],
            errors=self.errors,
            waited=self.waited,
            in_flight=self.in_flight,
            in_flight_max=self.in_flight_max,
        )
