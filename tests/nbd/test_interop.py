"""Clients that others wrote, against our server: what they say of it, and that data survive.

Each runs twice where it moves data: against a device that answers inline, and one that answers later.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.file import File
from homeloop.block.memory import Memory
from homeloop.core.runtime import run
from homeloop.core.workers import to_worker
from homeloop.nbd.client import connect
from homeloop.nbd.serving import serve
from tests.block.images import allocated_bytes, need_holes

SIZE = 16 << 20
LIMIT_S = 40


class Later(Memory):
    """Memory that lets others run before it answers."""

    async def read(self, offset: int, length: int) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().read(offset, length)

    async def write(self, offset: int, data: Any) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().write(offset, data)

    async def flush(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)


both = pytest.mark.parametrize("make", [Memory, Later])


async def tell(*command: str | Path) -> str:
    """Run a program on a worker and return what it printed; fail with that if it failed."""
    args = [str(part) for part in command]
    # nbdsh is a script for the system's Python: not for one that comes first in our PATH.
    path = os.pathsep.join(["/usr/bin", "/bin", os.environ.get("PATH", "")])
    call = functools.partial(
        subprocess.run, args, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "PATH": path},
    )
    done = await to_worker(call)
    assert done.returncode == 0, f"{args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def image(path: Path, seed: int) -> Path:
    """A raw image with data at odd places and holes."""
    dice = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for _ in range(20):
            file.seek(dice.randrange(SIZE - (1 << 20)))
            file.write(dice.randbytes(dice.choice([1, 512, 4096, 70_000, 1 << 20])))
    return path


@pytest.mark.foreign("nbdinfo")
def test_nbdinfo() -> None:
    async def main() -> None:
        async with serve(Memory(SIZE), name="d isk", description="a text") as uri:
            told = json.loads(await tell("nbdinfo", "--json", uri))
            (export,) = told["exports"]
            assert told["protocol"] == "newstyle-fixed"
            assert (export["export-name"], export["export-size"]) == ("d isk", SIZE)
            assert export["description"] == "a text"
            assert (export["can_multi_conn"], export["can_fua"], export["is_read_only"]) == (True, True, False)
            assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 1 << 25)
            assert (await tell("nbdinfo", "--size", uri)).strip() == str(SIZE)
            only = uri.replace("d%20isk", "")
            assert json.loads(await tell("nbdinfo", "--json", only))["exports"][0]["export-size"] == SIZE
            listed = json.loads(await tell("nbdinfo", "--json", "--list", only))
            assert [one["export-name"] for one in listed["exports"]] == ["d isk"]

    run(main())


@pytest.mark.foreign("nbdcopy")
@both
def test_nbdcopy(make: Callable[[int], Memory], tmp_path: Path, seed: int) -> None:
    source, target = image(tmp_path / "source", seed), tmp_path / "target"

    async def main() -> None:
        async with serve(make(SIZE), listen=("127.0.0.1", 0)) as uri:
            await tell("nbdcopy", "--flush", source, uri)
            await tell("nbdcopy", uri, target)

    run(main())
    assert source.read_bytes() == target.read_bytes()


@pytest.mark.foreign("qemu-img")
@both
def test_qemu_img(make: Callable[[int], Memory], tmp_path: Path, seed: int) -> None:
    source = image(tmp_path / "source", seed)

    async def main() -> None:
        async with serve(make(SIZE), name="disk") as uri:
            told = json.loads(await tell("qemu-img", "info", "--output=json", uri))
            assert (told["format"], told["virtual-size"]) == ("raw", SIZE)
            await tell("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
            assert "identical" in await tell("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
            await tell("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "target")

    run(main())
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@pytest.mark.foreign("qemu-io")
@both
def test_qemu_io(make: Callable[[int], Memory]) -> None:
    commands = [
        "write -P 1 0 1M", "write -f -P 2 512k 64k", "write -z 64k 4k", "write -z -u 128k 64k", "discard 1M 1M",
        "aio_write -P 3 2M 512k", "aio_write -P 4 3M 4k", "aio_flush", "flush",
        "read -P 1 0 64k", "read -P 0 64k 4k", "read -P 0 128k 64k", "read -P 2 512k 64k", "read -P 3 2M 512k",
        "read -P 4 3M 4k",
    ]

    async def main() -> None:
        async with serve(make(SIZE)) as uri:
            told = await tell("qemu-io", "-f", "raw", *[part for c in commands for part in ("-c", c)], uri)
            assert "fail" not in told, told
            assert "Pattern" not in told, told

    run(main())


@pytest.mark.foreign("qemu-io")
def test_qemu_io_read_only() -> None:
    async def main() -> None:
        async with serve(Memory(SIZE), read_only=True) as uri:
            await tell("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", uri)
            with pytest.raises(AssertionError, match=r"read-only|Permission|permit"):
                await tell("qemu-io", "-f", "raw", "-c", "write 0 4k", uri)

    run(main())


@pytest.mark.foreign("fio")
@both
def test_fio(make: Callable[[int], Memory], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It verifies what it reads, and hangs up without DISC: no reason for a line in the log."""
    async def main() -> None:
        async with serve(make(SIZE)) as uri:
            await tell(
                "fio", "--name=t", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=512-64k",
                "--iodepth=32", "--size=4M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
                f"--aux-path={tmp_path}", "--trim_percentage=10",
            )

    run(main())
    assert [record for record in caplog.records if record.name.startswith("homeloop")] == []


