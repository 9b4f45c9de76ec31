"""What one client may ask of an export, and how the device is asked for it.

The decision stands in a table that is made once, from what the device can do and what the handshake agreed: a
command, and the flags that it may carry. Nothing here knows about sockets or replies. Home thread of the export.
"""

from __future__ import annotations

import asyncio
import errno
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

from homeloop.block.calling import shown
from homeloop.block.device import Device
from homeloop.block.extents import EXTENTS_MAX
from homeloop.block.queueing import Queued
from homeloop.errors import BlockError
from homeloop.nbd.handshake import Agreed
from homeloop.nbd.protocol import BLOCK_STATUS_EXTENT, Command, CommandFlag

__all__ = ["Commands", "failure_of", "is_of_the_device"]

_READ: Final = Command.READ.value
_WRITE: Final = Command.WRITE.value
_FLUSH: Final = Command.FLUSH.value
_TRIM: Final = Command.TRIM.value
_CACHE: Final = Command.CACHE.value
_WRITE_ZEROES: Final = Command.WRITE_ZEROES.value
_BLOCK_STATUS: Final = Command.BLOCK_STATUS.value
_CHANGES: Final = frozenset({_WRITE, _TRIM, _WRITE_ZEROES})
_WITH_PAYLOAD: Final = frozenset({_READ, _WRITE})
_FUA: Final = CommandFlag.FUA.value
_NO_HOLE: Final = CommandFlag.NO_HOLE.value
_DF: Final = CommandFlag.DF.value
_REQ_ONE: Final = CommandFlag.REQ_ONE.value
_FAST_ZERO: Final = CommandFlag.FAST_ZERO.value
_PAYLOAD_LEN: Final = CommandFlag.PAYLOAD_LEN.value
_EFFECT_LENGTH: Final = struct.Struct(">Q")  # in the payload of a BLOCK_STATUS; context ids of 32 bits follow


class Commands:
    """The commands of one connection."""

    def __init__(self, device: Device, agreed: Agreed, *, read_only: bool, payload_bytes_max: int) -> None:
        self._device = device
        self._read_only = read_only or device.read_only
        self._payload_bytes_max = payload_bytes_max
        # R10: a status chunk is no larger than a payload may be.
        self._extents_max = max(1, min(EXTENTS_MAX, payload_bytes_max // BLOCK_STATUS_EXTENT.size))
        self._allocation_id = agreed.allocation_id
        self._flags_allowed = _flags_allowed(device, agreed)

    def ask(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: memoryview | None,
        caller: Callable[[Queued], object] | None = None,
    ) -> Any:
        """Hand one request to the device: its answer, a coroutine object or a Queued, of whose end `caller` is told.

        BlockError if it is refused. payload: what came with it; of a request that should have none, it is refused
        by its flag (X-4).
        """
        if self._read_only and command in _CHANGES:
            raise BlockError(errno.EPERM, "the export is read-only")
        allowed = self._flags_allowed.get(command)
        if allowed is None or flags & ~allowed:
            raise BlockError(errno.EINVAL, f"command {command} with flags {flags:#x} is not offered")
        device, fua = self._device, bool(flags & _FUA)
        if command in _WITH_PAYLOAD:
            if length > self._payload_bytes_max:
                raise BlockError(errno.EINVAL, f"{length} bytes, the limit is {self._payload_bytes_max}")
            if command == _READ:
                return device.read(offset, length, caller)
            assert payload is not None, "a WRITE without payload"
            return device.write(offset, payload, fua=fua, caller=caller)
        if command == _FLUSH:
            return device.flush()
        if command == _TRIM:
            return device.trim(offset, length, fua=fua)
        if command == _CACHE:
            return device.cache(offset, length)
        if command == _BLOCK_STATUS:
            if flags & _PAYLOAD_LEN:
                assert payload is not None, "PAYLOAD_LEN without payload"
                length, told = self._unpack_filter(payload)
                if not told:
                    return None
            return device.extents(offset, length, extents_max=1 if flags & _REQ_ONE else self._extents_max)
        assert command == _WRITE_ZEROES, command
        may_trim, fast = not flags & _NO_HOLE, bool(flags & _FAST_ZERO)
        return device.write_zeroes(offset, length, fua=fua, may_trim=may_trim, fast=fast)

    def _unpack_filter(self, payload: memoryview) -> tuple[int, bool]:
        """Return effect length and whether the one context there is is asked for (X-8)."""
        ids_bytes = len(payload) - _EFFECT_LENGTH.size
        if ids_bytes not in (0, 4):  # more than one id: one is unknown, or there twice
            raise BlockError(errno.EINVAL, f"BLOCK_STATUS with {len(payload)} bytes of payload, for one context")
        (length,) = _EFFECT_LENGTH.unpack_from(payload)
        if ids_bytes and (asked := int.from_bytes(payload[_EFFECT_LENGTH.size :])) != self._allocation_id:
            raise BlockError(errno.EINVAL, f"BLOCK_STATUS of context {asked}, which was not selected")
        return length, bool(ids_bytes)


def failure_of(error: BaseException) -> BlockError:
    """Return what to answer to a request in which the device raised this; home thread.

    The Device makes a BlockError of a driver's exceptions, but lets pass what ends a program or a task: SystemExit,
    GeneratorExit, CancelledError and their like. Raised by a driver they end that one request, with EIO: in a thread
    that is not the main one they would end nothing but its loop. Raises `error` itself if it is an Exception, which is
    a mistake of ours, and for a KeyboardInterrupt in the main thread, which is the user's.
    """
    if isinstance(error, BlockError):
        return error
    ctrl_c = isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
    if isinstance(error, Exception) or ctrl_c:
        raise error
    failure = BlockError(errno.EIO, f"the device raised {type(error).__name__}: {shown(error)}")
    failure.__cause__ = error
    return failure


def is_of_the_device(error: BaseException) -> bool:
    """Was it raised by what the running coroutine awaits? False: it was cancelled, or is closed unfinished."""
    if not isinstance(error, asyncio.CancelledError | GeneratorExit):
        return True
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs here
        return False
    return task is not None and not task.cancelling()


def _flags_allowed(device: Device, agreed: Agreed) -> dict[int, int]:
    """The commands that are served, each with the flags that it may carry (X6, X9, X10)."""
    fua = _FUA if device.can_fua else 0
    allowed = {_READ: fua | (_DF if agreed.structured else 0)}
    if device.can_write:
        allowed[_WRITE] = fua
    if device.can_flush:
        allowed[_FLUSH] = fua
    if device.can_trim:
        allowed[_TRIM] = fua
    if device.can_write_zeroes:
        allowed[_WRITE_ZEROES] = fua | _NO_HOLE | (_FAST_ZERO if device.can_fast_zero else 0)
    if device.can_cache:
        allowed[_CACHE] = fua
    if agreed.allocation_id is not None:  # BS1
        allowed[_BLOCK_STATUS] = fua | _REQ_ONE
    if agreed.extended:  # no others: what comes with a payload nobody expects is refused
        for command in allowed.keys() & {_WRITE, _BLOCK_STATUS}:
            allowed[command] |= _PAYLOAD_LEN
    return allowed
