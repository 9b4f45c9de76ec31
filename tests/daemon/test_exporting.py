"""The daemon inside a program: exports come and are dealt out, and all of them end flushed, whatever fails."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from homeloop.block.device import Device
from homeloop.block.driver import BytesLike
from homeloop.block.memory import Memory
from homeloop.block.opening import open_device
from homeloop.core.current import current_context
from homeloop.core.runtime import run
from homeloop.daemon import exporting
from homeloop.daemon.exporting import Daemon, ExportConfig, ListenConfig
from homeloop.errors import BlockError, PeerError, UsageError, WrongState
from homeloop.nbd.client import connect
from homeloop.nbd.server import ServerLimits
from homeloop.nbd.serving import serve
from homeloop.nbd.uri import parse_uri
from tests.block.filters.test_partition import mbr

T = TypeVar("T")
LIMIT_S = 20.0
MIB = 1 << 20


def within_limit(coro: Coroutine[Any, Any, T]) -> T:
    async def main() -> T:
        async with asyncio.timeout(LIMIT_S):
            return await coro
    return run(main())


class Noted:
    """Memory that notes in which order and thread it was asked; `fail` names what fails; writes pass a gate."""

    def __init__(self, name: str, notes: list[str], *, fail: str = "", gate: asyncio.Event | None = None) -> None:
        self.size = MIB
        self._name = name
        self._notes = notes
        self._fail = fail
        self._gate = gate

    def _note(self, what: str) -> None:
        self._notes.append(f"{self._name} {what} in {threading.current_thread().name}")
        if what == self._fail:
            raise OSError(errno.ENOSPC, "no space left")

    async def read(self, offset: int, length: int) -> BytesLike:
        return bytes(length)

    async def write(self, offset: int, data: BytesLike) -> None:
        self._note("asked to write")
        if self._gate is not None:
            await self._gate.wait()
        self._note("written")

    async def flush(self) -> None:
        self._note("flush")

    async def close(self) -> None:
        self._note("close")


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What open_device() finds behind "test:NAME"."""
    found: dict[str, Any] = {}

    def opened(spec: str, **options: Any) -> Device:
        kind, _colon, name = spec.partition(":")
        return Device(found[name], name=name) if kind == "test" else open_device(spec, **options)

    monkeypatch.setattr(exporting, "open_device", opened)
    return found


def test_from_start_to_end(tmp_path: Path) -> None:
    """Two images on two IOThreads, one client each; in the end no thread, no socket, no lock is left."""
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    for image in images:
        image.write_bytes(bytes(MIB))

    async def main() -> str:
        async with Daemon(iothreads=2) as daemon:
            for image in images:
                await daemon.add_export(ExportConfig(source=str(image), name=image.name))
            await daemon.listen(ListenConfig())
            assert [exported.iothread.name for exported in daemon.exported.values()] == ["iothread-0", "iothread-1"]
            for number, image in enumerate(images):
                async with connect(daemon.server.uri(image.name)) as client:
                    await client.write(4096, bytes([number + 1]) * 512)
            uri = daemon.server.uri()
        assert daemon.exported == {}
        return uri

    uri = within_limit(main())
    socket_path = parse_uri(uri).socket
    assert socket_path is not None
    assert not Path(socket_path).parent.exists()
    for number, image in enumerate(images):
        assert image.read_bytes()[4096:4608] == bytes([number + 1]) * 512
        Path(image).open("rb").close()
        open_again = open_device(str(image))            # the lock is gone: else BlockError(EBUSY)
        run(open_again.close())


def test_filters_of_an_export(tmp_path: Path) -> None:
    """The last is what clients see; under a copy-on-write layer the image is only read; what does not fit lets go."""
    image = tmp_path / "image"
    image.write_bytes(b"i" * 8192)

    async def main() -> None:
        async with Daemon() as daemon:
            source = str(image)
            with pytest.raises(UsageError, match="filter 'offset:offset=1M'"):
                await daemon.add_export(ExportConfig(source=source, name="a", filters=("delay", "offset:offset=1M")))
            over = await daemon.add_export(ExportConfig(source=source, name="b", filters=("cow", "offset:offset=4k")))
            same = await daemon.add_export(ExportConfig(source=source, name="c", filters=("cow",), read_only=True))
            assert (over.device.size, over.device.can_write, same.device.can_write) == (4096, True, False)
            await daemon.listen(ListenConfig(socket=str(tmp_path / "s")))
            async with connect(daemon.server.uri("b")) as client:
                await client.write(0, b"changed")
                assert bytes(await client.read(0, 8)) == b"changedi"

    within_limit(main())
    assert image.read_bytes() == b"i" * 8192


