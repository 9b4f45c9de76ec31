"""Which commands and flags are served, and what the device is asked for them."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.errors import BlockError
from homeloop.nbd.commands import Commands
from homeloop.nbd.handshake import Agreed
from tests.nbd.wire import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
)

SIZE = 1 << 20
STRUCTURED = Agreed(structured=True)
SELECTED = Agreed(structured=True, allocation_id=1)
FLAGS = [1 << bit for bit in range(16)]


class ReadOnly:
    """The least that a driver can be."""

    size = SIZE
    thread_model = "inline"

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


class Writable(ReadOnly):
    """No flush, so no FUA; zeroes are emulated, and never fast."""

    def write(self, offset: int, data: Any) -> None:
        pass


def commands(driver: Any, agreed: Agreed = SELECTED, *, read_only: bool = False, limit: int = 65536) -> Commands:
    return Commands(Device(driver), agreed, read_only=read_only, payload_bytes_max=limit)


def asked(to: Commands, command: int, flags: int = 0, length: int = 512) -> int:
    """0, or the errno of the refusal."""
    payload = memoryview(bytes(length)) if command == WRITE else None
    try:
        to.ask(command, flags, 0, length, payload)
    except BlockError as error:
        return error.errno
    return 0


MEMORY = {READ: FUA | DF, WRITE: FUA, FLUSH: FUA, TRIM: FUA, CACHE: FUA, WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
          BLOCK_STATUS: FUA | REQ_ONE}


@pytest.mark.parametrize(("driver", "agreed", "table"), [
    (Memory(SIZE), SELECTED, MEMORY),
    (Memory(SIZE), STRUCTURED, {**MEMORY, BLOCK_STATUS: None}),
    (Memory(SIZE), Agreed(), {**MEMORY, READ: FUA, BLOCK_STATUS: None}),
    (Writable(), SELECTED, {READ: DF, WRITE: 0, WRITE_ZEROES: NO_HOLE, BLOCK_STATUS: REQ_ONE}),
    (ReadOnly(), SELECTED, {READ: DF, BLOCK_STATUS: REQ_ONE}),
], ids=["selected", "structured", "simple", "no flush", "read-only"])
def test_x6_x9_x10_bs1_commands_and_their_flags(driver: Any, agreed: Agreed, table: dict[int, int | None]) -> None:
    """Every command with every flag: served if the table has it, else EINVAL; changes of a read-only one EPERM."""
    to = commands(driver, agreed)
    for command in [*range(9), 65535]:
        if command == DISC:
            continue
        allowed = table.get(command)
        refused = errno.EPERM if isinstance(driver, ReadOnly) and not isinstance(driver, Writable) and command in (
            WRITE, TRIM, WRITE_ZEROES) else errno.EINVAL
        assert asked(to, command) == (0 if allowed is not None else refused), command
        for flag in FLAGS:
            expected = 0 if allowed is not None and flag & allowed else refused
            assert asked(to, command, flag) == expected, (command, flag)


def test_e3_an_export_that_is_read_only() -> None:
    to = commands(Memory(SIZE), read_only=True)
    assert {asked(to, command) for command in (WRITE, TRIM, WRITE_ZEROES)} == {errno.EPERM}
    assert {asked(to, command) for command in (READ, FLUSH, CACHE, BLOCK_STATUS)} == {0}


def test_z6_z8_the_payload_limit_is_for_payloads() -> None:
    to = commands(Memory(SIZE), limit=4096)
    for command in (READ, WRITE):
        assert asked(to, command, length=4096) == 0
        assert asked(to, command, length=4097) == errno.EINVAL
    for command in (TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
        assert asked(to, command, length=SIZE) == 0


def test_bs3_r10_how_many_extents() -> None:
    driver = Memory(64 << 16)
    for page in range(0, 64, 2):
        driver.write(page << 16, b"x")
    for limit, flags, count in ((65536, 0, 64), (65536, REQ_ONE, 1), (80, 0, 10), (1, 0, 1)):
        assert len(commands(driver, limit=limit).ask(BLOCK_STATUS, flags, 0, 64 << 16, None)) == count
