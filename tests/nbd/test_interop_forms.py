"""Every form of the clients that others wrote: what they say of an export, and loads that verify themselves."""

from __future__ import annotations

import asyncio
import functools
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.faults import Faults
from homeloop.block.memory import Memory
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.nbd.serving import serve
from tests.nbd.talking import until
from tests.nbd.test_interop import LIMIT_S, MAP, SIZE, both, image, tell
from tests.nbd.test_isolation import BlocksItsLoop, BlocksWorkers, served

DATA = 4 << 20, b"data" * (1 << 19)
ABILITIES = "cache df fast-zero flush fua multi-conn trim zero write"


def filled() -> Memory:
    memory = Memory(SIZE)
    memory.write(*DATA)
    return memory


@pytest.mark.foreign("nbdinfo")
def test_nbdinfo_tells_abilities() -> None:
    """--can and --is end with 0 for yes and with 2 for no."""
    async def says(uri: str, question: str, what: str) -> bool:
        call = functools.partial(subprocess.run, ["nbdinfo", question, what, uri], check=False, timeout=LIMIT_S)
        status = (await to_worker(call)).returncode
        assert status in (0, 2), f"nbdinfo {question} {what} ended with {status}"
        return status == 0

    class Plain:
        """Neither flush nor trim, nor anything else that is optional but write."""

        size = SIZE

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, offset: int, data: Any) -> None:
            pass

    async def main() -> None:
        wanted: list[tuple[Any, bool, set[str]]] = [
            (filled(), False, set(ABILITIES.split())),
            (filled(), True, {"cache", "df", "flush", "fua", "multi-conn"}),
            (Plain(), False, {"df", "write", "zero"}),
        ]
        for driver, read_only, abilities in wanted:
            async with serve(driver, read_only=read_only, iothread=True) as uri:
                can = {word for word in ABILITIES.split() if await says(uri, "--can", word)}
                assert can == abilities
                assert await says(uri, "--is", "read-only") == read_only
                assert not await says(uri, "--is", "rotational")
                assert not await says(uri, "--is", "tls")
                assert await says(uri, "--can", "connect")
                assert await says(uri, "--can", "structured-reply")

    run(main())


@pytest.mark.foreign("nbdinfo")
def test_nbdinfo_in_words() -> None:
    async def main() -> None:
        async with serve(filled(), name="disk", description="of a test") as uri:
            for form in ((), ("--list",)):
                told = await tell("nbdinfo", *form, uri)
                assert 'export="disk":' in told
                assert "export-size: 16777216 (16M)" in told
                assert "description: of a test" in told
                assert "base:allocation" in told
                assert "block_size_maximum: 33554432" in told
            lines = [line.split() for line in (await tell("nbdinfo", "--map", uri)).splitlines()]
            assert [(int(line[0]), int(line[1]), int(line[2])) for line in lines] == MAP
            lines = [line.split() for line in (await tell("nbdinfo", "--map", "--totals", uri)).splitlines()]
            assert [(int(line[0]), line[1], line[3]) for line in lines] == [
                (2 << 20, "12.5%", "data"), (14 << 20, "87.5%", "hole,zero"),
            ]

    run(main())


@pytest.mark.foreign("nbddump")
@both
def test_nbddump(make: Any) -> None:
    async def main() -> None:
        memory = make(SIZE)
        Memory.write(memory, *DATA)
        async with serve(memory) as uri:
            told = await tell("nbddump", uri)
            assert re.search(r"^0000400000: 64 61 74 61 .*\|datadatadatadata\|$", told, re.MULTILINE)
            assert re.search(r"^0000600000: 00 00 ", told, re.MULTILINE)
            assert len(told.splitlines()) < 12          # what repeats itself is told once

    run(main())


