"""What the tests of devices share: telling an inline answer from a coroutine, and finishing either."""

from __future__ import annotations

import asyncio
import types
from typing import Any

BOUND_S = 10.0


def is_inline(answer: Any) -> bool:
    """Return True if the answer is there, False if it is a coroutine (which is closed, not run)."""
    if type(answer) is types.CoroutineType:
        answer.close()
        return False
    return True


async def finish(answer: Any) -> Any:
    """Return the answer, running it if it is a coroutine; with a bound."""
    if type(answer) is types.CoroutineType:
        return await asyncio.wait_for(answer, BOUND_S)
    return answer


async def turns(count: int = 5) -> None:
    """Let everything that is ready run, a few times over."""
    for _ in range(count):
        await asyncio.sleep(0)
