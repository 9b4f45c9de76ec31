"""Channel: order, capacity, closing, and nothing lost or doubled, under cancellation too."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

import homeloop
from homeloop.errors import ChannelClosed, UsageError, WouldBlock, WouldBlockLoop
from homeloop.sync import UNBOUNDED, Channel
from tests.core.bounded import LIMIT_S, STRESS_S, Plain, until
from tests.sync.parties import Parties, Script


def sending(channel: Channel[Any], sender: int, count: int, sent: list[Any]) -> Script:
    for number in range(count):
        yield lambda number=number: channel.send((sender, number))
        sent.append((sender, number))


def receiving(channel: Channel[Any], got: list[Any]) -> Script:
    while True:
        try:
            item = yield channel.receive
        except ChannelClosed:
            return
        got.append(item)


@pytest.mark.parametrize("capacity", [0, 1, 7, UNBOUNDED])
def test_conservation(parties: Parties, capacity: float) -> None:
    channel: Channel[Any] = Channel(capacity)
    sent: list[list[Any]] = [[] for _ in range(3)]
    got: list[list[Any]] = [[] for _ in range(3)]
    receivers, senders = [], []
    for number in range(3):
        receivers.append(parties.start(receiving(channel, got[number])))
        senders.append(parties.start(sending(channel, number, 30, sent[number])))
    for sender in senders:
        sender.result(LIMIT_S)
    channel.close()
    for receiver in receivers:
        receiver.result(LIMIT_S)
    assert sorted(item for part in got for item in part) == sorted(item for part in sent for item in part)
    for part in got:                    # each receiver sees a sender's items in the sender's order
        for sender in range(3):
            mine = [item for item in part if item[0] == sender]
            assert mine == sorted(mine)


@pytest.mark.stress
@pytest.mark.parametrize("capacity", [0, 1, 3])
def test_stress_conservation_under_cancellation(parties: Parties, capacity: int, seed: int) -> None:
    """What send() returned for is received once; what it raised for, never; and a sender's order is kept."""
    choose = random.Random(seed)
    end = time.monotonic() + STRESS_S / 33          # there are 33 of these
    while True:
        cancel_some(parties, Channel(capacity), choose)
        if time.monotonic() > end:
            break


def cancel_some(parties: Parties, channel: Channel[Any], choose: random.Random) -> None:
    sent: list[list[Any]] = [[] for _ in range(6)]
    got: list[list[Any]] = [[] for _ in range(6)]
    receivers = [parties.start(receiving(channel, part)) for part in got]
    senders = [parties.start(sending(channel, number, 40, part)) for number, part in enumerate(sent)]
    for handle in choose.sample(senders, 2) + choose.sample(receivers, 3):
        until(lambda: sum(map(len, got)) >= choose.randrange(20) or all(h.done() for h in senders), channel)
        handle.cancel()
    rest = Plain(lambda: list(channel))
    for sender in senders:
        until(sender.done, channel)
    channel.close()
    got.append(rest.result(channel))
    for receiver in receivers:
        until(receiver.done, channel)
    got.append(list(channel))           # a receiver that was cancelled with an item may have been the last
    assert sorted(item for part in got for item in part) == sorted(item for part in sent for item in part)
    for part in got:
        for sender_number in range(6):
            mine = [number for sender_number_, number in part if sender_number_ == sender_number]
            assert mine == sorted(mine), f"sender {sender_number}'s order was not kept"


@pytest.mark.stress
@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_stress_of_one_loop_keeps_the_order_over_all_receivers(run: Any, seed: int) -> None:
    """On one loop "received before" has a meaning for all receivers together: one log, the sender's order in it, with
    receivers and senders cancelled at any step and the cancelled senders' items not in it."""
    choose = random.Random(seed)

    async def round_(capacity: int) -> None:
        channel: Channel[Any] = Channel(capacity)
        log: list[Any] = []
        sent: list[Any] = []

        async def send(sender: int) -> None:
            for number in range(20):
                await channel.send((sender, number))
                sent.append((sender, number))

        async def receive() -> None:
            while True:
                log.append(await channel.receive())

        senders = [asyncio.create_task(send(number)) for number in range(3)]
        receivers = [asyncio.create_task(receive()) for _ in range(3)]
        while not all(sender.done() for sender in senders):
            await asyncio.sleep(0)
            if choose.random() < 0.3:
                number = choose.randrange(3)
                receivers[number].cancel()
                receivers[number] = asyncio.create_task(receive())
            if choose.random() < 0.02:
                choose.choice(senders).cancel()
        for _ in range(30):
            await asyncio.sleep(0)
        for task in receivers:
            task.cancel()
        await asyncio.gather(*senders, *receivers, return_exceptions=True)
        channel.close()
        log.extend([item async for item in channel])
        assert sorted(log) == sorted(sent)
        for sender in range(3):
            mine = [number for who, number in log if who == sender]
            assert mine == sorted(mine)

    async def main() -> None:
        end = time.monotonic() + STRESS_S / 2
        while time.monotonic() < end:
            await round_(choose.randrange(4))

    run(main())


def test_rendezvous_returns_when_it_was_received() -> None:
    channel: Channel[int] = Channel(0)
    sender = Plain(channel.send, 1)
    until(channel.waiters, channel)
    assert sender.running()
    assert channel.receive(LIMIT_S) == 1
    sender.result(channel)
    sender = Plain(channel.send, 2)
    until(channel.waiters, channel)
    assert channel.receive_nowait() == 2
    sender.result(channel)


