"""The end of a context: what is left is cancelled and waited for, then it takes no more work."""

from __future__ import annotations

import asyncio
from typing import Any

from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine

__all__ = ["end_context"]

ROUNDS_MAX = 1000       # of cancelling what new work has come: a callback may spawn for ever


def end_context(context: AioContext) -> None:
    """Cancel and await all that lives in context, then close it (home thread, its loop does not run).

    What was posted before runs. A coroutine that refuses its cancellation is waited for, as asyncio.run does.
    SystemExit or Ctrl-C in a clean-up does not take the others' away; a second one does.
    """
    loop = context.loop
    if loop.is_closed():
        return
    interrupt: BaseException | None = None
    try:
        for _ in range(ROUNDS_MAX):
            try:
                if _end_round(context):
                    break
            except (SystemExit, KeyboardInterrupt) as exc:
                if interrupt is not None:
                    raise
                interrupt = exc
    finally:
        if context.home is None:
            context.close_inbox()
        loop.close()
    if interrupt is not None:
        raise interrupt


def _end_round(context: AioContext) -> bool:
    """Cancel and await what is there; True if nothing has come meanwhile."""
    loop = context.loop
    loop.run_until_complete(_one_turn())
    _cancel_all(loop)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(context.stop_workers())
    loop.run_until_complete(loop.shutdown_default_executor())
    if asyncio.all_tasks(loop):
        return False
    if context.home is not None and any(isinstance(entry, Coroutine) for entry in context.home.ready_entries()):
        return False
    return context.inbox.close_if_empty()


async def _one_turn() -> None:
    await asyncio.sleep(0)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    if not left:
        return
    for task in left:
        task.cancel()
    loop.run_until_complete(_wait_all(left))
    for task in left:
        if not task.cancelled() and task.exception() is not None:
            loop.call_exception_handler(
                {"message": "exception while a context ended", "exception": task.exception(), "task": task}
            )


async def _wait_all(left: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*left, return_exceptions=True)