NBDSH = """
import errno
h.set_strict_mode(0)
h.connect_uri(uri)

def refused(request, *args):
    try:
        request(*args)
    except nbd.Error as error:
        return error.errno
    return None

assert refused(h.cache, 512, 0) is None
assert refused(h.cache, 512, h.get_size()) == "EINVAL"
assert h.get_structured_replies_negotiated() and h.can_df()
assert h.pread(70000, 0, nbd.CMD_FLAG_DF) == bytes(70000)
assert refused(h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO) is None
assert refused(h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE) is None
assert refused(h.block_status, 512, 0, lambda *_: 0) == "EINVAL"        # no context was asked for
assert refused(h.pread, 512, h.get_size()) == "EINVAL"
assert refused(h.pwrite, b"x", h.get_size()) == "ENOSPC"
assert refused(h.trim, 512, h.get_size()) == "EINVAL"
h.pwrite(b"abc", 1)
h.zero(1, 2, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(5, 0) == b"\\0a\\0c\\0"
buffers = [nbd.Buffer(4096) for _ in range(200)]
cookies = [h.aio_pread(buffer, 4096 * i) for i, buffer in enumerate(buffers)]
while cookies:
    h.poll(-1)
    cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
print("all is well")
"""


@pytest.mark.foreign("nbdsh")
@both
def test_nbdsh(make: Callable[[int], Memory]) -> None:
    async def main() -> None:
        async with serve(make(SIZE)) as uri:
            assert "all is well" in await tell("nbdsh", "-c", f"uri = {uri!r}", "-c", NBDSH)

    run(main())


@pytest.mark.foreign("nbdsh")
@both
def test_nbdsh_sees_chunks(make: Callable[[int], Memory]) -> None:
    """A hole is told as one, unless the client forbids it; nothing is without structured replies."""
    script = """
def kinds(flags=0):
    seen = []
    def chunk(data, offset, status, error):
        seen.append((len(data), offset, status))
        return 0
    h.pread_structured(1 << 20, 1 << 20, chunk, flags)
    return seen

h.set_request_structured_replies(structured)
h.connect_uri(uri)
assert kinds() == [(1 << 20, 1 << 20, nbd.READ_HOLE if structured else nbd.READ_DATA)]
if structured:
    assert kinds(nbd.CMD_FLAG_DF) == [(1 << 20, 1 << 20, nbd.READ_DATA)]
h.pwrite(b"x", (2 << 20) - 1)
assert kinds() == [(1 << 20, 1 << 20, nbd.READ_DATA)]
assert h.can_df() == structured
"""

    async def main() -> None:
        async with serve(make(SIZE)) as uri:
            for structured in (True, False):
                await tell("nbdsh", "-c", f"uri = {uri!r}; structured = {structured}", "-c", script)
                async with connect(uri) as client:
                    await client.trim(0, SIZE)

    run(main())