@pytest.mark.foreign("nbdcopy", "qemu-img")
@both
def test_nbdcopy_from_one_export_to_another(make: Any, tmp_path: Path, seed: int) -> None:
    """With several connections and many requests; another client compares."""
    source = image(tmp_path / "source", seed)

    async def main() -> None:
        async with serve(make(SIZE), iothread=True) as one, serve(make(SIZE), iothread=True) as other:
            await tell("nbdcopy", "--connections=4", "--requests=64", source, one)
            await tell("nbdcopy", "--connections=4", "--requests=64", "--request-size=65536", "--flush", one, other)
            for uri in (one, other):
                assert "identical" in await tell("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
            await tell("nbdcopy", "--synchronous", "--allocated", "--destination-is-zero", other, tmp_path / "back")

    run(main())
    assert source.read_bytes() == (tmp_path / "back").read_bytes()


@pytest.mark.foreign("qemu-img")
@both
def test_qemu_img_bench(make: Any) -> None:
    async def main() -> None:
        async with serve(make(SIZE), iothread=True) as uri:
            bench = ("qemu-img", "bench", "-c", "200", "-d", "16", "-f", "raw")
            assert "Run completed" in await tell(*bench, uri)
            assert "Run completed" in await tell(*bench, "-w", "--pattern=7", "--flush-interval=20", "-S", "4096", uri)
            assert "Run completed" in await tell(*bench, "-w", "-s", "65536", "-o", "512", "--no-drain",
                                                 "--flush-interval=20", uri)

    run(main())


@pytest.mark.foreign("qemu-io")
@both
def test_qemu_io_at_random(make: Any, seed: int) -> None:
    """A script from a seed: patterns are written, zeroed, discarded; then all of it is read against a model."""
    dice = random.Random(seed)
    blocks: list[int | None] = [0] * 128               # of 64 KiB; None: discarded
    commands: list[str] = []
    for _ in range(100):
        first = dice.randrange(len(blocks))
        count = dice.randint(1, min(8, len(blocks) - first))
        where, pattern = f"{first * 64}k {count * 64}k", dice.randrange(1, 256)
        kind = dice.choice(["write", "write -f", "aio_write", "write -z", "write -z -u", "write -n -z", "discard"])
        if kind == "discard":
            commands.append(f"discard {where}")
        elif "-z" in kind:
            commands.append(f"{kind.replace('-n ', '')} {where}")
        else:
            commands += [f"{kind} -P {pattern} {where}"] + ["aio_flush"] * ("aio" in kind)
        value = None if kind == "discard" else 0 if "-z" in kind else pattern
        blocks[first : first + count] = [value] * count
        if dice.random() < 0.1:
            commands.append("flush")
    commands += [f"read -P {value} {i * 64}k 64k" for i, value in enumerate(blocks) if value is not None]

    async def main() -> None:
        async with serve(make(SIZE), iothread=True) as uri:
            told = await tell("qemu-io", "-f", "raw", *[part for c in commands for part in ("-c", c)], uri)
            assert "fail" not in told, told
            assert "Pattern" not in told, told

    run(main())


@pytest.mark.foreign("fio")
@pytest.mark.parametrize(("kind", "jobs"), [("randrw", 1), ("randrw", 4), ("randtrimwrite", 4), ("write", 4)])
@both
def test_fio_verifies(make: Any, kind: str, jobs: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each job has a connection and a part of the device; trims are among the requests."""
    async def main() -> None:
        async with serve(make(SIZE), iothread=True) as uri:
            await tell(
                "fio", "--name=t", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", "--bsrange=4k-64k", "--iodepth=16",
                f"--numjobs={jobs}", "--offset_increment=3M", "--size=3M", "--thread", f"--aux-path={tmp_path}",
                *(() if kind == "randtrimwrite" else ("--verify=sha1", "--verify_fatal=1", "--do_verify=1")),
                *(("--trim_percentage=20",) if kind == "randrw" else ()),
            )

    run(main())
    assert [record for record in caplog.records if record.name.startswith("homeloop")] == []


@pytest.mark.foreign("fio")
def test_fio_finds_what_was_damaged(tmp_path: Path) -> None:
    """That the loads above can fail: one flipped bit, and one write that claims to be done and is not."""
    async def main() -> None:
        for damage in ("flip", "torn"):
            faults = Faults(seed=1)
            rule = faults.on("write", nth=5)
            rule.flip() if damage == "flip" else rule.torn(sectors=1, then="success")
            async with serve(faults.over(Memory(SIZE))) as uri:
                with pytest.raises(AssertionError, match=r"verify"):
                    await tell(
                        "fio", "--name=t", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--size=1M",
                        "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", f"--aux-path={tmp_path}",
                    )

    run(main())


@pytest.mark.foreign("nbd-client")
def test_nbd_client_lists(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(Memory(SIZE), name="a disk", listen=("127.0.0.1", 0)) as uri:
            port = re.search(r":(\d+)/", uri)
            assert port is not None
            assert "a disk" in (await tell("nbd-client", "-l", "127.0.0.1", port[1])).splitlines()

    run(main())


@pytest.mark.foreign("nbdcopy", "qemu-img", "fio")
@pytest.mark.parametrize("make", [BlocksItsLoop, BlocksWorkers])
def test_clients_of_a_stuck_export_wait_alone(make: Any, tmp_path: Path, seed: int) -> None:
    """While nbdcopy verifiably stands at one export, three other programs finish at the next; then it does, too."""
    source = image(tmp_path / "source", seed)

    async def main() -> None:
        async with served(make(), Memory(SIZE)) as both_exports:
            uris = [both_exports.server.uri(name) for name in ("blocking", "other")]
            stuck = asyncio.ensure_future(tell("nbdcopy", uris[0], "null:"))
            await until(lambda: both_exports.blocking.standing)
            await tell("nbdcopy", source, uris[1])
            assert "identical" in await tell("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uris[1])
            await tell("fio", "--name=t", "--ioengine=nbd", f"--uri={uris[1]}", "--rw=randrw", "--bs=4k", "--size=1M",
                       "--verify=crc32c", "--verify_fatal=1", f"--aux-path={tmp_path}")
            assert not stuck.done()
            assert both_exports.blocking.standing
            both_exports.blocking.go.set()
            await stuck

    run(main())


ODD = """
import random
h.set_strict_mode(0)
h.connect_uri(uri)
size = h.get_size()
block = h.get_block_size(nbd.SIZE_MINIMUM)
most = h.get_block_size(nbd.SIZE_MAXIMUM)
assert (block, most) == (want_block, 32 << 20), (block, most)

def code(request, *args):
    try:
        request(*args)
    except nbd.Error as error:
        return error.errno
    return None

h.pwrite(b"k" * 65536, 65536)

# Ranges: past the end, around it, far behind it.
for offset in (size, size - block, 1 << 62, (1 << 63) - block):
    assert code(h.pread, 2 * block, offset) == "EINVAL", offset
    assert code(h.pwrite, b"x" * 2 * block, offset) == "ENOSPC", offset
    assert code(h.trim, 2 * block, offset) == "EINVAL", offset
    assert code(h.zero, 2 * block, offset) == "ENOSPC", offset
    assert code(h.cache, 2 * block, offset) == "EINVAL", offset
assert code(h.trim, (1 << 32) - 65536, 0) == "EINVAL"
assert code(h.zero, (1 << 32) - 65536, 0) == "ENOSPC"

# Flags that a command has not, and that nobody knows.
for flag in (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 1 << 9, 1 << 15):
    assert code(h.pwrite, b"x" * block, 65536, flag) == "EINVAL", flag
    assert code(h.flush, flag) == "EINVAL", flag
    assert code(h.trim, block, 65536, flag) == "EINVAL", flag
    assert code(h.cache, block, 65536, flag) == "EINVAL", flag
for flag in (nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, 1 << 9, 1 << 15):
    assert code(h.pread, block, 65536, flag) == "EINVAL", flag

# What is not whole blocks.
if block > 1:
    for length, offset in ((block, 1), (1, block), (block + 512, 0), (block, 512), (512, size - 512)):
        assert code(h.pread, length, offset) == "EINVAL", (length, offset)
        assert code(h.pwrite, b"x" * length, offset) == "EINVAL", (length, offset)
        assert code(h.trim, length, offset) == "EINVAL", (length, offset)
        assert code(h.zero, length, offset) == "EINVAL", (length, offset)
        assert code(h.cache, length, offset) == "EINVAL", (length, offset)

# Nothing at all is no reason to fail, nor to do something.
for request in (lambda: h.pread(0, 65536), lambda: h.pwrite(b"", 65536), lambda: h.trim(0, 65536),
                lambda: h.zero(0, 65536), lambda: h.cache(0, 65536), lambda: h.pread(0, 0)):
    assert code(request) is None

# All that a request may have, and more. What is too long to be read over ends the connection, and only that one.
assert h.pread(most, 0)[65536:131072] == b"k" * 65536
h.pwrite(bytes(most), most)
assert code(h.pread, most + block, 0) == "EINVAL"
assert h.pread(block, 65536) == b"k" * block
other = nbd.NBD()
other.set_strict_mode(0)
other.connect_uri(uri)
assert code(other.pwrite, bytes(most + block), 0) is not None
assert h.pread(65536, 65536) == b"k" * 65536, "another client's write"

# Many in flight, answered in any order.
dice = random.Random(seed)
pattern = {i: bytes([i % 251]) * 4096 for i in range(300)}
for i, data in pattern.items():
    h.pwrite(data, (1 << 20) + 4096 * i)
done = []
flying = {}
for i in dice.sample(sorted(pattern), len(pattern)):
    buffer = nbd.Buffer(4096)
    flying[h.aio_pread(buffer, (1 << 20) + 4096 * i)] = i, buffer
asked = list(flying)
while flying:
    h.poll(-1)
    while flying and (cookie := h.aio_peek_command_completed()) > 0:
        h.aio_command_completed(cookie)
        i, buffer = flying.pop(cookie)
        assert bytes(buffer.to_bytearray()) == pattern[i], i
        done.append(cookie)
assert sorted(done) == sorted(asked)
if shuffled:
    assert done != asked
h.shutdown()
print("all is well")
"""


class Shuffled(Memory):
    """Each answer lets others overtake it, by chance."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self._chance = random.Random(seed)

    async def read(self, offset: int, length: int) -> Any:     # type: ignore[override]
        for _ in range(self._chance.randrange(20)):
            await asyncio.sleep(0)
        return super().read(offset, length)


class Blocks(Memory):
    block_size_min = 4096


@pytest.mark.foreign("nbdsh")
@pytest.mark.parametrize("kind", ["inline", "shuffled", "blocks"])
def test_nbdsh_asks_everything_odd(kind: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """libnbd without its own checks (strict mode 0)."""
    size = 70 << 20
    driver = {"inline": Memory(size), "shuffled": Shuffled(size, seed), "blocks": Blocks(size)}[kind]

    async def main() -> None:
        async with serve(driver, iothread=True) as uri:
            values = f"uri = {uri!r}; seed = {seed}; shuffled = {kind == 'shuffled'}"
            block = 4096 if kind == "blocks" else 1
            told = await tell("nbdsh", "-c", f"{values}; want_block = {block}", "-c", ODD)
            assert "all is well" in told

    run(main())


@pytest.mark.foreign("nbdsh")
def test_nbdsh_without_structured_replies_and_without_options() -> None:
    """The same checks where errors have no text, and by the oldest handshake that we take."""
    script = """
h.set_strict_mode(0)
h.set_request_structured_replies(False)
if oldest:
    h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)    # and with zeroes behind it
h.set_request_block_size(not oldest)
h.connect_uri(uri)
for request in (lambda: h.pread(512, h.get_size()), lambda: h.pread(512, 0, nbd.CMD_FLAG_DF),
                lambda: h.block_status(512, 0, lambda *_: 0), lambda: h.trim(1, 1 << 62)):
    try:
        request()
        print("not refused")
    except nbd.Error as error:
        assert error.errno == "EINVAL", error.errno
h.pwrite(b"x", 0)
assert h.pread(2, 0) == b"x\\0"
h.shutdown()
"""

    async def main() -> None:
        for oldest in (True, False):
            async with serve(Memory(SIZE)) as uri:
                assert "not refused" not in await tell("nbdsh", "-c", f"uri = {uri!r}; oldest = {oldest}", "-c", script)

    run(main())
