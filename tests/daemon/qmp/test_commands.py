"""What the commands do, end to end over the control socket: nodes, exports, IOThreads, events."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.driver import BytesLike
from homeloop.block.file import File
from homeloop.core.current import current_context
from homeloop.core.runtime import run
from homeloop.daemon import kinds
from homeloop.daemon.exporting import Daemon
from homeloop.errors import BlockError
from homeloop.nbd.client import connect as nbd_connect
from homeloop.nbd.server import Server
from tests.daemon.qmp.control import LIMIT_S, Failed, connect, controlled

MIB = 1 << 20


class Picky:
    """A driver for driver=python: says where it was asked, fails what it is told to, waits for a gate."""

    asked_in: list[str] = []            # noqa: RUF012 - the test looks at it
    closed = 0
    gate: threading.Event | None = None

    def __init__(self, size: int = MIB, fail: str = "") -> None:
        self.size = size
        self._fail = fail

    async def read(self, offset: int, length: int) -> BytesLike:
        context = current_context()
        assert context is not None
        Picky.asked_in.append(context.name)
        if self._fail == "read":
            raise OSError(errno.EIO, "the head crashed")
        if Picky.gate is not None:
            gate = Picky.gate
            await asyncio.get_running_loop().run_in_executor(None, gate.wait, LIMIT_S)
        return bytes(length)

    async def write(self, offset: int, data: BytesLike) -> None:
        if self._fail == "write":
            raise OSError(errno.ENOSPC, "full")

    def close(self) -> None:
        Picky.closed += 1


@pytest.fixture(autouse=True)
def fresh() -> None:
    Picky.asked_in.clear()
    Picky.closed = 0
    Picky.gate = None


def picky(name: str, **options: Any) -> dict[str, Any]:
    return {"driver": "python", "node_name": name, "module": __name__, "class": "Picky", "options": options}


async def serving(client: Any, tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    await client.run("nbd-server-start", addr=address)


def uri(tmp_path: Path, name: str) -> str:
    return f"nbd+unix:///{name}?socket={tmp_path / 'nbd'}"


async def nobody_left(daemon: Daemon, id: str) -> None:
    """Wait until the server has seen that the export's clients went away."""
    export = daemon.exports[id].export
    assert export is not None
    async with asyncio.timeout(LIMIT_S):
        while export.connections:       # noqa: ASYNC110 - of states that no event announces
            await asyncio.sleep(0)


def test_from_image_to_client_and_back(tmp_path: Path) -> None:
    """File, raw window, IOThread, export; a client writes; all of it goes again; the image has it and is free."""
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))

    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            await client.run("object-add", qom_type="iothread", id="io0")
            await client.run("blockdev-add", driver="file", node_name="disk", filename=str(image))
            await client.run("blockdev-add", driver="raw", node_name="part", file="disk", offset=4096, size=8192)
            await serving(client, tmp_path)
            await client.run(
                "block-export-add", type="nbd", id="e0", node_name="part", writable=True, iothread="io0", name="x"
            )
            assert daemon.exports["e0"].home_name == "io0"
            async with nbd_connect(uri(tmp_path, "x")) as nbd:
                assert nbd.info.size == 8192
                await nbd.write(0, b"behind the window")
            for name, says in (("disk", "Block device disk is in use"), ("part", "Node part is in use")):
                with pytest.raises(Failed, match=says):
                    await client.run("blockdev-del", node_name=name)
            with pytest.raises(Failed, match="object 'io0' is in use, can not be deleted: export 'e0'"):
                await client.run("object-del", id="io0")
            await nobody_left(daemon, "e0")
            await client.run("block-export-del", id="e0")
            assert [event["event"] for event in client.events] == ["BLOCK_EXPORT_DELETED"]
            await client.run("object-del", id="io0")
            await client.run("blockdev-del", node_name="part")
            await client.run("blockdev-del", node_name="disk")
            assert await client.run("query-named-block-nodes") == []
            File(str(image)).close()        # unlocked: else BlockError(EBUSY)

    run(main())
    assert image.read_bytes()[4096:4096 + 17] == b"behind the window"


