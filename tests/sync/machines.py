"""What the state machines of homeloop.sync share: one loop, and tasks that wait and may be cancelled.

The loop runs until nothing more is ready after each step, so that the model knows what must have come out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine

SETTINGS = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=False,
    suppress_health_check=[HealthCheck.too_slow],
)


class OnOneLoop(RuleBasedStateMachine):
    """A loop, and tasks that wait for a primitive."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.SelectorEventLoop()

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(8):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def start(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(coro)

    def cancel_before_its_turn(self, task: asyncio.Task[Any], act: Any) -> None:
        """act() in one callback of the loop, and behind it, before whom it woke has run, the cancellation."""
        def both() -> None:
            act()
            task.cancel()

        self.loop.call_soon(both)
        self.settle()

    def teardown(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.settle()
        self.loop.close()


async def awaited(awaitable: Any) -> Any:
    """A coroutine, of whatever can be awaited."""
    return await awaitable
