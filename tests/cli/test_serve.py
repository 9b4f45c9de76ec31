"""`homeloop serve` as a process: what it prints, whom it serves, and how it ends."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from homeloop.core.runtime import run
from homeloop.errors import BlockError, PeerError
from homeloop.nbd.client import connect
from homeloop.nbd.uri import parse_uri
from tests.cli.running import LIMIT_S, ROOT, Running, environment
from tests.nbd.certificates import make_certificates

Server = Callable[..., tuple[Running, str]]
MIB = 1 << 20


def size_of(uri: str) -> int:
    async def ask() -> int:
        async with asyncio.timeout(LIMIT_S), connect(uri) as client:
            return client.size
    return run(ask())


def socket_of(uri: str) -> Path:
    path = parse_uri(uri).socket
    assert path is not None
    return Path(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(running_server: Server, number: signal.Signals) -> None:
    """Exit 0, nothing on stderr; the private socket and its folder are gone."""
    server, uri = running_server("memory:1M")
    assert socket_of(uri).is_socket()
    assert server.end(number) == 0
    assert server.said[-1] == "flushed and closed: 0 clients, 0 requests, 0 B read, 0 B written"
    assert server.complained == []
    assert not socket_of(uri).parent.exists()


def test_nohup_is_respected(start: Callable[..., Running]) -> None:
    """A SIGHUP that was ignored at the start stays so; the next signal is the first that counts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)       # inherited by the child
    try:
        server = start("serve", "memory:1M")
    finally:
        signal.signal(signal.SIGHUP, before)
    uri = server.uri()
    server.send(signal.SIGHUP)
    assert size_of(uri) == MIB
    assert server.end() == 0


def test_what_it_says(running_server: Server, tmp_path: Path) -> None:
    """Each export with its size, rights, name and home, then its URI; then what to try with the first."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(3 * MIB))
    server, uri = running_server("memory:1k", str(image), "--iothreads", "2")
    server.wait_for("Ctrl-C ends it")
    quoted = shlex.quote(uri)
    assert server.said == [
        "serving memory:1k, 1.0 KiB, writable, as export 'memory', at home in iothread-0",
        f"  {uri}",
        f"serving {image}, 3.0 MiB, writable, as export 'disk.img', at home in iothread-1",
        f"  {uri.replace('///memory', '///disk.img')}",
        "try:",
        f"  nbdinfo {quoted}",
        f"  nbdcopy --progress {quoted} copy.img",
        f"  qemu-img convert -p -O qcow2 {quoted} copy.qcow2",
        "Ctrl-C ends it.",
    ]
    assert server.end() == 0


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("", "/"),
        ("with space", "/with%20space"),
        ("größe", "/gr%C3%B6%C3%9Fe"),
        ("a/b", "/a/b"),
        ("/x", "//x"),
        ("?#%&'\"\\$", "/%3F%23%25%26%27%22%5C%24"),
    ],
)
def test_names(running_server: Server, name: str, path: str) -> None:
    """Any name can be served, also the default export's empty one; the URI names it, quoted."""
    server, uri = running_server("memory:1M", "--name", name)
    assert uri == f"nbd+unix://{path}?socket={socket_of(uri)}"
    assert parse_uri(uri).export == name
    assert size_of(uri) == MIB
    shown = f"export {name!r}" if name else "the default export"
    assert server.said[0].endswith(f"as {shown}, at home in iothread-0")
    assert server.end() == 0


@pytest.mark.foreign("nbdinfo", "qemu-img")
@pytest.mark.parametrize("name", ["", "größe", "a ?#%&'\"$b"])
def test_names_as_others_understand_them(running_server: Server, name: str) -> None:
    """The printed command line works as it stands, in a shell, with libnbd and with QEMU."""
    server, _uri = running_server("memory:1M", "--name", name)
    line = server.wait_for("nbdinfo (.*)")[1]
    for command in (f"nbdinfo --size {line}", f"qemu-img info {line}"):
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, (command, done.stderr)
        assert str(MIB) in done.stdout
    assert server.end() == 0


def test_a_name_that_is_no_utf8_is_printed_escaped(start: Callable[..., Running]) -> None:
    """A terminal in ASCII: the line comes, with escapes, not a traceback."""
    server = start("serve", "memory:1M", "--name", "ü", env=environment(PYTHONIOENCODING="ascii", LC_ALL="C"))
    assert size_of(server.uri()) == MIB
    assert "as export '\\xfc'" in server.said[0]
    assert server.end() == 0


