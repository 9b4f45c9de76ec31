"""QEMU's own clients drive our control socket unmodified; its storage daemon answers the same script the same way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import LIMIT_S, Running, environment

# Each is sent as it stands to both daemons, in this order, in a folder with a.img and b.img of 1 MiB each.
SCRIPT = [
    '{"execute":"query-version"}',
    '{"execute":"qmp_capabilities","arguments":{"x":1}}',
    '{"execute":"qmp_capabilities"}',
    '{"execute":"qmp_capabilities","id":3}',
    '{"execute":"nope","id":[null]}',
    '{"execute":5}', '{"arguments":{}}', '{"execute":"query-block","foo":1}',
    '{"execute":"query-block","arguments":[]}', '{"execute":"query-block","arguments":{"x":1}}',
    '{"exec-oob":"query-block"}', "[1]", "{'execute':'query-block','id':'x'}", '{"execute":"query-block",}',
    '{"execute" "query-block"}', '{"execute":}', '{"execute":"query-block","id":1,"id":2}',
    '{"execute":"query-block","id":"\\x"}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread"}}',
    '{"execute":"object-add","arguments":{"qom-type":"nope","id":"x"}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"x","poll-max-ns":"a"}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"x","poll-max-ns":-1}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"x","poll-max-ns":1.5}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"x","poll-max-ns":99999999999999999999}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"1x"}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"io0","zz":1}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"io0","thread-pool-min":5,"thread-pool-max":2}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"io0","poll-max-ns":4000}}',
    '{"execute":"object-add","arguments":{"qom-type":"iothread","id":"io0"}}',
    '{"execute":"object-del","arguments":{"id":"nope"}}', '{"execute":"object-del","arguments":{"id":5}}',
    '{"execute":"qom-list","arguments":{"path":"/objects/io0"}}',
    '{"execute":"qom-list","arguments":{"path":"/objects/nope"}}',
    '{"execute":"qom-get","arguments":{"path":"/objects/io0","property":"poll-max-ns"}}',
    '{"execute":"qom-get","arguments":{"path":"/objects/io0","property":"type"}}',
    '{"execute":"qom-get","arguments":{"path":"io0","property":"nope"}}',
    '{"execute":"qom-set","arguments":{"path":"/objects/io0","property":"poll-max-ns","value":5}}',
    '{"execute":"qom-set","arguments":{"path":"/objects/io0","property":"poll-max-ns","value":"a"}}',
    '{"execute":"qom-set","arguments":{"path":"/objects/io0","property":"poll-max-ns","value":-3}}',
    '{"execute":"qom-set","arguments":{"path":"/objects/io0","property":"type","value":"x"}}',
    '{"execute":"qom-set","arguments":{"path":"/objects/io0","property":"poll-max-ns"}}',
    '{"execute":"blockdev-add","arguments":{}}', '{"execute":"blockdev-add","arguments":{"driver":"nope"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","filename":"/nope"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"n0","filename":"/nope"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"1x","filename":"a.img"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"","filename":"a.img"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"' + "a" * 32 + '","filename":"a.img"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"n0","filename":"a.img","locking":"zz"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"n0","filename":"a.img","locking":"on"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"n0","filename":"a.img"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r0","file":"n0"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r1","file":"nope"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r1","file":5}}',
    '{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r1"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r1","file":{"driver":"file","f":"b.img"}}}',
    ('{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r1",'
    '"file":{"driver":"file","filename":"b.img"},"offset":4096,"size":8192}}'),
    ('{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r2",'
    '"file":{"driver":"null-co","size":8192},"offset":4096,"size":81920}}'),
    ('{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r2",'
    '"file":{"driver":"null-co","size":8192},"offset":40960}}'),
    ('{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r2",'
    '"file":{"driver":"null-co","size":8192},"size":100}}'),
    '{"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"z","size":1048576,"read-only":true}}',
    '{"execute":"blockdev-add","arguments":{"driver":"nbd","node-name":"c"}}',
    '{"execute":"blockdev-add","arguments":{"driver":"nbd","node-name":"c","server":{"type":"zzz"}}}',
    '{"execute":"blockdev-add","arguments":{"driver":"nbd","node-name":"c","server":{"type":"unix","path":"/nope"}}}',
    '{"execute":"blockdev-del","arguments":{"node-name":"n0"}}',
    '{"execute":"blockdev-del","arguments":{"node-name":"nope"}}',
    '{"execute":"blockdev-del","arguments":{"node":"nope"}}',
    '{"execute":"blockdev-del","arguments":{"node-name":"r0"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e0","node-name":"n0"}}',
    '{"execute":"nbd-server-stop"}', '{"execute":"nbd-server-start"}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","path":"x"}}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{}}}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"inet","data":{"host":"localhost","port":5}}}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"inet","data":{"host":"localhost","port":"zz"}}}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"inet","data":{"host":"1.2.3.4","port":"0"}}}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"/nope/x"}}}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"n"}},"max-connections":-1}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"nbd.sock"}}}}',
    '{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"nbd.sock"}}}}',
    '{"execute":"block-export-add","arguments":{"type":"nope","id":"e0","node-name":"n0"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","node-name":"n0"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"1e","node-name":"n0"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e0","node-name":"nope"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e0","node-name":"n0","iothread":"nope"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e0","node-name":"z","writable":true}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e0","node-name":"n0","iothread":"io0"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e0","node-name":"n0"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e1","node-name":"n0","name":"n0"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e1","node-name":"n0","name":"y","writable":true}}',
    '{"execute":"query-block-exports"}',
    "connect",
    '{"execute":"block-export-del","arguments":{"id":"e0"}}',
    '{"execute":"block-export-del","arguments":{"id":"e0","mode":"hard"}}',
    '{"execute":"block_resize","arguments":{"node-name":"nope","size":2097152}}',
    '{"execute":"block_resize","arguments":{"device":"n0","size":2097152}}',
    '{"execute":"block_resize","arguments":{"node-name":"z","size":2097152}}',
    '{"execute":"blockdev-del","arguments":{"node-name":"n0"}}',
    '{"execute":"block-export-del","arguments":{"id":"nope"}}',
    '{"execute":"block-export-del","arguments":{"id":"e1","mode":"zz"}}',
    '{"execute":"block-export-del","arguments":{"id":"e1"}}',
    '{"execute":"block-export-add","arguments":{"type":"nbd","id":"e2","node-name":"n0"}}',
    '{"execute":"nbd-server-stop"}',
    '{"execute":"query-block-exports"}',
    '{"execute":"blockdev-del","arguments":{"node-name":"n0"}}',
    '{"execute":"object-del","arguments":{"id":"io0"}}',
    '{"execute":"query-block"}',
    '{"execute":"quit","arguments":{"x":1}}', '{"execute":"quit"}',
]


def converse(path: Path) -> tuple[list[tuple[str, object]], list[object]]:
    """Send the script; what came back for each line, and all events without their times."""
    said: list[tuple[str, object]] = []
    events: list[object] = []
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as nbd:
        sock.settimeout(LIMIT_S)
        nbd.settimeout(LIMIT_S)
        sock.connect(str(path))
        lines = sock.makefile("rb")
        assert b"QMP" in lines.readline()
        for text in SCRIPT:
            if text == "connect":
                enter(nbd, path.parent / "nbd.sock")
                continue
            sock.sendall(text.encode())
            while "event" in (answer := json.loads(lines.readline())):
                del answer["timestamp"]
                events.append(answer)
            said.append((text, answer))
        lines.close()
    return said, events


def enter(nbd: socket.socket, path: Path) -> None:
    """Become a client of the export n0 that has nothing to ask."""
    nbd.connect(str(path))
    nbd.recv(18, socket.MSG_WAITALL)
    nbd.sendall(b"\0\0\0\x03" + b"IHAVEOPT\0\0\0\x01\0\0\0\x02n0")     # EXPORT_NAME: no option reply to parse
    assert len(nbd.recv(10, socket.MSG_WAITALL)) == 10


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a daemon, with two images."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    return tmp_path


@pytest.fixture
def ours(folder: Path, start: Callable[..., Running]) -> tuple[Running, Path]:
    """A homeloop with a control socket that can be connected to."""
    path = folder / "control"
    running = start("serve", "--control", str(path))
    running.wait_for("control socket")
    return running, path


@pytest.mark.foreign("qemu-storage-daemon")
def test_the_storage_daemon_says_the_same(ours: tuple[Running, Path], folder: Path, tmp_path_factory: Any) -> None:
    """Over a hundred commands, right and wrong: the same answers, word for word, and the same events."""
    version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True).stdout
    if not re.search(r"version 7\.2\.", version):
        pytest.skip(f"the texts are those of 7.2, here is {version.splitlines()[0]}")
    running, path = ours
    said, events = converse(path)
    assert running.status() == 0
    their_folder = tmp_path_factory.mktemp("qemu")
    for name in ("a.img", "b.img"):
        shutil.copy(folder / name, their_folder / name)
    their_path = their_folder / "control"
    theirs = subprocess.Popen(
        [
            "qemu-storage-daemon", "--chardev", f"socket,id=c,path={their_path},server=on,wait=off",
            "--monitor", "chardev=c", "--pidfile", "ready",
        ],
        cwd=their_folder,
    )
    try:
        wait_for_file(theirs, their_folder / "ready")
        expected, their_events = converse(their_path)
    finally:
        theirs.kill()               # it does not always end by itself after this
        theirs.wait()
    different = [
        f"{text}\n  theirs {their_answer}\n  ours   {answer}"
        for (text, answer), (_, their_answer) in zip(said, expected, strict=True) if answer != their_answer
    ]
    assert not different, "\n" + "\n".join(different)
    assert events == their_events


def wait_for_file(process: subprocess.Popen[bytes], path: Path) -> None:
    """Until the program has written it; a program that ends without is an error."""
    while not path.exists():
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02)


def test_qemus_client_library(ours: tuple[Running, Path]) -> None:
    """qemu.qmp: connect, negotiate, commands side by side, errors, events, disconnect."""
    qmp = pytest.importorskip("qemu.qmp")
    running, path = ours

    async def main() -> None:
        client = qmp.QMPClient("test")
        await client.connect(str(path))
        versions = await asyncio.gather(*(client.execute("query-version") for _ in range(8)))
        assert all(version["package"] == "homeloop" for version in versions)
        with pytest.raises(qmp.ExecuteError, match="has not been found"):
            await client.execute("nope")
        await client.execute("blockdev-add", {"driver": "memory", "node-name": "m", "size": 4096})
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        await client.execute("nbd-server-start", {"addr": address})
        await client.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "m"})
        with client.listener("BLOCK_EXPORT_DELETED") as events:
            await client.execute("block-export-del", {"id": "e"})
            assert (await asyncio.wait_for(events.get(), LIMIT_S))["data"] == {"id": "e"}
        await client.execute("quit")
        with contextlib.suppress(EOFError):     # we have hung up already, or not
            await client.disconnect()

    asyncio.run(main())
    assert running.status() == 0


def test_qmp_shell(ours: tuple[Running, Path]) -> None:
    """The shell of the package, as a person uses it: completion's query-commands, then what is typed."""
    pytest.importorskip("qemu.qmp")
    running, path = ours
    typed = (
        "object-add qom-type=iothread id=io0\n"
        "blockdev-add driver=memory node-name=m size=4096\n"
        "nbd-server-start addr={'type':'unix','data':{'path':'nbd.sock'}}\n"
        "block-export-add type=nbd id=e node-name=m iothread=io0\n"
        "query-block-exports\n"
        "blockdev-del node-name=m\n"
        "quit\n"
    )
    shell = subprocess.run(
        [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", str(path)], input=typed, text=True,
        capture_output=True, timeout=LIMIT_S, env=environment(HOME=str(path.parent)), check=False,
    )
    assert '"id": "e"' in shell.stdout, shell.stdout + shell.stderr
    assert "Node m is in use" in shell.stdout
    assert running.status() == 0
