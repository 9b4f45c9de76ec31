"""The send queue: pieces stay apart, and partial sends continue where they stopped."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from homeloop.nbd.sending import PIECES_MAX, SendQueue


class Kernel:
    """A socket that takes what the script says: a number of bytes, or None for "would block"."""

    def __init__(self, script: Iterator[int | None]) -> None:
        self.script = script
        self.taken = bytearray()
        self.calls: list[int] = []

    def sendmsg(self, pieces: list[Any]) -> int:
        self.calls.append(len(pieces))
        assert len(pieces) <= PIECES_MAX, "the kernel would refuse (EMSGSIZE)"
        count = next(self.script)
        if count is None:
            raise BlockingIOError
        data = b"".join(pieces)[:count]
        self.taken += data
        return len(data)


def kernel(*script: int | None) -> Any:
    return Kernel(iter(script))


def test_all_in_one_call() -> None:
    queue, sock = SendQueue(), kernel(100)
    for piece in (b"ab", bytearray(b"c"), memoryview(b"de")):
        queue.append(piece)
    assert queue.send(sock)
    assert (sock.taken, sock.calls, queue.unsent_bytes, queue.sent_bytes) == (b"abcde", [3], 0, 5)
    assert queue.pieces == []


def test_nothing_to_send_is_no_call() -> None:
    sock = kernel()
    assert SendQueue().send(sock)
    assert sock.calls == []


def test_partial_sends(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(50):
        pieces = [dice.randbytes(dice.randrange(0, 50)) for _ in range(dice.randrange(1, 30))]
        queue = SendQueue()
        for piece in pieces:
            queue.append(piece)
        sock: Any = Kernel(dice.choice([0, 1, 7, 30, 10**6, None]) for _ in iter(int, 1))
        while not queue.send(sock):
            assert queue.unsent_bytes == sum(len(piece) for piece in queue.pieces)
        assert sock.taken == b"".join(pieces)
        assert queue.unsent_bytes == 0


def test_more_pieces_than_the_kernel_takes() -> None:
    queue, sock = SendQueue(), kernel(*[10**9] * 10)
    for _ in range(2 * PIECES_MAX + 5):
        queue.append(b"x")
    assert queue.send(sock)
    assert sock.calls == [PIECES_MAX, PIECES_MAX, 5]


def test_a_short_send_is_not_tried_again() -> None:
    """The kernel took less than was offered: it is full, and would say so at the price of an exception."""
    queue, sock = SendQueue(), kernel(2, None)
    queue.append(b"abc")
    assert not queue.send(sock)
    assert sock.calls == [1]
    assert [bytes(piece) for piece in queue.pieces] == [b"c"]


def test_errors_come_through() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.close()
        queue = SendQueue()
        queue.append(b"x")
        with pytest.raises(BrokenPipeError):
            queue.send(ours)
        queue.clear()
        assert queue.unsent_bytes == 0
        assert queue.send(ours)


def test_what_is_kept_may_be_changed() -> None:
    """Only what is left of those data is copied, and it goes out as it was."""
    queue, data, other = SendQueue(), bytearray(b"abcdef"), bytearray(b"other")
    kernel = Kernel(iter([3, None, 100]))
    for piece in (b"h", memoryview(data), memoryview(other)):
        queue.append(piece)
    assert not queue.send(kernel)  # type: ignore[arg-type]
    queue.keep(memoryview(data))
    data[:] = b"XXXXXX"
    other[:] = b"OTHER"
    assert not queue.send(kernel)  # type: ignore[arg-type]
    assert queue.send(kernel)  # type: ignore[arg-type]
    assert bytes(kernel.taken) == b"habcdefOTHER"