@pytest.mark.parametrize(
    ("listen", "uri"),
    [
        (":0", r"nbd://localhost:\d+/memory"),
        ("localhost:0", r"nbd://localhost:\d+/memory"),
        ("127.0.0.1:0", r"nbd://127.0.0.1:\d+/memory"),
        ("0.0.0.0:0", r"nbd://0.0.0.0:\d+/memory"),
    ],
)
def test_listen(running_server: Server, listen: str, uri: str) -> None:
    """Port 0 takes a free one, and the URI has it; no host is this machine alone."""
    server, at = running_server("memory:1M", "--listen", listen)
    assert re.fullmatch(uri, at)
    assert size_of(at) == MIB
    assert server.end() == 0


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_listen_on_ipv6(running_server: Server) -> None:
    server, uri = running_server("memory:1M", "--listen", "[::1]:0")
    assert re.fullmatch(r"nbd://\[::1\]:\d+/memory", uri)
    assert size_of(uri) == MIB
    assert server.end() == 0


def test_several_sources_over_iothreads(running_server: Server, tmp_path: Path) -> None:
    """Exports are dealt to the IOThreads in turn; each URI leads to its own device."""
    sizes = [1000, 4096, 5 * MIB + 1]
    images = []
    for number, size in enumerate(sizes):
        images.append(tmp_path / f"{number}.img")
        images[-1].write_bytes(bytes(size))
    server, first = running_server("memory:0", *map(str, images), "--iothreads", "4")
    uris = [server.uri() for _ in images]
    assert [size_of(uri) for uri in (first, *uris)] == [0, *sizes]
    homes = [line.rpartition(" ")[2] for line in server.said if line.startswith("serving")]
    assert homes == ["iothread-0", "iothread-1", "iothread-2", "iothread-3"]
    assert server.end() == 0


def test_an_end_that_is_no_multiple_of_512(running_server: Server, tmp_path: Path) -> None:
    """qemu-img can read that: it is among what to try."""
    image = tmp_path / "odd.img"
    image.write_bytes(bytes(1000))
    server, uri = running_server(str(image))
    server.wait_for("qemu-img convert")
    assert size_of(uri) == 1000
    assert server.end() == 0


def test_size_makes_an_image(running_server: Server, tmp_path: Path) -> None:
    """--size makes what is missing; an image that is there with that size is served as it is."""
    image = tmp_path / "new.img"
    server, uri = running_server(str(image), "--size", "3M")
    assert size_of(uri) == 3 * MIB
    assert server.end() == 0
    image.write_bytes(b"\x01" * 3 * MIB)
    server, uri = running_server(str(image), "--size", "3M")
    assert server.end() == 0
    assert image.read_bytes() == b"\x01" * 3 * MIB


def test_filters(running_server: Server, tmp_path: Path) -> None:
    """A copy-on-write layer over an image that nobody may change, and a window on it."""
    image = tmp_path / "image"
    image.write_bytes(b"old" * 4096)
    image.chmod(0o400)
    server, uri = running_server(str(image), "--filter", "offset:offset=3k", "--filter", "cow:cluster=512")

    async def use() -> None:
        async with asyncio.timeout(LIMIT_S), connect(uri) as client:
            assert client.size == 3 * 4096 - 3072
            await client.write(0, b"new")
            assert bytes(await client.read(0, 6)) == b"newold"

    run(use())
    assert server.end(signal.SIGTERM) == 0
    assert image.read_bytes() == b"old" * 4096


def test_a_filter_that_makes_no_sense(tmp_path: Path) -> None:
    image = tmp_path / "image"
    done = subprocess.run(
        [sys.executable, "-m", "homeloop", "serve", "--size", "1M", "--filter", "delay:reed=1", str(image)],
        env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )
    assert done.returncode != 0
    assert "'reed=1' is no option of delay" in done.stderr
    assert not image.exists()


