"""Bottom halves: callbacks that any thread schedules and the home runs (rule 13).

Source: QEMU's QEMUBH. FIFO here, where QEMU promises no order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homeloop.core.context import AioContext

__all__ = ["BottomHalf"]

IDLE_DELAY_S = 0.010        # QEMU's: an idle bottom half waits at most this long


class BottomHalf:
    """A callback of a context, queued by schedule(): twice before it runs runs it once.

    All methods: any thread, never wait; also from inside the callback itself.
    """

    _source_traceback = None        # an entry of the ready queue, see HomeLoop

    def __init__(self, context: AioContext, fn: Callable[[], object], *, idle: bool) -> None:
        self.context = context
        self.idle = idle
        self._fn = fn
        self._queued = False                # under the context's lock: an entry is on its way
        self._wanted = False                # under the context's lock: run when the entry arrives
        self._deleted = False               # under the context's lock
        self._cancelled = False             # as an entry of the ready queue: never struck out

    def schedule(self) -> None:
        """Run the callback at home, once, in the next iteration; idle: within 10 ms, when there is nothing else.

        Nothing happens after delete(). ContextClosed if the context has ended.
        """
        context = self.context
        with context.lock:
            if self._deleted:
                return
            context.check_open_locked()
            self._wanted = True
            if not self._queued:
                self._queued = True
                context.inbox.put_locked(self)

    def cancel(self) -> None:
        """Do not run it, if it has not begun to. It may be scheduled again."""
        with self.context.lock:
            self._wanted = False

    def delete(self) -> None:
        """Cancel for good."""
        with self.context.lock:
            self._wanted = False
            self._deleted = True

    def _run(self) -> None:                 # home thread: the entry has arrived
        if self.idle:
            self.context.loop.call_later(IDLE_DELAY_S, self._fire)
            self.context.discount_turn()
        else:
            self._fire()

    __call__ = _run

    def _fire(self) -> None:
        with self.context.lock:
            self._queued = False
            wanted, self._wanted = self._wanted, False
        if not wanted or self.idle:
            self.context.discount_turn()
        if wanted:
            try:
                self._fn()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
                self.context.report({"message": f"exception in bottom half {self._fn!r}", "exception": exc})

    def __repr__(self) -> str:
        state = "deleted" if self._deleted else "scheduled" if self._wanted else "at rest"
        return f"<BottomHalf {self._fn!r} {state} at {self.context.name}>"