def test_bounds() -> None:
    channel: Channel[int] = Channel(2)
    channel.send_nowait(1)
    channel.send(2)
    with pytest.raises(WouldBlock):
        channel.send_nowait(3)
    with pytest.raises(TimeoutError, match="no place"):
        channel.send(3, timeout=0.01)
    assert channel.qsize() == 2
    assert [channel.receive_nowait(), channel.receive()] == [1, 2]
    with pytest.raises(WouldBlock):
        channel.receive_nowait()
    with pytest.raises(TimeoutError, match="no item"):
        channel.receive(timeout=0.01)
    assert channel.waiters() == ()
    for wrong in (-1, 1.5):
        with pytest.raises(UsageError):
            Channel(wrong)


def test_send_nowait_does_not_overtake_who_waits() -> None:
    channel: Channel[int] = Channel(1)
    channel.send(1)
    sender = Plain(channel.send, 2)
    until(channel.waiters, channel)
    assert channel.receive() == 1
    with pytest.raises(WouldBlock):     # the place is taken: granted, or used by now
        channel.send_nowait(3)
    sender.result()
    assert channel.receive() == 2


def test_close_with_a_reason(parties: Parties) -> None:
    channel: Channel[int] = Channel(1)

    def last() -> Script:
        try:
            yield channel.receive
        except ChannelClosed as closed:
            return closed.reason, closed.__cause__
        return None

    lost = OSError("disk is gone")
    handles = [parties.start(last()) for _ in range(3)]
    until(lambda: len(channel.waiters()) == 3, channel)
    channel.close(lost)
    channel.close("not counted")
    assert [handle.result(LIMIT_S) for handle in handles] == [(lost, lost)] * 3
    with pytest.raises(ChannelClosed, match="disk is gone"):
        channel.send(1)
    with pytest.raises(ChannelClosed, match="disk is gone"):
        channel.send_nowait(1)
    with pytest.raises(ChannelClosed, match="disk is gone"):
        list(channel)


def test_close_refuses_who_waits_to_send_and_leaves_what_was_sent(parties: Parties) -> None:
    channel: Channel[int] = Channel(1)
    channel.send(1)

    def late() -> Script:
        try:
            yield lambda: channel.send(2)
        except ChannelClosed:
            return "refused"

    handles = [parties.start(late()) for _ in range(3)]
    until(lambda: len(channel.waiters()) == 3, channel)
    channel.close()
    assert [handle.result(LIMIT_S) for handle in handles] == ["refused"] * 3
    assert list(channel) == [1]
    with pytest.raises(ChannelClosed):
        channel.receive_nowait()


@pytest.mark.parametrize("run", [asyncio.run, homeloop.run])
def test_async_iteration(run: Any) -> None:
    channel: Channel[int] = Channel(2)

    async def main() -> list[int]:
        async def send() -> None:
            for number in range(5):
                await channel.send(number)
            channel.close()

        task = asyncio.create_task(send())
        got = [item async for item in channel]
        await task
        return got

    assert run(main()) == list(range(5))


def test_receiver_cancelled_with_an_item_passes_it_on() -> None:
    """
    sender              first               second
    1 send(): item is first's
    2 first.cancel()
                        3 CancelledError
                                            4 has the item
    """

    async def main(others: int) -> None:
        channel: Channel[int] = Channel(1)
        first = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)
        rest = [asyncio.create_task(channel.receive()) for _ in range(others)]
        await asyncio.sleep(0)
        channel.send_nowait(7)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        if others:
            assert await rest[0] == 7
        else:
            assert channel.receive_nowait() == 7

    asyncio.run(main(1))
    asyncio.run(main(0))
    homeloop.run(main(1))


@pytest.mark.parametrize("capacity", [0, 1])
def test_sender_cancelled_with_a_place_has_not_sent(capacity: int) -> None:
    """
    receiver            first               second
    1 receive(): place is first's
    2 first.cancel()
                        3 CancelledError
                                            4 sends
    """

    async def main() -> None:
        channel: Channel[str] = Channel(capacity)
        if capacity:
            channel.send_nowait("old")
        first = asyncio.create_task(channel.send("first"))
        second = asyncio.create_task(channel.send("second"))
        await asyncio.sleep(0)
        if capacity:
            assert await channel.receive() == "old"
            receiver = asyncio.create_task(channel.receive())
        else:
            receiver = asyncio.create_task(channel.receive())
            await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await receiver == "second"
        await second
        assert channel.qsize() == 0

    asyncio.run(main())
    homeloop.run(main())


def test_receiver_leaves_a_rendezvous_before_the_sender_comes() -> None:
    """The sender was called to a receiver who is gone: it waits on, first in line, and sends once."""

    async def main() -> None:
        channel: Channel[int] = Channel(0)
        senders = [asyncio.create_task(channel.send(number)) for number in range(2)]
        await asyncio.sleep(0)
        receiver = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)              # it stands in line; the first sender is granted and has not run
        receiver.cancel()
        await asyncio.gather(receiver, return_exceptions=True)
        assert await channel.receive() == 0
        assert await channel.receive() == 1
        await asyncio.gather(*senders)

    asyncio.run(main())
    homeloop.run(main())


def test_synchronous_form_in_a_thread_that_serves_a_loop() -> None:
    async def main() -> None:
        channel: Channel[int] = Channel(1)
        with pytest.raises(WouldBlockLoop):
            channel.send(1, timeout=1)
        with pytest.raises(WouldBlockLoop):
            channel.receive(timeout=1)
        with pytest.raises(WouldBlockLoop):
            list(channel)

    asyncio.run(main())
    homeloop.run(main())