def test_read_only(running_server: Server, tmp_path: Path) -> None:
    """A file without write permission can be served so; the client is told, and writing fails."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    image.chmod(0o444)
    server, uri = running_server(str(image), "--read-only")
    assert "1.0 MiB, read-only" in server.said[0]

    async def write() -> None:
        async with asyncio.timeout(LIMIT_S), connect(uri) as client:
            assert client.read_only
            await client.write(0, b"no")

    with pytest.raises(BlockError, match="read-only"):
        run(write())
    assert server.end() == 0


def test_a_stale_socket_is_replaced(running_server: Server, tmp_path: Path) -> None:
    """What a server that was killed left behind is in nobody's way."""
    path = tmp_path / "nbd.sock"
    server, _uri = running_server("memory:1M", "--socket", str(path))
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    assert path.is_socket()
    server, uri = running_server("memory:1M", "--socket", str(path))
    assert size_of(uri) == MIB
    assert server.end() == 0
    assert not path.exists()


def test_a_socket_in_use_is_left_alone(running_server: Server, start: Callable[..., Running], tmp_path: Path) -> None:
    """The second server is refused with a sentence; the first goes on."""
    path = tmp_path / "nbd.sock"
    first, uri = running_server("memory:1M", "--socket", str(path))
    second = start("serve", "memory:2M", "--socket", str(path))
    assert second.status() == 1
    assert second.said == []
    assert second.complained == [f"homeloop serve: cannot listen: another server listens on this socket: {path}"]
    assert size_of(uri) == MIB
    assert first.end() == 0


def test_an_image_in_use_is_refused(running_server: Server, start: Callable[..., Running], tmp_path: Path) -> None:
    """Two writers of one image: the second process is told so."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    first, _uri = running_server(str(image))
    second = start("serve", str(image))
    assert second.status() == 1
    assert second.complained == [
        f"homeloop serve: {image}: the image is in use: a second writer would destroy it"
    ]
    assert first.end() == 0


def test_clients_come_only_when_all_exports_are_there(start: Callable[..., Running], tmp_path: Path) -> None:
    """A client that waits for the socket alone is never told that its export is unknown."""
    path = tmp_path / "nbd.sock"
    server = start("serve", "memory:1M", "--name", "late", "--socket", str(path))
    until = time.monotonic() + LIMIT_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                break
        assert time.monotonic() < until, server
    assert size_of(f"nbd+unix:///late?socket={path}") == MIB
    assert server.end() == 0


def test_nobody_reads_its_output(running_server: Server, tmp_path: Path) -> None:
    """`homeloop serve ... | head -1`: the reader goes after a line, the clients are still served; exit 0."""
    path = tmp_path / "nbd.sock"
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "homeloop", "serve", "memory:1M", "--socket", str(path)],
        stdout=writing, stderr=subprocess.PIPE, env=environment(),
    )
    try:
        os.close(writing)
        assert os.read(reading, 8) == b"serving "
        os.close(reading)
        assert size_of(f"nbd+unix:///memory?socket={path}") == MIB
        process.send_signal(signal.SIGTERM)
        _out, errors = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, errors) == (0, b"")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("broken", ["full", "closed"])
def test_its_output_goes_nowhere(broken: str, tmp_path: Path) -> None:
    """A full disk behind stdout, or none at all: the clients are served, exit 0."""
    if broken == "full" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "nbd.sock"
    redirect = ">/dev/full" if broken == "full" else ">&-"
    command = f"exec {shlex.quote(sys.executable)} -m homeloop serve memory:1M --socket {path} {redirect}"
    process = subprocess.Popen(["sh", "-c", command], stderr=subprocess.PIPE, env=environment())
    try:
        until = time.monotonic() + LIMIT_S
        while not path.exists():
            assert time.monotonic() < until, "no socket"
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _out, errors = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, errors) == (0, b"")
    finally:
        process.kill()
        process.communicate()


class Terminal:
    """A homeloop process on a terminal of 80 columns."""

    def __init__(self, *arguments: str, module: str = "homeloop", env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT,
            stdin=theirs, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm", "COLUMNS": "80"},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on until the pattern is in what was shown."""
        until = time.monotonic() + LIMIT_S
        while (found := re.search(pattern, self.shown)) is None:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"nothing like {pattern!r} in {LIMIT_S} s: {self.shown!r}"
            try:
                self.shown += os.read(self._ours, 4096).decode()
            except OSError:         # EIO: nobody has the other end any more
                raise AssertionError(f"ended without {pattern!r}: {self.shown!r}") from None
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)
        os.close(self._ours)


