"""The errors of homeloop: who is at fault, and whether one may go on.

HomeloopError
  UsageError        the caller's mistake: WrongThread, WouldDeadlock, WouldBlockLoop, WrongState, ContextClosed,
                    NoRuntime
  PeerError         the other side broke the protocol: its connection ends, nobody else is disturbed
    ConnectionLost  it went away, or the network did
  BlockError        one request of a block device failed: the device goes on
    ConnectionDropped   ... and who asked for it gets no answer: its connection is cut
  WouldBlock        only from *_nowait: it is not to be had now
  ChannelClosed     the channel takes no more items, or has no more
  BarrierBroken     somebody gave the barrier up

This module knows nothing of the rest of the package; fields are plain values.
"""

from __future__ import annotations

import errno as errno_names
import os

__all__ = [
    "BarrierBroken",
    "BlockError",
    "ChannelClosed",
    "ConnectionDropped",
    "ConnectionLost",
    "ContextClosed",
    "HomeloopError",
    "NoRuntime",
    "PeerError",
    "UsageError",
    "WouldBlock",
    "WouldBlockLoop",
    "WouldDeadlock",
    "WrongState",
    "WrongThread",
]


class HomeloopError(Exception):
    """Any error that homeloop raises itself. Its fields are plain values, for any thread; so with those below."""


class UsageError(HomeloopError, RuntimeError):
    """The call was wrong; nothing has changed by it.

    A RuntimeError too: that is what asyncio raises in the like situations, and programs catch it.
    """


class WrongThread(UsageError):
    """A thread touched what belongs to another thread; the text says what to call instead."""


class WouldDeadlock(UsageError):
    """A wait was refused because it could never end; the text names both sides, or each link of a cycle."""


class WouldBlockLoop(UsageError):
    """A synchronous wait was refused: the thread serves a loop, which would stand still. The text names both sides."""


class WrongState(UsageError):
    """The object is in a state in which the call has no meaning."""


class ContextClosed(UsageError):
    """The context, IOThread or runtime has ended and takes no more work."""


class NoRuntime(UsageError):
    """There is no runtime, or not exactly one, that the call could mean."""


class PeerError(HomeloopError):
    """The other side broke the protocol. No later byte can mend it: end the connection."""


class ConnectionLost(PeerError):
    """The other side is gone without a word, or cannot be reached any more. Another connection may do better."""


class BlockError(HomeloopError):
    """A request of a block device failed; the device goes on.

    errno: one of the errno module's numbers. text: for people; goes to the client where the protocol has a place.
    """

    def __init__(self, errno: int, text: str = "") -> None:
        self.errno = errno
        self.text = text or os.strerror(errno)
        super().__init__(f"{errno_names.errorcode.get(errno, errno)}: {self.text}")


class ConnectionDropped(BlockError):
    """A driver's way to cut the connection of a request instead of answering it; inside a program, an error."""

    def __init__(self, text: str = "") -> None:
        super().__init__(errno_names.ECONNRESET, text)


class WouldBlock(HomeloopError):
    """Only from *_nowait: what was asked for is not to be had without waiting."""


class ChannelClosed(HomeloopError):
    """The channel was closed: it takes no more items, or all that it had were received.

    reason: what close() was given; an exception is the __cause__ too.
    """

    def __init__(self, text: str, reason: BaseException | str | None = None) -> None:
        self.reason = reason
        super().__init__(text if reason is None else f"{text}: {reason}")
        if isinstance(reason, BaseException):
            self.__cause__ = reason


class BarrierBroken(HomeloopError):
    """Somebody gave the barrier up by abort(): who waits there would wait for ever."""