def test_a_partition_of_another_servers_export() -> None:
    """Its table is read at the export's home: an NBD client is at home where it was asked first."""
    disk = Memory(MIB)
    disk.write(0, mbr((0x83, 64, 512)))
    disk.write(64 * 512, b"first")

    async def main() -> None:
        async with serve(disk) as uri, Daemon() as daemon:
            await daemon.add_export(ExportConfig(source=uri, name="a", filters=("partition:number=1",)))
            await daemon.listen(ListenConfig())
            async with connect(daemon.server.uri("a")) as client:
                assert client.size == 512 * 512
                assert bytes(await client.read(0, 5)) == b"first"

    within_limit(main())


def test_exports_are_dealt_in_turn(drivers: dict[str, Any]) -> None:
    """And each device is asked, flushed and closed at home, in its IOThread."""
    notes: list[str] = []
    for name in "abcde":
        drivers[name] = Noted(name, notes)

    async def main() -> None:
        async with Daemon(iothreads=2) as daemon:
            for name in drivers:
                await daemon.add_export(ExportConfig(source=f"test:{name}", name=name))
            homes = [exported.iothread for exported in daemon.exported.values()]
            first, second = daemon.iothreads
            assert homes == [first, second, first, second, first]

    within_limit(main())
    for number, name in enumerate("abcde"):
        home = f"iothread-{number % 2}"
        noted = [note for note in notes if note.startswith(name)]
        assert noted == [f"{name} flush in {home}", f"{name} close in {home}"]


def test_close_drains_then_flushes_then_closes(drivers: dict[str, Any]) -> None:
    """A write in flight when the daemon closes is done and answered; the flush comes behind it."""
    notes: list[str] = []
    gate = asyncio.Event()
    drivers["a"] = Noted("a", notes, gate=gate)

    async def main() -> None:
        daemon = Daemon()
        await daemon.start()
        exported = await daemon.add_export(ExportConfig(source="test:a", name="a"))
        await daemon.listen(ListenConfig())
        client = await connect(daemon.server.uri("a"))
        write = asyncio.create_task(client.write(0, b"x"))
        while not notes:            # noqa: ASYNC110 - noted in another thread
            await asyncio.sleep(0)
        closing = asyncio.create_task(daemon.close())
        while daemon.server.statistics().uris:      # noqa: ASYNC110 - closed in its first step
            await asyncio.sleep(0)
        assert not write.done()
        exported.iothread.post(gate.set)
        await closing
        await write
        await client.close()

    within_limit(main())
    done = [note.removesuffix(" in iothread-0") for note in notes]
    assert done == ["a asked to write", "a written", "a flush", "a close"]


def test_a_device_that_hangs_does_not_keep_others_from_their_flush(drivers: dict[str, Any]) -> None:
    """close() waits for it; meanwhile the other export is drained, flushed and closed."""
    notes: list[str] = []
    gate = asyncio.Event()
    drivers["hangs"] = Noted("hangs", notes, gate=gate)
    drivers["other"] = Noted("other", notes)

    async def main() -> None:
        daemon = Daemon(iothreads=2)
        await daemon.start()
        for name in drivers:
            await daemon.add_export(ExportConfig(source=f"test:{name}", name=name))
        await daemon.listen(ListenConfig())
        client = await connect(daemon.server.uri("hangs"))
        write = asyncio.create_task(client.write(0, b"x"))
        while not notes:            # noqa: ASYNC110 - noted in another thread
            await asyncio.sleep(0)
        home = daemon.exported["hangs"].iothread
        closing = asyncio.create_task(daemon.close())
        while list(daemon.exported) != ["hangs"]:       # noqa: ASYNC110 - the other one leaves it
            await asyncio.sleep(0)
        assert notes[1:] == ["other flush in iothread-1", "other close in iothread-1"]
        assert not closing.done()
        home.post(gate.set)
        await closing
        await write
        await client.close()

    within_limit(main())
    assert notes[-1] == "hangs close in iothread-0"