def test_a_name_that_is_taken_while_the_inline_child_is_opened(tmp_path: Path) -> None:
    """By the child itself, or by another client: one of the two would be lost, and never closed."""
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            twice = "Duplicate nodes with node-name='x'"
            inline = {"driver": "python", "module": __name__, "class": "Picky"}
            with pytest.raises(Failed, match=twice):
                await client.run("blockdev-add", driver="raw", node_name="x", file=inline | {"node-name": "x"})
            assert Picky.closed == 1
            assert not daemon.nodes
            other = await connect(tmp_path / "control")
            ends = await asyncio.gather(
                *(one.run("blockdev-add", driver="raw", node_name="x", file=inline) for one in (client, other)),
                return_exceptions=True,
            )
            assert sorted(map(str, ends)) == [twice, "{}"]
            assert Picky.closed == 2
            await client.run("blockdev-del", node_name="x")
            assert Picky.closed == 3
            assert not daemon.nodes
            await other.close()

    run(main())


def test_a_partition_is_looked_for_where_its_disk_is_at_home(tmp_path: Path) -> None:
    """Not by the worker that makes the node, on a loop of its own: an export of the disk may be busy at its home."""
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            await client.run("object-add", qom_type="iothread", id="io0")
            await serving(client, tmp_path)
            for name in ("busy", "idle"):
                await client.run("blockdev-add", **picky(name))
            await client.run("block-export-add", type="nbd", id="e0", node_name="busy", iothread="io0")
            for name in ("busy", "idle"):
                with pytest.raises(Failed, match="the device has no partition table"):
                    await client.run(
                        "blockdev-add", driver="partition", node_name="p", file=name, options={"number": 1}
                    )
            assert Picky.asked_in == ["io0", daemon.nodes["idle"].home.name]
            # It may have tied things to that home: it stays there.
            await client.run("block-export-add", type="nbd", id="e1", node_name="idle", iothread="io0")
            assert daemon.exports["e1"].home_name == daemon.nodes.context.name

    run(main())


class Growing(Picky):
    """Its resize waits for the gate, and says where it ran."""

    async def resize(self, size: int) -> None:
        await self.read(0, 1)
        self.size = size


def test_a_node_that_is_resized_stays_where_it_is(tmp_path: Path) -> None:
    """Else its driver would be asked by two threads at once: by an export at its new home, and by the resize."""
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            await client.run("object-add", qom_type="iothread", id="io0")
            await serving(client, tmp_path)
            await client.run("blockdev-add", **(picky("n") | {"class": "Growing"}))
            Picky.gate = gate = threading.Event()
            other = await connect(tmp_path / "control")
            resizing = asyncio.create_task(other.run("block_resize", node_name="n", size=2 * MIB))
            async with asyncio.timeout(LIMIT_S):
                while not Picky.asked_in:       # noqa: ASYNC110 - it is asked in this thread
                    await asyncio.sleep(0)
            with pytest.raises(Failed, match="Block device n is in use"):
                await client.run("blockdev-del", node_name="n")
            export = {"type": "nbd", "id": "e0", "node_name": "n", "iothread": "io0"}
            with pytest.raises(Failed, match=r"Node n is busy at home in .*, and cannot move now"):
                await client.run("block-export-add", **export, fixed_iothread=True)
            await client.run("block-export-add", **export)
            assert daemon.exports["e0"].home_name == daemon.nodes.context.name
            gate.set()
            assert await resizing == {}
            assert daemon.nodes["n"].device.size == 2 * MIB
            await other.close()

    run(main())


