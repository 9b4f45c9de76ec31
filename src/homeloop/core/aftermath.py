"""What comes after the end of a coroutine: callbacks in asyncio's manner, and errors that nobody looked at."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homeloop.core.context import AioContext
    from homeloop.core.coroutine import Coroutine

__all__ = ["LoopCallback", "Unretrieved"]


class Unretrieved:
    """Reports an exception that nobody looked at, when the coroutine is collected."""

    def __init__(self, co: Coroutine[Any], exception: BaseException) -> None:
        # No text is made here: the coroutine may have ended for want of stack, and its waiters are told next.
        self.name = co.name
        self.coro_name = getattr(co.get_coro(), "__qualname__", "")
        self.exception = exception
        self.context: AioContext | None = co.context

    def __del__(self) -> None:
        context = getattr(self, "context", None)
        if context is not None:
            text = f"exception of coroutine {self.name} ({self.coro_name}) of {context.name} was never retrieved"
            context.report({"message": text, "exception": self.exception})


class LoopCallback:
    """A done callback in asyncio's manner: called by the home loop, in a contextvars.Context."""

    def __init__(self, fn: Callable[[Any], object], variables: contextvars.Context) -> None:
        self.fn = fn
        self._variables = variables

    def __call__(self, co: Coroutine[Any]) -> None:
        co.context.try_post(self._variables.run, self.fn, co)
