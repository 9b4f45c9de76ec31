"""The end of a context: what is left is cancelled and waited for, then it takes no more work."""

from __future__ import annotations

import asyncio
from typing import Any

from homeloop.core.context import AioContext

__all__ = ["end_context"]


def end_context(context: AioContext) -> None:
    """Cancel and await all that lives in context, then close it (home thread, its loop does not run).

    What was posted before runs. A coroutine that refuses its cancellation is waited for, as asyncio.run does.
    """
    loop = context.loop
    if loop.is_closed():
        return
    try:
        while True:
            loop.run_until_complete(_one_turn())
            _cancel_all(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(context.stop_workers())
            loop.run_until_complete(loop.shutdown_default_executor())
            if not asyncio.all_tasks(loop) and context.inbox.close_if_empty():
                break
    finally:
        if context.home is None:
            context.close_inbox()
        loop.close()


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