@pytest.mark.parametrize("fail", ["flush", "close"])
def test_each_export_that_cannot_be_flushed_is_named(drivers: dict[str, Any], fail: str) -> None:
    """The others are flushed and closed all the same, the threads ended."""
    notes: list[str] = []
    for name in "abc":
        drivers[name] = Noted(name, notes, fail="" if name == "b" else fail)

    async def main() -> None:
        async with Daemon(iothreads=2) as daemon:
            for name in drivers:
                await daemon.add_export(ExportConfig(source=f"test:{name}", name=name))

    with pytest.raises(BlockError, match=r"export 'a': .*no space left.*; export 'c': .*no space left") as failed:
        within_limit(main())
    assert failed.value.errno == errno.ENOSPC
    assert len(notes) == 6


def test_what_is_not_opened_changes_nothing(tmp_path: Path) -> None:
    """A missing image, a name twice, a name that the protocol cannot carry: the others are served."""
    missing, new = tmp_path / "missing", tmp_path / "new"

    async def main() -> None:
        async with Daemon(iothreads=2) as daemon:
            await daemon.add_export(ExportConfig(source="memory:1k", name="a"))
            with pytest.raises(BlockError, match="cannot open"):
                await daemon.add_export(ExportConfig(source=str(missing), name="b"))
            with pytest.raises(UsageError, match="there is an export named 'a' already"):
                await daemon.add_export(ExportConfig(source=str(new), name="a", size=512))
            with pytest.raises(UsageError, match="4097 bytes"):
                await daemon.add_export(ExportConfig(source=str(new), name="x" * 4097, size=512))
            with pytest.raises(UsageError, match="description"):
                await daemon.add_export(ExportConfig(source=str(new), name="x", size=512, description="\0"))
            await daemon.listen(ListenConfig())
            assert list(daemon.exported) == ["a"]
            async with connect(daemon.server.uri("a")) as client:
                assert client.size == 1024
            with pytest.raises(BlockError) as refused:
                await connect(daemon.server.uri("b"))
            assert refused.value.errno == errno.ENOENT

    within_limit(main())
    assert not new.exists()


def test_one_name_asked_for_twice_at_once(drivers: dict[str, Any]) -> None:
    """One of them is served; the device of the other is closed."""
    notes: list[str] = []
    drivers["a"] = Noted("a", notes)
    drivers["b"] = Noted("b", notes)

    async def main() -> None:
        async with Daemon() as daemon:
            adding = [daemon.add_export(ExportConfig(source=f"test:{name}", name="x")) for name in drivers]
            first, second = await asyncio.gather(*adding, return_exceptions=True)
            refused = second if isinstance(second, BaseException) else first
            assert isinstance(refused, UsageError)
            assert len(notes) == 2
            assert list(daemon.exported) == ["x"]

    within_limit(main())
    assert sorted(notes) == [f"{name} {what} in iothread-0" for name in "ab" for what in ("close", "flush")]