def test_an_export_that_comes_while_the_server_is_stopped(tmp_path: Path) -> None:
    """It is refused: else it would be listed for ever, and offered by nobody."""
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            await client.run("blockdev-add", **picky("slow"))
            await client.run("blockdev-add", driver="null-co", node_name="n")
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e0", node_name="slow")
            Picky.gate = gate = threading.Event()
            nbd = await nbd_connect(uri(tmp_path, "slow"))
            reading = asyncio.create_task(nbd.read(0, 512))
            async with asyncio.timeout(LIMIT_S):
                while not Picky.asked_in:       # noqa: ASYNC110 - it is asked in this thread
                    await asyncio.sleep(0)
            other = await connect(tmp_path / "control")
            stopping = asyncio.create_task(other.run("nbd-server-stop"))
            async with asyncio.timeout(LIMIT_S):
                while daemon.exports["e0"].removal is None:     # noqa: ASYNC110 - of states that no event announces
                    await asyncio.sleep(0)
            with pytest.raises(Failed, match="NBD server not running"):
                await client.run("block-export-add", type="nbd", id="e1", node_name="n")
            gate.set()
            assert await stopping == {}
            await asyncio.gather(reading, return_exceptions=True)
            await nbd.close()
            assert await client.run("query-block-exports") == []
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e1", node_name="n")
            async with nbd_connect(uri(tmp_path, "n")) as again:
                assert again.size == 1 << 30
            await other.close()

    run(main())


def test_a_server_that_is_stopped_while_it_resolves_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not listen then, and does not pass for running."""
    resolving, go = asyncio.Event(), asyncio.Event()
    resolve = Server._addresses

    async def slowly(server: Server, host: str, port: int) -> Any:
        resolving.set()
        await go.wait()
        return await resolve(server, host, port)

    monkeypatch.setattr(Server, "_addresses", slowly)

    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            other = await connect(tmp_path / "control")
            inet = {"type": "inet", "data": {"host": "localhost", "port": "0"}}
            starting = asyncio.create_task(other.run("nbd-server-start", addr=inet))
            await asyncio.wait_for(resolving.wait(), LIMIT_S)
            await client.run("nbd-server-stop")
            await serving(client, tmp_path)
            go.set()
            with pytest.raises(Failed, match="was closed meanwhile"):
                await starting
            assert len(daemon.server.statistics().uris) == 1
            with pytest.raises(Failed, match="already running"):
                await serving(client, tmp_path)
            await client.run("nbd-server-stop")
            with pytest.raises(Failed, match="not running"):
                await client.run("nbd-server-stop")
            await other.close()

    run(main())


def test_inline_children_go_with_their_parent(tmp_path: Path) -> None:
    """Also when the parent cannot be opened; nobody can name them."""
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            inline = {"driver": "python", "module": __name__, "class": "Picky"}
            with pytest.raises(Failed, match="Offset"):
                await client.run("blockdev-add", driver="raw", node_name="r", file=inline, offset=2 * MIB)
            assert Picky.closed == 1
            await client.run("blockdev-add", driver="raw", node_name="r", file=inline)
            names = [node["node-name"] for node in await client.run("query-named-block-nodes")]
            assert names[0] == "r"
            assert names[1].startswith("#block")
            with pytest.raises(Failed, match="not owned by the monitor"):
                await client.run("blockdev-del", node_name=names[1])
            await client.run("blockdev-del", node_name="r")
            assert Picky.closed == 2
            assert await client.run("query-named-block-nodes") == []

    run(main())


def test_requests_run_in_the_exports_iothread(tmp_path: Path) -> None:
    """And a driver of a user's, once used in one, does not move to another."""
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            for name in ("io0", "io1"):
                await client.run("object-add", qom_type="iothread", id=name)
            await client.run("blockdev-add", **picky("p"))
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e0", node_name="p", iothread="io0")
            async with nbd_connect(uri(tmp_path, "p")) as nbd:
                await nbd.read(0, 512)
            assert Picky.asked_in == ["io0"]
            with pytest.raises(Failed, match="Cannot change iothread of active block backend"):
                await client.run(
                    "block-export-add", type="nbd", id="e1", node_name="p", name="y", iothread="io1",
                    fixed_iothread=True,
                )
            await client.run("block-export-add", type="nbd", id="e1", node_name="p", name="y", iothread="io1")
            await nobody_left(daemon, "e0")
            await client.run("block-export-del", id="e0")
            await client.run("block-export-del", id="e1")
            with pytest.raises(Failed, match="node 'p'"):
                await client.run("object-del", id="io0")
            await client.run("object-del", id="io1")
            await client.run("blockdev-del", node_name="p")
            await client.run("object-del", id="io0")

    run(main())


