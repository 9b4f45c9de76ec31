"""The clock jumps, what would wait for ever is named, and what comes from threads is waited for."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

import homeloop
from homeloop.testing.jumping import JumpingLoop, run_jumping

HOUR = 3600.0


def test_hours_pass_at_once_and_in_order() -> None:
    async def main() -> tuple[float, list[float]]:
        loop = asyncio.get_running_loop()
        woke: list[float] = []

        async def nap(seconds: float) -> None:
            await asyncio.sleep(seconds)  # tidy: allow sleep: the clock jumps
            woke.append(loop.time())

        await asyncio.gather(nap(5 * HOUR), nap(0.25), nap(30 * HOUR))
        return loop.time(), woke

    start = time.monotonic()
    ended, woke = run_jumping(main())
    assert woke == pytest.approx([0.25, 5 * HOUR, 30 * HOUR])
    assert ended == pytest.approx(30 * HOUR)
    assert time.monotonic() - start < 5


def test_a_wait_for_ever_names_what_waits() -> None:
    async def waits() -> None:
        await homeloop.park("an answer that never comes")

    async def main() -> None:
        context = homeloop.current_context()
        assert context is not None
        await context.spawn(waits(), name="the one that waits")

    with pytest.raises(AssertionError, match="would wait for ever") as failure:
        run_jumping(main())
    text = str(failure.value)
    assert "the one that waits" in text
    assert "an answer that never comes" in text
    assert "in waits" in text                   # the line that it stands at
    assert "main" in text


def test_a_wait_for_ever_is_cleaned_up() -> None:
    cleaned = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(HOUR)  # tidy: allow sleep: the clock jumps
            cleaned.append(True)

    with pytest.raises(AssertionError, match="would wait for ever"):
        run_jumping(main())
    assert cleaned == [True]


def test_a_synchronous_wait_for_ever_is_the_error_of_who_waits() -> None:
    async def never() -> None:
        await homeloop.park()

    async def main() -> str:
        context = homeloop.current_context()
        assert context is not None
        co = context.spawn(never())
        with pytest.raises(AssertionError, match="would wait for ever"):
            co.result()
        return "went on"

    assert run_jumping(main()) == "went on"


def test_timeouts_come_when_due_and_not_before() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * HOUR):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_jumping(main()) == pytest.approx(2 * HOUR)


@pytest.mark.parametrize("how", ["to_worker", "to_thread"])
def test_threads_are_waited_for_while_the_clock_stands(how: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        assert go_on.wait(10)
        return "answer"

    async def main() -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        elsewhere = homeloop.to_worker if how == "to_worker" else asyncio.to_thread
        task = asyncio.ensure_future(elsewhere(slow))
        async with asyncio.timeout(HOUR):               # would jump, were the thread not waited for
            while not entered.is_set():     # noqa: ASYNC110 - an event of threads
                await asyncio.sleep(0)
            threading.Timer(0.05, go_on.set).start()
            answer = await task
        return answer, loop.time()

    assert run_jumping(main()) == ("answer", 0.0)


def test_as_a_loop_factory() -> None:
    async def main() -> float:
        await asyncio.sleep(HOUR)  # tidy: allow sleep: the clock jumps
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingLoop)
        assert await asyncio.to_thread(lambda: 3) == 3
        return loop.jumps

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        assert runner.run(main()) == 1


def test_what_is_ready_needs_no_clock() -> None:
    async def main() -> float:
        reader, writer = await asyncio.open_unix_connection(sock=left), await asyncio.open_unix_connection(sock=right)
        writer[1].write(b"line\n")
        assert await reader[0].readline() == b"line\n"
        for _reader, stream in (reader, writer):
            stream.close()
            await stream.wait_closed()
        return asyncio.get_running_loop().time()

    left, right = socket.socketpair()
    assert run_jumping(main()) == 0.0


def test_an_exception_is_passed_on() -> None:
    async def main() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run_jumping(main())
