"""Ready-queue entries of ours: they need no asyncio.Handle, see HomeLoop."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homeloop.core.context import AioContext

__all__ = ["NOTHING", "Call", "Calls", "Raise", "RunWakes", "SingleCall"]

Call = tuple[Callable[..., object], tuple[Any, ...], contextvars.Context]


class Calls(deque[Call]):
    """An inbox entry: callbacks that were posted one behind the other, with their contextvars.

    One entry for all: a post costs 0.5 us like this, 1.0 as an entry of its own, 1.6 as an asyncio.Handle.
    """

    __slots__ = ("context",)

    _cancelled = False
    _source_traceback = None
    context: AioContext

    def __repr__(self) -> str:
        names = ", ".join(getattr(fn, "__qualname__", repr(fn)) for fn, _args, _variables in list(self)[:3])
        return f"<{len(self)} posted callbacks at {self.context.name}: {names}>"

    def _run(self) -> None:
        context = self.context
        context.counters.posted += len(self)
        outer, context.calls = context.calls, self
        try:
            while self:
                fn, args, variables = self.popleft()
                try:
                    variables.run(fn, *args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as exc:
                    context.report({"message": f"exception in posted callback {fn!r}", "exception": exc})
        finally:
            context.calls = outer
            if self and context.home is not None:
                context.counters.posted -= len(self)
                context.home.queue_first(self)


class SingleCall(Calls):
    """Calls of a loop that is not ours, which never become more than one: see AioContext.post()."""

    __slots__ = ()


class RunWakes:
    """A ready-queue entry: what the asyncio task before it woke."""

    _cancelled = False
    _source_traceback = None

    def __init__(self, context: AioContext) -> None:
        self._context = context

    def _run(self) -> None:
        self._context.run_wakes()

    __call__ = _run


class Raise:
    """A ready-queue entry that raises, at home, what was meant for the home."""

    _cancelled = False
    _source_traceback = None

    def __init__(self, exc: BaseException) -> None:
        self._exc = exc

    def _run(self) -> None:
        raise self._exc


class _Nothing:
    """A ready-queue entry that does nothing: makes the next sleep one of 0."""

    _cancelled = False
    _source_traceback = None

    def _run(self) -> None:
        pass


NOTHING = _Nothing()
