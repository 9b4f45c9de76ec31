"""Who may change which bytes: overlaps wait in the order of their coming, the rest does not."""

from __future__ import annotations

import asyncio
from typing import Any

from homeloop.block.ranges import Ranges
from tests.block.answers import turns


def test_who_waits_for_whom() -> None:
    async def main() -> None:
        ranges = Ranges()
        order: list[str] = []

        def ask(name: str, start: int, end: int, *, alone: bool = False) -> asyncio.Task[Any]:
            async def take() -> Any:
                taken = await ranges.take(start, end, alone=alone)
                order.append(name)
                return taken

            return asyncio.create_task(take())

        whole = ask("whole", 0, 8)
        also = ask("whole too", 4, 12)
        alone = ask("alone", 6, 10, alone=True)
        beside = ask("beside", 12, 16, alone=True)
        late = ask("late", 9, 11)               # overlaps only who waits, and must not overtake
        await turns()
        assert order == ["whole", "whole too", "beside"]
        assert not ranges.is_free(6, 7)
        assert ranges.is_free(0, 6)
        assert not ranges.is_free(0, 6, alone=True)
        assert ranges.is_free(16, 20, alone=True)
        ranges.give(await whole)
        await turns()
        assert len(order) == 3
        ranges.give(await also)
        await turns()
        assert order[3:] == ["alone"]
        ranges.give(await alone)
        await turns()
        assert order[4:] == ["late"]
        ranges.give(await late)
        ranges.give(await beside)
        assert ranges.is_free(0, 100, alone=True)

    asyncio.run(main())


def test_a_waiter_is_cancelled() -> None:
    """Those that wait with it, and those that wait for it, go on."""

    async def main() -> None:
        ranges = Ranges()
        held = await ranges.take(0, 8)
        first, second = (asyncio.create_task(ranges.take(0, 8, alone=True)) for _ in range(2))
        third = asyncio.create_task(ranges.take(0, 8))
        await turns()
        first.cancel()
        await turns()
        assert first.cancelled()
        ranges.give(held)
        ranges.give(await asyncio.wait_for(second, 10))
        ranges.give(await asyncio.wait_for(third, 10))
        assert ranges.is_free(0, 8, alone=True)

    asyncio.run(main())