def test_a_server_that_refuses_an_export_closes_its_device(
    drivers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    drivers["a"] = Noted("a", notes)

    async def main() -> None:
        async with Daemon() as daemon:
            async def refuse(*_arguments: object, **_options: object) -> None:
                raise WrongState("no")

            monkeypatch.setattr(daemon.server, "add_export", refuse)
            with pytest.raises(WrongState):
                await daemon.add_export(ExportConfig(source="test:a", name="a"))
            assert daemon.exported == {}
            assert notes == ["a flush in iothread-0", "a close in iothread-0"]

    within_limit(main())


def test_cancelled_while_an_image_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening cannot be stopped; what it opened is closed again, and not exported."""
    notes: list[str] = []
    opening, go = threading.Event(), threading.Event()

    def opened(_spec: str, **_options: Any) -> Device:
        opening.set()
        assert go.wait(LIMIT_S)
        return Device(Noted("a", notes))

    monkeypatch.setattr(exporting, "open_device", opened)

    async def main() -> None:
        async with Daemon() as daemon:
            adding = asyncio.create_task(daemon.add_export(ExportConfig(source="x", name="a")))
            assert await asyncio.to_thread(opening.wait, LIMIT_S)
            adding.cancel()
            await asyncio.sleep(0)
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await adding
            assert daemon.exported == {}
            assert notes == ["a flush in iothread-0", "a close in iothread-0"]

    within_limit(main())


def test_opening_runs_on_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take long (a network file system): the main context goes on meanwhile."""
    seen: list[object] = []
    go = threading.Event()

    def opened(_spec: str, **_options: Any) -> Device:
        seen.append(current_context())
        assert go.wait(LIMIT_S)
        return Device(Memory(512))

    monkeypatch.setattr(exporting, "open_device", opened)

    async def main() -> None:
        async with Daemon() as daemon:
            adding = asyncio.create_task(daemon.add_export(ExportConfig(source="x", name="a")))
            while not seen:         # noqa: ASYNC110 - seen in another thread
                await asyncio.sleep(0)
            go.set()
            await adding

    within_limit(main())
    assert seen == [None]


def test_addresses(tmp_path: Path) -> None:
    """A socket of one's own path, a private one, TCP with any free port; several at once."""
    path = tmp_path / "nbd.sock"

    async def main() -> None:
        async with Daemon() as daemon:
            with pytest.raises(WrongState):
                daemon.server.uri()
            await daemon.add_export(ExportConfig(source="memory:1k", name="a"))
            await daemon.listen(ListenConfig(socket=str(path)))
            await daemon.listen(ListenConfig(host="127.0.0.1", port=0))
            await daemon.listen(ListenConfig())
            uris = daemon.server.statistics().uris
            assert uris[0] == f"nbd+unix:///?socket={path}"
            assert uris[1].startswith("nbd://127.0.0.1:")
            for uri in uris:
                target = parse_uri(uri)
                async with connect(exporting_uri(target)) as client:
                    assert client.size == 1024

    def exporting_uri(target: Any) -> Any:
        return type(target)(socket=target.socket, host=target.host, port=target.port, export="a")

    within_limit(main())
    assert not path.exists()


def test_where_nobody_can_listen(tmp_path: Path) -> None:
    """OSError that names the place; the daemon goes on, and can listen elsewhere."""
    async def main(port: int) -> None:
        async with Daemon() as daemon:
            for where, text in (
                (ListenConfig(host="127.0.0.1", port=port), f"127.0.0.1 port {port}"),
                (ListenConfig(host="x" * 64, port=0), "cannot find the host 'xxx"),
                (ListenConfig(socket=str(tmp_path / "no" / "socket")), "cannot listen"),
            ):
                with pytest.raises(OSError, match=text):
                    await daemon.listen(where)
            await daemon.listen(ListenConfig())

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        within_limit(main(taken.getsockname()[1]))


def test_limits_are_the_servers() -> None:
    """One client allowed: the second is turned away."""
    async def main() -> None:
        async with Daemon(limits=ServerLimits(connections_max=1)) as daemon:
            await daemon.add_export(ExportConfig(source="memory:1k", name="a"))
            await daemon.listen(ListenConfig())
            async with connect(daemon.server.uri("a")):
                with pytest.raises((PeerError, OSError)):
                    await connect(daemon.server.uri("a"))

    within_limit(main())


def test_misuse() -> None:
    with pytest.raises(UsageError, match="0 IOThreads"):
        Daemon(iothreads=0)
    daemon = Daemon()
    with pytest.raises(WrongState, match="not been started"):
        _ = daemon.server
    daemon.remove_folder()          # nothing to remove

    async def main() -> None:
        await daemon.close()        # never started
        again = Daemon()
        await again.start()
        with pytest.raises(WrongState):
            await again.start()

    within_limit(main())


def test_close_twice() -> None:
    async def main() -> None:
        daemon = Daemon()
        await daemon.start()
        await daemon.add_export(ExportConfig(source="memory:1k", name="a"))
        await daemon.listen(ListenConfig())
        await daemon.close()
        await daemon.close()

    within_limit(main())


def test_a_start_that_fails_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second IOThread cannot be started: the first is ended again."""
    def main_with(fail: Callable[[], None]) -> None:
        async def main() -> None:
            daemon = Daemon(iothreads=3)
            monkeypatch.setattr(daemon.iothreads[1], "start", fail)
            async with daemon:
                raise AssertionError("started")

        within_limit(main())

    def fail() -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start new thread"):
        main_with(fail)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("iothread-")]


def test_remove_folder_is_for_who_cannot_wait() -> None:
    """The private socket goes at once; the close() that comes all the same finds nothing to do."""
    async def main() -> None:
        async with Daemon() as daemon:
            await daemon.listen(ListenConfig())
            path = parse_uri(daemon.server.uri()).socket
            assert path is not None
            daemon.remove_folder()
            assert not Path(path).parent.exists()

    within_limit(main())
