"""OneShot: comes once, from any thread, to everybody."""

from __future__ import annotations

import asyncio

import pytest

import homeloop
from homeloop.errors import WouldBlockLoop, WrongState
from homeloop.sync import OneShot
from tests.core.bounded import LIMIT_S, in_plain_thread, until
from tests.sync.parties import CASES, threads
from tests.sync.parties import parties as parties_of


@pytest.mark.parametrize("case", CASES)
def test_reaches_everybody(case: str) -> None:
    answer: OneShot[int] = OneShot()
    blocking = CASES[case] == (threads,)

    def script():  # type: ignore[no-untyped-def]
        return (yield answer.result if blocking else lambda: answer)

    async def awaiting() -> int:
        return await answer

    with homeloop.IOThread() as io:
        other = io.spawn(awaiting())
        with parties_of("threads" if blocking else case if threads not in CASES[case] else "ours and stock") as found:
            for _ in range(4):
                found.start(script())
            until(lambda: len(answer.waiters()) == 5, answer)
            in_plain_thread(answer.set_result, 42)
            assert found.results() == [42] * 4
        assert other.result(LIMIT_S) == 42
    assert answer.result() == 42


def test_exception_and_only_once() -> None:
    answer: OneShot[int] = OneShot("size")
    with pytest.raises(TimeoutError, match="size"):
        answer.result(timeout=0.001)
    assert not answer.done()
    answer.set_exception(OSError("no medium"))
    assert answer.done()
    with pytest.raises(OSError, match="no medium"):
        answer.result()
    for again in (lambda: answer.set_result(1), lambda: answer.set_exception(OSError())):
        with pytest.raises(WrongState, match="once"):
            again()

    async def main() -> None:
        with pytest.raises(OSError, match="no medium"):
            await answer

    asyncio.run(main())


def test_synchronous_form_in_a_thread_that_serves_a_loop() -> None:
    answer: OneShot[int] = OneShot()

    async def main() -> None:
        with pytest.raises(WouldBlockLoop):
            answer.result()
        task = asyncio.create_task(asyncio.wait_for(answer, LIMIT_S))
        await asyncio.sleep(0)
        answer.set_result(1)
        assert await task == 1
        assert answer.result() == 1         # it has come: nothing to wait for

    asyncio.run(main())
