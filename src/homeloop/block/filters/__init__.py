"""Filters: drivers over a driver. Each changes one thing and passes the rest on; they stand on each other in any order.

docs/filters.md has an example of each.
"""

from homeloop.block.filters.cache import Cache
from homeloop.block.filters.cow import Cow
from homeloop.block.filters.delay import Delay
from homeloop.block.filters.error import Error
from homeloop.block.filters.log import Log, LogEntry, read_log, replay
from homeloop.block.filters.offset import Offset
from homeloop.block.filters.partition import Partition, partitions_of
from homeloop.block.filters.passing import Filter, Funnel
from homeloop.block.filters.rate import Rate
from homeloop.block.filters.readahead import Readahead
from homeloop.block.filters.readonly import Readonly
from homeloop.block.filters.requests import Request, perform
from homeloop.block.filters.retry import Retry
from homeloop.block.filters.specs import apply_filters, parse_filter
from homeloop.block.filters.steps import Steps, at_once

__all__ = [
    "Cache",
    "Cow",
    "Delay",
    "Error",
    "Filter",
    "Funnel",
    "Log",
    "LogEntry",
    "Offset",
    "Partition",
    "Rate",
    "Readahead",
    "Readonly",
    "Request",
    "Retry",
    "Steps",
    "apply_filters",
    "at_once",
    "parse_filter",
    "partitions_of",
    "perform",
    "read_log",
    "replay",
]