def test_the_status_line_on_a_terminal(tmp_path: Path) -> None:
    """Throughput in a line that is replaced; what is logged meanwhile has a line of its own; Ctrl-C takes it away."""
    path = tmp_path / "nbd.sock"
    arguments = ("serve", "memory:16M", "--socket", str(path))
    terminal = Terminal(*arguments, module="tests.cli.devices", env=environment(STATUS_EVERY_S="0.1"))
    try:
        terminal.wait_for(r"Ctrl-C ends it\.\r\n0 clients   read 0 B/s   written 0 B/s   0 requests/s")

        async def write() -> None:
            async with asyncio.timeout(LIMIT_S), connect(f"nbd+unix:///memory?socket={path}") as client:
                for number in range(16):
                    await client.write(number * MIB, bytes(MIB))
                assert await asyncio.to_thread(terminal.wait_for, r"\r\x1b\[K1 client   read 0 B/s   written [1-9]")

        run(write())
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(path))
            rude.sendall(b"GET / HTTP/1.1\r\n\r\n" * 4)
            terminal.wait_for(r"\r\x1b\[Khomeloop: nbd: client 2 .*\r\n0 clients   read")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for(r"\r\x1b\[Kfinishing and flushing; .*\r\nflushed and closed: 2 clients, 16 requests, .*\r\n")
        assert terminal.process.wait(LIMIT_S) == 0
    finally:
        terminal.close()


def test_a_rude_client_costs_a_line(running_server: Server) -> None:
    """Garbage ends its own connection; stderr says what was wrong, in one line."""
    server, uri = running_server("memory:1M")
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(socket_of(uri)))
        rude.sendall(b"\xff" * 64)
        line = server.wait_for("client 1 ", on_stderr=True).string
    assert line.startswith("homeloop: nbd: client 1 ")
    assert size_of(uri) == MIB
    assert server.end() == 0
    assert len(server.complained) == 1


# The end, with requests in flight