def test_io_errors_are_events_and_few(tmp_path: Path) -> None:
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            await client.run("blockdev-add", **picky("p", fail="read"))
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e0", node_name="p")
            async with nbd_connect(uri(tmp_path, "p")) as nbd:
                for _ in range(50):
                    with pytest.raises(BlockError, match="head crashed"):
                        await nbd.read(0, 512)
            await client.run("query-version")
            events = [event for event in client.events if event["event"] == "BLOCK_IO_ERROR"]
            assert 1 <= len(events) < 25        # one a second; 50 requests take no 25
            data = events[0]["data"]
            assert (data["node-name"], data["operation"], data["nospace"]) == ("p", "read", False)
            assert "head crashed" in data["reason"]

    run(main())


def test_removing_an_export_that_is_in_use(tmp_path: Path) -> None:
    """safe refuses, as QEMU does; hard cuts off; a request that hangs does not hang the monitor."""
    async def main() -> None:
        gate = Picky.gate = threading.Event()
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            await client.run("object-add", qom_type="iothread", id="io0")
            await client.run("blockdev-add", **picky("p"))
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e0", node_name="p", iothread="io0")
            nbd = await nbd_connect(uri(tmp_path, "p"))
            reading = asyncio.ensure_future(nbd.read(0, 512))
            async with asyncio.timeout(LIMIT_S):
                while not Picky.asked_in:       # noqa: ASYNC110 - noted in another thread
                    await asyncio.sleep(0)
            with pytest.raises(Failed, match="export 'e0' still in use"):
                await client.run("block-export-del", id="e0")
            await client.run("block-export-del", id="e0", mode="hard")
            assert (await client.run("query-block-exports"))[0]["shutting-down"] is True
            assert client.events == []
            with pytest.raises(Failed, match="already shutting down"):
                await client.run("block-export-del", id="e0")
            gate.set()
            assert (await client.line())["event"] == "BLOCK_EXPORT_DELETED"
            assert await client.run("query-block-exports") == []
            await asyncio.gather(reading, return_exceptions=True)
            await nbd.close()

    run(main())


def test_two_clients_want_one_name_at_once(tmp_path: Path) -> None:
    """One gets it, the other an error; no node is lost and none is there twice."""
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            other = await connect(tmp_path / "control")
            ends = await asyncio.gather(
                *(one.run("blockdev-add", **picky("p")) for one in (client, other)), return_exceptions=True
            )
            assert sorted(map(str, ends)) == ["Duplicate nodes with node-name='p'", "{}"]
            assert len(await other.run("query-named-block-nodes")) == 1
            await other.close()

    run(main())
    assert Picky.closed == 1


