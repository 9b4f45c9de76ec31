"""Steps end inline where every answer is there, and go on as a coroutine from the first that is not; claims."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import Any

import pytest

from homeloop.block.filters.steps import Claims, Steps, at_once
from tests.block.answers import turns


async def later(value: Any) -> Any:
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value


def adding(answers: list[Any], ended: list[str]) -> Steps[int]:
    total = 0
    try:
        for answer in answers:
            try:
                total += yield answer
            except ValueError:
                total += 100
    finally:
        ended.append("ended")
    return total


def test_all_there_is_inline() -> None:
    assert at_once(adding([1, 2, 3], [])) == 6


@pytest.mark.parametrize("waits", [{0}, {1}, {2}, {0, 1}, {0, 2}, {0, 1, 2}])
def test_goes_on_from_the_first_that_waits(waits: set[int]) -> None:
    async def main() -> None:
        answers = [later(n) if n in waits else n for n in range(3)]
        answer = at_once(adding(answers, []))
        assert asyncio.iscoroutine(answer)
        assert await answer == 3

    asyncio.run(main())


def test_errors_come_back_into_the_steps_and_out() -> None:
    async def main() -> None:
        ended: list[str] = []
        assert await at_once(adding([1, later(ValueError()), 2], ended)) == 103     # type: ignore[misc]
        with pytest.raises(KeyError):
            await at_once(adding([1, later(KeyError())], ended))                    # type: ignore[misc]
        assert ended == ["ended"] * 2

    asyncio.run(main())


def test_never_run_closes_the_steps_quietly() -> None:
    ended: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer: Any = at_once(adding([1, later(2)], ended))
        answer.close()
        del answer
        gc.collect()
    assert ended == ["ended"]
    assert not [str(warning.message) for warning in caught]


def test_cancelled_runs_the_finally() -> None:
    async def main() -> None:
        ended: list[str] = []
        task = asyncio.ensure_future(at_once(adding([asyncio.Event().wait()], ended)))      # type: ignore[arg-type]
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["ended"]

    asyncio.run(main())


def test_claims_wait_for_what_overlaps_only_and_in_order() -> None:
    async def main() -> None:
        claims, order = Claims(), []
        let_go = {name: asyncio.Event() for name in "abcd"}

        def owning(name: str, first: int, stop: int) -> Steps[None]:
            claim = yield from claims.take(first, stop)
            order.append(name)
            try:
                yield let_go[name].wait()
            finally:
                claims.give(claim)

        ranges = {"a": (0, 4), "b": (2, 6), "c": (5, 8), "d": (8, 9)}
        tasks = {name: asyncio.ensure_future(at_once(owning(name, *ranges[name]))) for name in "abcd"}   # type: ignore[arg-type]
        await turns()
        assert order == ["a", "d"]          # b waits for a, and c for b although nobody has 6
        assert not claims.is_free(7, 8)
        let_go["a"].set()
        await turns()
        assert order == ["a", "d", "b"]
        tasks["b"].cancel()
        await turns()
        assert order == ["a", "d", "b", "c"]
        for name in "cd":
            let_go[name].set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert len(claims) == 0

    asyncio.run(main())


def test_a_claim_that_is_cancelled_in_line_lets_the_next_pass() -> None:
    async def main() -> None:
        claims = Claims()
        held: Any = at_once(claims.take(0, 10))
        waiting = asyncio.ensure_future(at_once(claims.take(0, 1)))         # type: ignore[arg-type]
        behind = asyncio.ensure_future(at_once(claims.take(0, 1)))          # type: ignore[arg-type]
        await turns()
        waiting.cancel()
        await turns()
        assert not behind.done()
        claims.give(held)
        claims.give(await behind)
        assert len(claims) == 0

    asyncio.run(main())
