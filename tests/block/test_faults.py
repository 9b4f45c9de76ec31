"""Rules: which requests they are about, what these meet, what is counted and noted; the same from the same seed."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.faults import Faults
from homeloop.block.filters.requests import Request
from homeloop.block.memory import Memory
from homeloop.core.iothread import IOThread
from homeloop.errors import BlockError, ConnectionDropped, UsageError, WouldBlockLoop
from homeloop.testing.jumping import run_jumping
from tests.block.answers import BOUND_S, finish, turns
from tests.block.drivers import Recorder, refused

MIB = 1 << 20


def made(**options: Any) -> tuple[Faults, Memory, Device]:
    faults = Faults(**options)
    memory = Memory(MIB)
    return faults, memory, Device(faults.over(memory))


def fails(call: Any, *args: Any) -> bool:
    try:
        call(*args)
    except BlockError:
        return True
    return False


# Which requests


def test_the_nth_write() -> None:
    faults, memory, device = made()
    rule = faults.on("write", nth=3).error(errno.ENOSPC)
    assert [fails(device.write, 0, b"x") for _ in range(5)] == [False, False, True, False, False]
    assert (rule.seen, rule.fired, faults.count(rule), faults.count("write"), faults.count()) == (5, 1, 1, 5, 5)
    assert [(h.number, h.kind, h.fate) for h in faults.log] == [(3, "write", "error ENOSPC")]
    memory.write(0, b"y")
    rule.arm()
    assert not fails(device.read, 0, 1)


@pytest.mark.parametrize(("options", "pattern"), [
    ({}, "xxxxxx"), ({"nth": (2, 5)}, "-x--x-"), ({"every": 3}, "--x--x"), ({"times": 2}, "xx----"),
    ({"every": 2, "times": 2}, "-x-x--"), ({"when": lambda request: request.length > 1}, "------"),
    ({"at": (1, 4096)}, "------"), ({"at": (0, 1)}, "xxxxxx"),
])
def test_which(options: dict[str, Any], pattern: str) -> None:
    faults, _, device = made()
    faults.on("read", **options).error()
    assert "".join("x" if fails(device.read, 0, 1) else "-" for _ in range(6)) == pattern


def test_ranges_are_bytes_that_are_touched() -> None:
    faults, _, device = made()
    faults.on(at=(4096, 8192)).error()
    assert [fails(device.read, offset, 10) for offset in (4086, 4087, 8191, 8192)] == [False, True, True, False]
    assert fails(device.write_zeroes, 0, MIB)
    assert not fails(device.flush)


def test_kinds() -> None:
    faults, _, device = made()
    faults.on(("flush", "trim", "extents", "cache", "write_zeroes")).error("EPERM")
    assert not fails(device.read, 0, 1)
    assert not fails(device.write, 0, b"x")
    for call, args in ((device.flush, ()), (device.trim, (0, 1)), (device.extents, (0, 512)), (device.cache, (0, 1)),
                       (device.write_zeroes, (0, 1))):
        assert refused(call, *args).errno == errno.EPERM


def test_rules_in_their_order_until_one_ends_the_request() -> None:
    faults, _, device = made()
    counter = faults.on("write")
    first = faults.on("write", every=2).error("ENOSPC")
    second = faults.on("write").error("EROFS")
    assert [refused(device.write, 0, b"x").errno for _ in range(4)] == [errno.EROFS, errno.ENOSPC] * 2
    assert (counter.fired, first.fired, second.seen) == (4, 2, 2)


def test_armed_disarmed_removed_cleared() -> None:
    faults, _, device = made()
    rule = faults.on("read").error()
    assert fails(device.read, 0, 1)
    rule.disarm()
    assert not fails(device.read, 0, 1)
    rule.arm()
    faults.disarm()
    assert not fails(device.read, 0, 1)
    faults.arm()
    assert fails(device.read, 0, 1)
    rule.remove()
    assert not fails(device.read, 0, 1)
    faults.on().error()
    faults.clear()
    assert not fails(device.read, 0, 1)
    assert (rule.seen, faults.rules) == (2, ())


@pytest.mark.parametrize(("options", "text"), [
    ({"kinds": "wirte"}, "no 'wirte' requests"), ({"nth": 0}, "nth=0"), ({"every": 0}, "every=0"),
    ({"times": -1}, "times=-1"),
    ({"at": (5, 5)}, r"at=\(5, 5\)"), ({"nth": (1, -1)}, "nth=-1"),
])
def test_rules_that_make_no_sense(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Faults().on(**options)


@pytest.mark.parametrize(("fate", "text"), [
    (lambda rule: rule.error("EWHAT"), "'EWHAT' is no errno"), (lambda rule: rule.delay(-1), "a delay of -1"),
    (lambda rule: rule.torn(-1), "torn after -1"), (lambda rule: rule.torn(then="what"), "torn, then 'what'"),
    (lambda rule: rule.flip(-1), "counted from 0"), (lambda rule: rule.corrupt(0), "corrupt 0 bytes"),
    (lambda rule: rule.crash("most"), "keep='most'"), (lambda rule: rule.error().error(), "has a fate already"),
])
def test_fates_that_make_no_sense(fate: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        fate(Faults().on())
    with pytest.raises(UsageError, match="is for read and write requests"):
        Faults().on("flush").flip()


def test_what_is_printed() -> None:
    faults, _, device = made(seed=7)
    faults.on("write", nth=(1, 3), at=(0, 512), times=2).error("ENOSPC")
    faults.on(every=2).delay(0.5)
    stall = faults.on("read", when=lambda request: False).stall()
    fails(device.write, 0, b"x")
    assert repr(faults).splitlines() == [
        "<Faults seed=7 armed, 1 requests, 3 rules>",
        "  <Rule write #1,3 at 0-512 2 times: error ENOSPC, seen 1, fired 1>",
        "  <Rule any every 2th: delay 0.5 s, seen 0, fired 0>",
        "  <Rule read when told: stall, seen 0, fired 0>",
    ]
    assert repr(stall) == "<Stall 0 stalled, 0 so far>"
    assert str(faults.log[0]).endswith("s  request 1: write of 1 at 0: error ENOSPC")


# Fates


def test_what_fails_is_not_passed_on() -> None:
    faults, driver = Faults(), Recorder()
    device = Device(faults.over(driver))
    faults.on("trim", nth=1).error("EIO", "a text of mine")
    faults.on("trim", nth=1).drop()
    assert refused(device.trim, 0, 512).text == "a text of mine"
    assert type(refused(device.trim, 0, 512)) is ConnectionDropped
    assert driver.calls == []


def test_delay_by_the_clock() -> None:
    async def main() -> None:
        faults, _, device = made()
        faults.on("read", nth=2).delay(3600)
        loop = asyncio.get_running_loop()
        start = loop.time()
        assert device.read(0, 1) == b"\0"
        answer: Any = device.read(0, 1)
        assert await answer == b"\0"
        assert loop.time() - start == pytest.approx(3600)

    run_jumping(main())


@pytest.mark.parametrize(("then", "number"), [("error", errno.EIO), ("success", 0), ("crash", errno.EIO)])
def test_torn_writes(then: Any, number: int) -> None:
    faults, memory, device = made()
    faults.on("write").torn(sectors=2, then=then)
    if number:
        assert refused(device.write, 512, b"x" * 2048).errno == number
    else:
        device.write(512, b"x" * 2048)
    assert bytes(memory.read(0, 4096)) == bytes(512) + b"x" * 1024 + bytes(2560)
    assert faults.is_crashed is (then == "crash")


def test_torn_zeroes_and_what_is_too_short_to_tear() -> None:
    faults, memory, device = made()
    memory.write(0, b"x" * 4096)
    faults.on().torn(sectors=1, errno="ENOSPC")
    assert refused(device.write_zeroes, 0, 4096).errno == errno.ENOSPC
    assert bytes(memory.read(0, 1024)) == bytes(512) + b"x" * 512
    assert refused(device.write, 4000, b"short").errno == errno.ENOSPC
    assert memory.read(4000, 5) == b"short"
    assert device.read(0, 1) == b"\0"            # reads are not torn, nor counted as such
    assert faults.rules[0].seen == 2


def test_flips_and_corruption() -> None:
    faults, memory, device = made()
    faults.on("read", nth=1).flip(0, 9, 10_000)
    faults.on("write", nth=1).flip(7)
    faults.on("read", nth=2).corrupt(16)
    faults.on("read", nth=3).flip()
    data = bytearray(b"\x10" * 64)
    device.write(0, data)
    assert data == b"\x10" * 64                  # the caller's is not touched
    assert memory.read(0, 64) == b"\x90" + b"\x10" * 63
    memory.write(0, data)
    assert device.read(0, 64) == b"\x11\x12" + b"\x10" * 62
    changed = [i for i, (a, b) in enumerate(zip(device.read(0, 64), data, strict=True)) if a != b]  # type: ignore[arg-type]
    assert changed == list(range(changed[0], changed[0] + 16))
    found = int.from_bytes(device.read(0, 64), "big") ^ int.from_bytes(data, "big")                 # type: ignore[arg-type]
    assert found.bit_count() == 1
    assert device.read(0, 64) == data            # only the answers were damaged


def test_the_same_seed_meets_the_same_faults_whatever_other_rules_there_are() -> None:
    def run(seed: int, noise: bool) -> list[bytes]:
        faults, _, device = made(seed=seed)
        rule = faults.on("read", every=2).flip()
        if noise:
            faults.on("write").corrupt()
        found = []
        for _ in range(10):
            found.append(bytes(device.read(0, 512)))                    # type: ignore[arg-type]
            if noise:
                device.write(4096, b"x" * 512)
        assert rule.fired == 5
        return found

    assert run(1, False) == run(1, True) != run(2, False)


# Stalls


def test_stalled_until_released() -> None:
    async def main() -> None:
        faults, _, device = made()
        stall = faults.on("read", at=(4096, 8192)).stall()
        tasks = [asyncio.ensure_future(finish(device.read(4096 * n, 10))) for n in (0, 1, 1, 1)]
        await turns()
        assert [task.done() for task in tasks] == [True, False, False, False]
        assert (stall.stalled, stall.reached) == (3, 3)
        stall.release(1)
        await turns()
        assert [task.done() for task in tasks] == [True, True, False, False]
        tasks[2].cancel()
        await turns()
        assert (stall.stalled, tasks[2].cancelled()) == (1, True)
        stall.release()
        assert await tasks[3] == bytes(10)
        assert await finish(device.read(4096, 1)) == b"\0"          # open from now on
        stall.hold()
        late = asyncio.ensure_future(finish(device.read(4096, 1)))
        await turns()
        assert stall.stalled == 1
        faults.clear()
        await late
        await device.close()

    asyncio.run(main())


def test_stalls_and_waits_from_another_thread() -> None:
    with IOThread() as iothread:
        faults, _, device = made()
        stall = faults.on("write").stall()
        rule = faults.on("write", nth=2).error("ENOSPC")

        async def write() -> None:
            await finish(device.write(0, b"x"))

        writes = [iothread.spawn(write()) for _ in range(2)]
        stall.wait_reached(BOUND_S, count=2)
        faults.wait_for(rule, BOUND_S)
        assert not any(write.done() for write in writes)
        stall.release()
        writes[0].result(BOUND_S)
        with pytest.raises(BlockError, match="ENOSPC"):
            writes[1].result(BOUND_S)


def test_waits_that_end_in_vain_say_what_did_happen() -> None:
    faults, _, device = made()
    rule = faults.on("write", nth=2).error()
    device.write(0, b"x")
    with pytest.raises(AssertionError, match=r"write #2: error EIO, seen 1, fired 0.*has not fired 1 times"):
        faults.wait_for(rule, 0.01)
    with pytest.raises(AssertionError, match="0 requests reached the stall"):
        faults.on("read").stall().wait_reached(0.01)


def test_who_serves_a_loop_may_not_wait() -> None:
    async def main() -> None:
        faults = Faults()
        rule = faults.on()
        for wait in (lambda: faults.wait_for(rule), faults.on().stall().wait_reached):
            with pytest.raises(WouldBlockLoop, match="to_worker"):
                wait()

    asyncio.run(main())
    with IOThread() as iothread, pytest.raises(WouldBlockLoop):
        iothread.call(main_of_stall())


async def main_of_stall() -> None:
    Faults().on().stall().wait_reached()


def test_a_rule_counts_anew_when_it_gets_its_fate() -> None:
    """Requests that come between on() and the fate, from another thread, met nothing."""
    faults, _, device = made()
    rule = faults.on("read", nth=2)
    assert not fails(device.read, 0, 1)
    assert (rule.seen, rule.fired) == (1, 0)
    rule.error()
    assert [fails(device.read, 0, 1) for _ in range(3)] == [False, True, False]
    assert (rule.seen, rule.fired) == (3, 1)


def test_rules_come_and_go_while_requests_run() -> None:
    """Each request meets a whole rule or none: what was counted is what failed."""
    faults, _, device = made()
    failed, stop = [0], threading.Event()

    async def load() -> int:
        count = 0
        while not stop.is_set():
            for _ in range(50):
                failed[0] += fails(device.read, 0, 1)
                count += 1
            await asyncio.sleep(0)
        return count

    with IOThread() as iothread:
        running = iothread.spawn(load())
        rules = []
        for number in range(200):
            rule = faults.on("read", every=3).error()
            rules.append(rule)
            if number == 100:
                faults.wait_for(rule, BOUND_S)
            rule.disarm()
            rule.arm()
            rule.remove()
        stop.set()
        count = running.result(BOUND_S)
    assert sum(rule.fired for rule in rules) == failed[0] > 0
    assert faults.count("read") == count


def test_over_nothing_special_it_is_inline() -> None:
    faults, _, device = made()
    faults.on("write", nth=1000).error()
    assert device.read(0, 4096) == bytes(4096)
    assert device.write(0, b"x") is None
    assert device.statistics().waited == 0


def test_predicates_see_the_request() -> None:
    seen: list[Request] = []
    faults, _, device = made()
    faults.on("write", when=seen.append)
    device.write(512, b"data", fua=True)
    assert [(r.kind, r.offset, r.length, r.data, r.fua) for r in seen] == [("write", 512, 4, b"data", True)]