@pytest.mark.parametrize(("options", "says"), [
    ({"module": "no.such"}, "Could not import 'no.such': ModuleNotFoundError"),
    ({"class": "NoSuch"}, "has no class 'NoSuch'"),
    ({"options": {"x": 1}}, "Could not make 'Picky': TypeError"),
    ({"options": {"size": "x"}}, "size is 'x'"),
])
def test_python_drivers_that_cannot_be(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            with pytest.raises(Failed, match=says):
                await client.run("blockdev-add", **picky("p") | options)
            assert await client.run("query-named-block-nodes") == []
            await client.run("blockdev-add", **picky("p"))      # the name is free again

    run(main())


def test_server_stops_and_starts_again(tmp_path: Path) -> None:
    """Stopping cuts clients off and takes the exports along; another limit holds for the next."""
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            await client.run("blockdev-add", driver="memory", node_name="m", size=MIB)
            for _ in range(2):
                await serving(client, tmp_path)
                await client.run("block-export-add", type="nbd", id="e0", node_name="m")
                nbd = await nbd_connect(uri(tmp_path, ""))      # the default export: there is one
                await client.run("nbd-server-stop")
                await nbd.close()
                with pytest.raises(OSError):
                    await nbd_connect(uri(tmp_path, "m"))
            assert [event["data"]["id"] for event in client.events] == ["e0", "e0"]
            with pytest.raises(Failed, match=r"Failed to bind socket to .*: No such file or directory"):
                address = {"type": "unix", "data": {"path": "/no/such/folder/x"}}
                await client.run("nbd-server-start", addr=address)
            await serving(client, tmp_path)

    run(main())


def test_filters_stand_on_nodes(tmp_path: Path) -> None:
    """By name with a child's name or inline options; what is wrong with their options is said before anything opens."""
    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            await client.run("object-add", qom_type="iothread", id="io0")
            await client.run("blockdev-add", driver="memory", node_name="m", size=MIB)
            for options, says in (
                ({"errno": "ENOPE"}, "is no errno"), ({"x": 1}, "is no option"), ({"at": []}, "expected"),
            ):
                with pytest.raises(Failed, match=says):
                    await client.run("blockdev-add", driver="error", node_name="f", file="m", options=options)
            await client.run(
                "blockdev-add", driver="delay", node_name="slow", options={"read": "1ms"},
                file={"driver": "error", "file": "m", "options": {"errno": "ENOSPC", "kinds": "write"}},
            )
            await serving(client, tmp_path)
            await client.run(
                "block-export-add", type="nbd", id="e0", node_name="slow", writable=True, iothread="io0"
            )
            assert {node.home.name for node in daemon.nodes.values()} == {"io0"}
            async with nbd_connect(uri(tmp_path, "slow")) as nbd:
                assert bytes(await nbd.read(0, 512)) == bytes(512)
                with pytest.raises(BlockError, match="injected") as failed:
                    await nbd.write(0, b"x" * 512)
                assert failed.value.errno == errno.ENOSPC
            assert (await client.line())["data"]["nospace"] is True
            await client.run("block-export-del", id="e0", mode="hard")
            await client.run("blockdev-del", node_name="slow")
            assert list(daemon.nodes) == ["m"]

    run(main())


def test_an_export_of_another_server(tmp_path: Path) -> None:
    """Our own, in this case: nbd over memory, read-only."""
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            await client.run("blockdev-add", driver="memory", node_name="m", size=MIB)
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e0", node_name="m", iothread="iothread-0")
            server = {"type": "unix", "path": str(tmp_path / "nbd")}
            await client.run("blockdev-add", driver="nbd", node_name="far", server=server, export="m")
            await client.run("block-export-add", type="nbd", id="e1", node_name="far", name="again")
            async with nbd_connect(uri(tmp_path, "again")) as nbd:
                assert bytes(await nbd.read(4096, 512)) == bytes(512)
            await client.run("block-export-del", id="e1", mode="hard")
            await client.run("blockdev-del", node_name="far")
            for where, says in (
                ({"type": "unix", "path": "/no/such"}, "Failed to connect to '/no/such': No such file or directory"),
                ({"type": "inet", "host": "localhost", "port": "1"}, "Failed to connect to 'localhost:1': "),
                ({"type": "inet", "host": "localhost", "port": "x"}, "address resolution failed for localhost:x"),
            ):
                with pytest.raises(Failed, match=says):
                    await client.run("blockdev-add", driver="nbd", node_name="far", server=where)

    run(main())


def test_resize_under_a_client(tmp_path: Path) -> None:
    """A client that is there keeps what it was told, a new one sees the new size; a node below another stays."""
    async def main() -> None:
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            await client.run("blockdev-add", driver="memory", node_name="m", size=MIB)
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e0", node_name="m", iothread="iothread-0")
            async with nbd_connect(uri(tmp_path, "m")) as old:
                await client.run("block_resize", node_name="m", size=2 * MIB)
                async with nbd_connect(uri(tmp_path, "m")) as new:
                    assert (old.info.size, new.info.size) == (MIB, 2 * MIB)
                    assert bytes(await new.read(2 * MIB - 512, 512)) == bytes(512)
                    assert bytes(await old.read(0, 512)) == bytes(512)
            (node,) = await client.run("query-named-block-nodes")
            assert node["image"]["virtual-size"] == 2 * MIB
            with pytest.raises(Failed, match="expects a >0 size"):
                await client.run("block_resize", node_name="m", size=-1)
            await client.run("blockdev-add", driver="raw", node_name="r", file="m")
            with pytest.raises(Failed, match="Node m is in use by export 'e0', node 'r'"):
                await client.run("block_resize", node_name="m", size=MIB)
            await client.run("blockdev-add", **picky("p"))
            with pytest.raises(Failed):
                await client.run("block_resize", node_name="p", size=MIB)

    run(main())


def test_stopping_the_server_with_a_request_that_hangs(tmp_path: Path) -> None:
    """The monitor goes on, and the server can be started again; the event comes when the request has ended."""
    async def main() -> None:
        gate = Picky.gate = threading.Event()
        async with controlled(tmp_path) as (_daemon, _monitors, client):
            await client.run("blockdev-add", **picky("p"))
            await serving(client, tmp_path)
            await client.run("block-export-add", type="nbd", id="e0", node_name="p", iothread="iothread-0")
            nbd = await nbd_connect(uri(tmp_path, "p"))
            reading = asyncio.ensure_future(nbd.read(0, 512))
            async with asyncio.timeout(LIMIT_S):
                while not Picky.asked_in:       # noqa: ASYNC110 - noted in another thread
                    await asyncio.sleep(0)
            await client.run("nbd-server-stop")
            assert client.events == []
            await serving(client, tmp_path)
            gate.set()
            assert (await client.line())["event"] == "BLOCK_EXPORT_DELETED"
            await asyncio.gather(reading, return_exceptions=True)
            await nbd.close()

    run(main())


def test_a_node_stays_while_another_is_opened_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    one client                          another
    1 blockdev-add raw over m begins
                                        2 blockdev-del m: refused
    3 it is made, and works
    """
    opening, go = threading.Event(), threading.Event()
    plain = kinds.KINDS["raw"].make

    def slowly(options: Any, children: Any, home: Any) -> Any:
        opening.set()
        assert go.wait(LIMIT_S)
        return plain(options, children, home)

    monkeypatch.setitem(kinds.KINDS, "raw", dataclasses.replace(kinds.KINDS["raw"], make=slowly))

    async def main() -> None:
        async with controlled(tmp_path) as (daemon, _monitors, client):
            other = await connect(tmp_path / "control")
            await client.run("blockdev-add", driver="memory", node_name="m", size=MIB)
            adding = asyncio.ensure_future(client.run("blockdev-add", driver="raw", node_name="r", file="m"))
            assert await asyncio.to_thread(opening.wait, LIMIT_S)
            with pytest.raises(Failed, match="Block device m is in use"):
                await other.run("blockdev-del", node_name="m")
            go.set()
            assert await adding == {}
            assert set(daemon.nodes) == {"m", "r"}
            await other.close()

    run(main())
