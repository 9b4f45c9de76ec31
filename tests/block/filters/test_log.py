"""Every request that ended is noted, with its result; the record can be read from a file and asked again."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.block.filters.error import Error
from homeloop.block.filters.log import Log, LogEntry, read_log, replay
from homeloop.block.memory import Memory
from homeloop.errors import UsageError
from tests.block.answers import finish, turns
from tests.block.drivers import refused
from tests.block.filters.waiting import Waiting


def use(device: Device) -> None:
    device.write(0, b"first")
    device.write(4096, b"second", fua=True)
    device.write_zeroes(0, 2, may_trim=False)
    device.read(0, 5)
    device.flush()


def summary(entries: list[LogEntry]) -> list[tuple[object, ...]]:
    return [(e.number, e.kind, e.offset, e.length, e.fua, e.error) for e in entries]


USED = [
    (1, "write", 0, 5, False, None), (2, "write", 4096, 6, True, None), (3, "write_zeroes", 0, 2, False, None),
    (4, "read", 0, 5, False, None), (5, "flush", 0, 0, False, None),
]


def test_to_its_own_list_to_yours_and_to_a_function() -> None:
    own = Log(Memory(8192))
    use(Device(own))
    assert summary(own.entries) == USED
    assert all(entry.took_s >= 0 and entry.data is None for entry in own.entries)
    assert [entry.at_s for entry in own.entries] == sorted(entry.at_s for entry in own.entries)
    yours: list[LogEntry] = []
    use(Device(Log(Memory(8192), yours)))
    assert summary(yours) == USED
    called: list[LogEntry] = []
    use(Device(Log(Memory(8192), called.append)))
    assert summary(called) == USED


def test_failures_have_their_errno_and_the_cancelled_are_marked() -> None:
    async def main() -> None:
        driver = Waiting(8192)
        log = Log(driver)
        device = Device(log)
        driver.errors["write"] = [OSError(errno.ENOSPC, "full")]
        with pytest.raises(Exception, match="ENOSPC"):
            await finish(device.write(0, b"x"))
        driver.held.add("read")
        task = asyncio.ensure_future(finish(device.read(0, 1)))
        await turns()
        task.cancel()
        await asyncio.wait((task,))
        never = device.read(5, 1)
        never.close()                                       # type: ignore[union-attr]
        del never
        assert summary(log.entries) == [
            (1, "write", 0, 1, False, "ENOSPC"), (2, "read", 0, 1, False, "cancelled"),
        ]

    asyncio.run(main())


def test_a_file_of_json_lines_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "log"
        device = Device(Log(Memory(8192), path, with_data=True))
        use(device)
        assert refused(device.write, 9000, b"x").errno == errno.ENOSPC      # refused above the log: not in it
        await device.close()
        entries = list(read_log(path))
        assert summary(entries)[:5] == USED
        assert [entry.data for entry in entries[:2]] == [b"first", b"second"]
        assert entries[2].may_trim is False

    asyncio.run(main())


def test_replay_does_the_same_to_another_device() -> None:
    async def main() -> None:
        log = Log(Memory(8192), with_data=True)
        use(Device(log))
        other = Memory(8192)
        replayed = await replay(reversed(log.entries), Device(other))
        assert bytes(other.read(0, 5)) == b"\0\0rst"
        assert bytes(other.read(4096, 6)) == b"second"
        assert summary(replayed) == USED
        broken = await replay(log.entries, Device(Error(Memory(8192), "EROFS", kinds="write")))
        assert [entry.error for entry in broken] == ["EROFS", "EROFS", None, None, None]

    asyncio.run(main())


def test_replay_needs_the_data_before_it_does_anything() -> None:
    log = Log(Memory(8192))
    use(Device(log))
    other = Memory(8192)
    with pytest.raises(UsageError, match="request 1 wrote: make it with with_data=True"):
        asyncio.run(replay(log.entries, Device(other)))
    assert other.allocated_bytes == 0


GOOD = LogEntry(number=1, at_s=0, took_s=0, kind="write", offset=0, length=1, data=b"x").to_json()


@pytest.mark.parametrize(("line", "text"), [
    ("nonsense", "line 2"),
    ("[]", "not an object"),
    ("{}", "line 2"),
    (GOOD.replace('"write"', '"rite"'), "kind is 'rite'"),
    (GOOD.replace('"offset": 0', '"offset": -1'), "offset is -1"),
    (GOOD.replace('"length": 1', '"length": 2'), "data of 1"),
    (GOOD.replace("}", ', "more": 1}'), "there is no 'more'"),
    (GOOD.replace("}", ', "error": "EX"}'), "'EX' is no errno"),
    (GOOD.replace("}", ', "fua": 1}'), "fua is 1"),
    (GOOD.replace('"eA=="', '"e"'), "line 2"),
    ("[" * 100_000, "line 2"),
    (GOOD.replace('"eA=="', "1"), "line 2"),
])
def test_a_file_that_is_no_log(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "log"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UsageError, match=text):
        list(read_log(path))
