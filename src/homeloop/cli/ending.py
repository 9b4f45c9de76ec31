"""What Ctrl-C, SIGTERM and a terminal that is closed mean: the first ends the work in order, the next at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType, TracebackType

from homeloop.core.context import AioContext

__all__ = ["Ending"]


class Ending:
    """`with` it, in a coroutine of the main thread of the process; takes the signals over.

    The first sets `wanted`. The next means that the end takes too long: a device may hang for ever, and nobody
    can take a request back that it has begun. give_up() is then called, in the signal handler, the line that it
    returns is written to stderr, and the process ends with 128 + the signal's number. After the block signals mean
    nothing: the handlers stay, for a late Ctrl-C must not turn an end in order into a failure.
    """

    def __init__(self, give_up: Callable[[], str]) -> None:
        self.wanted = asyncio.Event()               # the home's
        self._context = AioContext.of()
        self._give_up = give_up
        self._asked = False                         # the main thread
        self._over = False                          # the main thread
        self._woken: socket.socket | None = None    # home; readable when a signal has come
        self._waking: socket.socket | None = None   # home; Python writes to it, whatever the thread does

    def __enter__(self) -> Ending:
        # A handler runs between two bytecodes: of a signal that comes just before the loop sleeps it would learn when
        # something else wakes it, which may be never.
        self._woken, self._waking = socket.socketpair()
        self._woken.setblocking(False)
        self._waking.setblocking(False)
        self._context.loop.add_reader(self._woken, self._woken.recv, 64)
        signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        # nohup(1) leaves it ignored: then a terminal that is closed is no reason to end.
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True
        assert self._woken is not None, "not entered"
        assert self._waking is not None, "not entered"
        signal.set_wakeup_fd(-1)
        self._context.loop.remove_reader(self._woken)
        self._woken.close()
        self._waking.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._over:
            return
        if not self._asked:
            self._asked = True
            self._context.loop.call_soon_threadsafe(self.wanted.set)
            return
        line = self._give_up()
        with contextlib.suppress(OSError):
            # No print(): it may be what the signal came into, and it is not reentrant.
            erase = "\r\x1b[K" if os.isatty(2) else ""
            os.write(2, f"{erase}{line}\n".encode(errors="backslashreplace"))
        os._exit(128 + number)
