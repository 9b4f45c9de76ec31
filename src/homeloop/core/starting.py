"""Starting a coroutine where its first step may run at once."""

from __future__ import annotations

from collections.abc import Coroutine as CoroutineABC
from typing import Any, TypeVar

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine
from homeloop.core.loop import current_task

__all__ = ["start_now"]

T = TypeVar("T")


def start_now(context: AioContext, coro: CoroutineABC[Any, Any, T]) -> Coroutine[T]:
    """Start coro in `context`: now, on this stack, if this is its home and no coroutine runs; else as spawn() does.

    One that ends without waiting then costs no turn of the loop. Any thread. ContextClosed if the context has ended.
    """
    co = context.create(coro)
    if context.running is None and context.may_enter() and current_task(context.loop) is None:
        context.run_new(co)
    elif not co.schedule():
        raise context.inbox.refusal()
    return co