def test_sigterm_under_write_load_keeps_what_was_acknowledged(
    running_server: Server, tmp_path: Path, seed: int
) -> None:
    """Every write that a client was told is done is in the image, and a flush came behind the last of them."""
    blocks, block_bytes = 4096, 512
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(blocks * block_bytes))
    server, uri = running_server(f"log:{image}", module="tests.cli.devices")
    acknowledged: list[int] = []

    async def write(client_uri: str, numbers: range) -> None:
        async with connect(client_uri) as client:
            async def one(number: int) -> None:
                await client.write(number * block_bytes, number.to_bytes(4, "big") * (block_bytes // 4))
                acknowledged.append(number)
                if len(acknowledged) == 100:
                    server.send(signal.SIGTERM)       # with some sixty in flight
            try:
                for start in range(numbers.start, numbers.stop, 32):
                    await asyncio.gather(*(one(number) for number in range(start, start + 32)))
            except PeerError:
                return
            raise AssertionError("all was written before the server ended")

    async def load() -> None:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(write(uri, range(blocks // 2)), write(uri, range(blocks // 2, blocks)))

    run(load())
    assert server.status() == 0
    assert 100 <= len(acknowledged) < blocks
    content = image.read_bytes()
    for number in acknowledged:
        block = content[number * block_bytes:(number + 1) * block_bytes]
        assert block == number.to_bytes(4, "big") * (block_bytes // 4), number
    log = (tmp_path / "disk.img.log").read_text().splitlines()
    assert log[-2:] == ["flush", "close"]
    assert {f"write {number * block_bytes}" for number in acknowledged} <= set(log[:-2])
    found = server.wait_for(r"flushed and closed: 2 clients, (\d+) requests?, 0 B read, ")
    assert int(found[1]) == len(log) - 2


@pytest.mark.foreign("nbdcopy")
def test_sigterm_while_nbdcopy_writes(running_server: Server, tmp_path: Path, seed: int) -> None:
    """The server ends with 0; nbdcopy finds itself cut off and says so. Neither hangs."""
    image, source = tmp_path / "disk.img", tmp_path / "source"
    image.write_bytes(bytes(64 * MIB))
    source.write_bytes(os.urandom(64 * MIB))
    server, uri = running_server(f"log:{image}", module="tests.cli.devices")
    copy = subprocess.Popen(["nbdcopy", "--request-size=65536", str(source), uri], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + LIMIT_S
        log = tmp_path / "disk.img.log"
        while not log.stat().st_size:
            assert time.monotonic() < until, "nbdcopy writes nothing"
        assert server.end() == 0
        _out, errors = copy.communicate(timeout=LIMIT_S)
        assert copy.returncode != 0, "it was done before the server ended"
        assert errors
    finally:
        copy.kill()
        copy.communicate()
    assert log.read_text().splitlines()[-2:] == ["flush", "close"]


@pytest.mark.parametrize("kind", ["stuck", "loop"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_gives_up(
    running_server: Server, tmp_path: Path, kind: str, number: signal.Signals, status: int
) -> None:
    """A device that never answers: the first signal waits for it, the second ends the process, and says what is lost.

    The other export of the process was flushed by then, and its own requests answered.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    server, uri = running_server(f"{kind}:{fifo}", f"log:{other}", "--iothreads", "2", module="tests.cli.devices")

    async def hang() -> None:
        async with asyncio.timeout(LIMIT_S):
            client = await connect(uri)
            read = asyncio.create_task(client.read(0, 512))
            await asyncio.to_thread(server.wait_for, "stuck", on_stderr=True)
            server.send(number)
            await asyncio.to_thread(server.wait_for, "finishing 1 request in flight; Ctrl-C again gives up on that")
            log = tmp_path / "other.img.log"
            while log.read_text() != "flush\nclose\n":     # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0)
            server.send(number)
            assert await asyncio.to_thread(server.status) == status
            with pytest.raises(PeerError):
                await read
            await client.close()

    run(hang())
    assert server.complained[0] == "stuck"
    # The other one is closed, but the main context need not have heard of it yet.
    assert server.complained[1:] in (
        [f"homeloop serve: gave up before the end; not flushed: export '{fifo.name}' (1 request in flight)" + more]
        for more in ("", ", export 'other.img' (0 requests in flight)")
    )
    assert not socket_of(uri).parent.exists()


def test_a_device_that_comes_back_in_time_is_flushed(running_server: Server, tmp_path: Path) -> None:
    """The first signal waits: the request in flight is answered, the device flushed, exit 0."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    server, uri = running_server(f"stuck:{fifo}", module="tests.cli.devices")

    async def hang() -> None:
        async with asyncio.timeout(LIMIT_S):
            client = await connect(uri)
            read = asyncio.create_task(client.read(0, 512))
            await asyncio.to_thread(server.wait_for, "stuck", on_stderr=True)
            server.send(signal.SIGTERM)
            await asyncio.to_thread(server.wait_for, "finishing 1 request in flight")
            await asyncio.to_thread(fifo.write_bytes, b"!")
            assert await read == bytes(512)
            await client.close()

    run(hang())
    assert server.status() == 0
    assert server.complained == ["stuck", "flushed"]


@pytest.mark.foreign("openssl", "nbdinfo")
def test_tls(running_server: Server, tmp_path: Path) -> None:
    """Nobody is served in clear; what it prints to try works as it stands."""
    folder = make_certificates(tmp_path).all
    server, uri = running_server("memory:1M", "--listen", "localhost:0", "--tls-certificates", str(folder))
    assert uri.startswith("nbds://localhost:")
    server.wait_for("Ctrl-C ends it")
    told = subprocess.run(
        shlex.split(server.said[3]), capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )
    assert "export-size: 1048576" in told.stdout, (server.said, told.stderr)
    with pytest.raises(BlockError, match="TLS_REQD"):
        size_of(uri.replace("nbds", "nbd"))
    assert server.end() == 0
    server, uri = running_server(
        "memory:1M", "--listen", "localhost:0", "--tls-certificates", str(folder), "--tls-verify-peer"
    )
    assert size_of(f"{uri}?tls-certificates={folder}") == MIB
    server.end()


@pytest.mark.parametrize(("options", "says"), [
    (["--tls-certificates", "/nowhere"], "there is no folder /nowhere"),
    (["--tls-certificates", "."], "missing server-cert.pem, server-key.pem"),
    (["--tls-verify-peer"], "needs either certificates or pre-shared keys"),
])
def test_tls_that_makes_no_sense(start: Callable[..., Running], options: list[str], says: str) -> None:
    running = start("serve", "memory:1M", *options)
    assert running.status() == 2
    assert says in "\n".join(running.complained)
