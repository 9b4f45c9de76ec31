"""MBR and GPT partition tables: pure, bytes in, partitions out. A table comes from whoever wrote the disk: hostile.

Parsers are generators that yield (offset, length) for the bytes which they need next, and are sent these. Sources:
UEFI 2.10, sections 5.2 (MBR) and 5.3 (GPT); logical partitions as Linux numbers them, from 5 on.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from homeloop.errors import UsageError

__all__ = ["Found", "Reading", "find_partitions"]

_SECTOR: Final = 512
_MBR_ENTRY: Final = struct.Struct("<B3sB3sII")      # status, CHS, type, CHS, first LBA, sectors
_GPT_MAGIC: Final = b"EFI PART"
_GPT_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE: Final = 0xEE
_LOGICAL_MAX: Final = 128                           # a chain may be a ring
_ENTRIES_MAX: Final = 1024                          # UEFI reserves room for 128
_ENTRY_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A partition: its number as Linux counts it, and where it is, in bytes."""

    number: int
    offset: int
    size: int
    table: str          # "mbr" or "gpt"
    damage: str = ""    # of the GPT at the start, if this is from its backup


Reading: TypeAlias = Generator[tuple[int, int], bytes, list[Found]]


def find_partitions(size: int) -> Reading:
    """Find the partitions of a device of `size` bytes. UsageError, saying what is wrong, for a table that is."""
    if size < _SECTOR:
        raise UsageError(f"a device of {size} bytes has no partition table")
    sector = yield 0, _SECTOR
    if sector[510:512] != b"\x55\xaa":
        raise UsageError("the device has no partition table: no signature 55 AA at its byte 510")
    entries = _mbr_entries(sector)
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        return (yield from _find_gpt(size))
    found = []
    for index, kind, first, count in entries:
        if kind in _EXTENDED:
            found += yield from _find_logical(size, first, count)
        elif kind and count:
            found.append(_checked(index + 1, first * _SECTOR, count * _SECTOR, size, "mbr"))
    return sorted(found, key=lambda partition: partition.number)


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int, int]]:
    """Index, type, first sector and number of sectors of each of the four entries."""
    entries = []
    for index in range(4):
        _, _, kind, _, first, count = _MBR_ENTRY.unpack_from(sector, 446 + 16 * index)
        entries.append((index, kind, first, count))
    return entries


def _find_logical(size: int, start: int, count: int) -> Reading:
    """Follow the chain of an extended partition: each link has one partition, and where the next link is."""
    found: list[Found] = []
    seen: set[int] = set()
    at = start
    while True:
        if at in seen or len(seen) == _LOGICAL_MAX:
            raise UsageError(f"the extended partition's chain has no end: sector {at} is in it twice, or it has more "
                             f"than {_LOGICAL_MAX} links")
        seen.add(at)
        if not start <= at < start + count or (at + 1) * _SECTOR > size:
            raise UsageError(f"the extended partition's chain leads out of it, to sector {at}")
        sector = yield at * _SECTOR, _SECTOR
        if sector[510:512] != b"\x55\xaa":
            raise UsageError(f"the extended partition's chain leads to sector {at}, which has no signature 55 AA")
        (_, kind, first, length), (_, next_kind, link, _) = _mbr_entries(sector)[:2]
        if kind and length:
            number = 5 + len(found)
            found.append(_checked(number, (at + first) * _SECTOR, length * _SECTOR, size, "mbr"))
        if next_kind not in _EXTENDED or not link:
            return found
        at = start + link


def _find_gpt(size: int) -> Reading:
    """The partitions of the GPT in the second block; of the one in the last, if the first is damaged (UEFI 5.3.2)."""
    for block in (512, 4096):                       # the header is in the second block, of whatever size
        if size >= 2 * block:
            raw = yield block, 512
            if raw[:8] == _GPT_MAGIC:
                try:
                    entries = yield from _read_gpt(size, block, 1, raw)
                except UsageError as damage:
                    return (yield from _find_backup(size, (block,), str(damage)))
                return _gpt_partitions(entries, size, block, "")
    damage_text = "the MBR says that there is a GPT, but there is no header with EFI PART in the second block"
    return (yield from _find_backup(size, (512, 4096), damage_text))


def _find_backup(size: int, blocks: tuple[int, ...], damage: str) -> Reading:
    """The partitions of the GPT whose header is the last block. UsageError, with both reasons, if that is no better."""
    for block in blocks:
        last = size // block - 1
        if last < 2:
            continue
        raw = yield last * block, 512
        if raw[:8] == _GPT_MAGIC:
            try:
                entries = yield from _read_gpt(size, block, last, raw)
            except UsageError as error:
                raise UsageError(f"{damage}; its backup at the end of the device is no better: {error}") from None
            return _gpt_partitions(entries, size, block, damage)
    raise UsageError(f"{damage}; and there is no backup of it in the last block")


def _read_gpt(size: int, block: int, at: int, raw: bytes) -> Generator[tuple[int, int], bytes, list[bytes]]:
    """The entries of the GPT whose header is in block `at`. UsageError for one that is damaged."""
    (_, _, header_bytes, checksum, _, own, _, _, _, _, table_at, count, entry_bytes, table_checksum,
     ) = _GPT_HEADER.unpack_from(raw)
    if not _GPT_HEADER.size <= header_bytes <= 512:
        raise UsageError(f"the GPT's header says that it has {header_bytes} bytes")
    header = bytearray(raw[:header_bytes])
    header[16:20] = bytes(4)
    if zlib.crc32(header) != checksum:
        raise UsageError("the GPT's header is damaged: its checksum is wrong")
    if own != at:
        raise UsageError(f"the GPT's header in block {at} says that it is in block {own}")
    if count > _ENTRIES_MAX or not _GPT_ENTRY.size <= entry_bytes <= _ENTRY_BYTES_MAX or entry_bytes % 8:
        raise UsageError(f"the GPT says that it has {count} entries of {entry_bytes} bytes, more than we read "
                         f"({_ENTRIES_MAX}), or of another size than there is")
    table_bytes = count * entry_bytes
    if table_at < 2 or table_at * block + table_bytes > size:
        raise UsageError(f"the GPT's {count} entries at block {table_at} are not inside the device of {size} bytes")
    table = (yield table_at * block, table_bytes) if table_bytes else b""
    if zlib.crc32(table) != table_checksum:
        raise UsageError("the GPT's entries are damaged: their checksum is wrong")
    return [table[start : start + entry_bytes] for start in range(0, table_bytes, entry_bytes)]


def _gpt_partitions(entries: list[bytes], size: int, block: int, damage: str) -> list[Found]:
    found = []
    for number, entry in enumerate(entries, 1):
        kind, _, first, last, _, _ = _GPT_ENTRY.unpack_from(entry)
        if kind != bytes(16):
            partition = _checked(number, first * block, (last - first + 1) * block, size, "gpt")
            found.append(replace(partition, damage=damage))
    return found


def _checked(number: int, offset: int, length: int, size: int, table: str) -> Found:
    if length <= 0 or offset <= 0 or offset + length > size:
        raise UsageError(f"partition {number} has {length} bytes at {offset}: not inside the device of {size} bytes")
    return Found(number=number, offset=offset, size=length, table=table)