def sparse(path: Path) -> Path:
    """2 MiB of data behind 4 MiB of hole, and a hole behind it."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(4 << 20)
        file.write(b"data" * (1 << 19))
    return path


def devices_of(path: Path) -> list[Any]:
    """The same content in memory and in a file."""
    memory = Memory(SIZE)
    memory.write(4 << 20, b"data" * (1 << 19))
    return [memory, File(path, read_only=True)]


MAP = [(0, 4 << 20, 3), (4 << 20, 2 << 20, 0), (6 << 20, 10 << 20, 3)]


@pytest.mark.foreign("nbdinfo")
def test_nbdinfo_map(tmp_path: Path) -> None:
    need_holes(tmp_path)

    async def main() -> None:
        for device in devices_of(sparse(tmp_path / "source")):
            async with serve(device) as uri:
                told = json.loads(await tell("nbdinfo", "--json", "--map", uri))
                assert [(one["offset"], one["length"], one["type"]) for one in told] == MAP
                told = json.loads(await tell("nbdinfo", "--json", uri))
                assert told["exports"][0]["contexts"] == ["base:allocation"]

    run(main())


@pytest.mark.foreign("nbdcopy")
def test_nbdcopy_keeps_holes(tmp_path: Path) -> None:
    need_holes(tmp_path)
    source = sparse(tmp_path / "source")

    async def main() -> None:
        for device in devices_of(source):
            async with serve(device) as uri:
                target, into = tmp_path / "target", Memory(SIZE)
                target.unlink(missing_ok=True)
                await tell("nbdcopy", uri, target)
                assert target.read_bytes() == source.read_bytes()
                assert allocated_bytes(target) <= 3 << 20
                async with serve(into) as other:
                    await tell("nbdcopy", uri, other)
                    assert into.allocated_bytes == 2 << 20

    run(main())


@pytest.mark.foreign("qemu-img")
def test_qemu_img_sees_holes(tmp_path: Path) -> None:
    need_holes(tmp_path)
    source = sparse(tmp_path / "source")

    async def main() -> None:
        for device in devices_of(source):
            async with serve(device) as uri:
                told = json.loads(await tell("qemu-img", "map", "-f", "raw", "--output=json", uri))
                assert [(one["start"], one["length"]) for one in told if one["data"]] == [MAP[1][:2]]
                await tell("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "target")
                assert allocated_bytes(tmp_path / "target") <= 3 << 20
                assert "identical" in await tell("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)

    run(main())


@pytest.mark.foreign("nbdsh")
def test_wz2_nbdsh_fast_zero_that_is_slow() -> None:
    class Slow(Memory):
        def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> None:
            if fast:
                raise OSError(errno.EOPNOTSUPP, "only by writing")
            super().write_zeroes(offset, length, may_trim=may_trim)

    script = """
h.connect_uri(uri)
h.pwrite(b"x" * 512, 0)
try:
    h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)
    print("not refused")
except nbd.Error as error:
    assert error.errno == "ENOTSUP", error.errno
assert h.pread(512, 0) == b"x" * 512
h.zero(512, 0)
assert h.pread(512, 0) == bytes(512)
"""

    async def main() -> None:
        async with serve(Slow(SIZE)) as uri:
            assert "not refused" not in await tell("nbdsh", "-c", f"uri = {uri!r}", "-c", script)

    run(main())


@pytest.mark.foreign("qemu-img")
@pytest.mark.parametrize("size", [512 * 100 + 1, (1 << 20) - 1, 4097])
def test_qemu_img_and_a_size_that_is_no_multiple_of_512(size: int, tmp_path: Path, seed: int) -> None:
    """With simple replies it waits for the rest of the last sector, for ever."""
    data = random.Random(seed).randbytes(size)

    async def main() -> None:
        device = Memory(size)
        device.write(0, data)
        async with serve(device) as uri:
            await tell("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "target")

    run(main())
    found = (tmp_path / "target").read_bytes()
    assert found[:size] == data
    assert not any(found[size:])


@pytest.mark.foreign("nbdsh")
def test_e3_x4_nbdsh_writes_to_a_read_only_export() -> None:
    script = """
h.set_strict_mode(0)
h.connect_uri(uri)
for request in (lambda: h.pwrite(b"x", 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):
    try:
        request()
        print("not refused")
    except nbd.Error as error:
        assert error.errno == "EPERM", error.errno
assert h.pread(2, 0) == b"\\0\\0"
"""

    async def main() -> None:
        async with serve(Memory(SIZE), read_only=True) as uri:
            assert "not refused" not in await tell("nbdsh", "-c", f"uri = {uri!r}", "-c", script)

    run(main())


@pytest.mark.foreign("nbdkit")
@pytest.mark.parametrize("options", [(), ("--no-sr",)], ids=["structured", "simple"])
def test_our_client_and_nbdkit(tmp_path: Path, options: tuple[str, ...]) -> None:
    """The client against a server that others wrote."""
    script = """
import asyncio, os, sys
from homeloop.nbd.client import connect

async def main():
    async with connect(sys.argv[1]) as client:
        data = os.urandom(3 << 20)
        await client.write(12345, data, fua=True)
        pieces = await asyncio.gather(*[client.read(12345 + i, 1 << 16) for i in range(0, 3 << 20, 1 << 16)])
        assert b"".join(pieces) == data
        await client.write_zeroes(12345, 1 << 20)
        await client.trim(0, 1 << 20)
        await client.flush()
        assert await client.read(12345, 1 << 20) == bytes(1 << 20)
        await client.write(8 << 20, b"x" * 65536)
        position, found = 0, []
        while position < client.size:
            for length, hole, zero in await client.extents(position, client.size - position):
                position += length
                found.append((length, hole, zero))
        assert sum(length for length, *_ in found) == client.size
        assert client.info.structured == any(hole for _, hole, _ in found), found
    print("all is well")

asyncio.run(main())
"""
    path = tmp_path / "client.py"
    path.write_text(script)
    command = ["nbdkit", *options, "-U", "-", "memory", "16M", "--run", f"{sys.executable} {path} \"$uri\""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=_environment())
    assert "all is well" in done.stdout, done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
