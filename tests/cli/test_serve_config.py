"""`homeloop serve` from a file, and with sockets that a service manager opened."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from homeloop.core.runtime import run
from homeloop.nbd.client import connect
from tests.cli.running import LIMIT_S, Running, environment

CONFIG = """\
[daemon]
control = "{folder}/control"
[[listen]]
socket = "{folder}/nbd"
[iothreads.one]
[iothreads.two]
[nodes.disk]
driver = "file"
filename = "{folder}/a.img"
[nodes.part]
driver = "raw"
file = "disk"
offset = 4096
[exports.part]
node = "part"
iothread = "two"
[exports.scratch]
source = "memory:1M"
"""


async def size_of(uri: str) -> int:
    async with connect(uri) as client:
        return client.size


def test_from_a_file(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    (tmp_path / "x.toml").write_text(CONFIG.format(folder=tmp_path))
    running = start("serve", "--config", str(tmp_path / "x.toml"))
    assert run(size_of(running.uri())) == (1 << 20) - 4096
    assert run(size_of(running.uri())) == 1 << 20
    running.wait_for("Ctrl-C ends it")
    assert running.end() == 0
    assert "export 'part', at home in two" in running.said[0]
    assert "at home in one" in running.said[2]
    assert not (tmp_path / "control").exists()


def test_check_says_all_and_opens_nothing(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(CONFIG.format(folder=tmp_path))      # there is no a.img
    good = start("serve", "--config", str(tmp_path / "x.toml"), "--check")
    assert good.status() == 0
    (tmp_path / "x.toml").write_text("[deamon]\n[exports.a]\n")
    bad = start("serve", "--config", str(tmp_path / "x.toml"), "--check")
    assert bad.status() == 2
    assert "x.toml:1: deamon" in bad.complained[0]
    assert "x.toml:2: exports.a" in bad.complained[1]


@pytest.mark.parametrize(("arguments", "says"), [
    (["--config", "x.toml", "memory:1M"], "takes the place of SOURCE"),
    (["--config", "x.toml", "--size", "0", "--read-only"], "takes the place of --read-only and --size"),
    (["--config", "x.toml", "--name", "", "--socket", ""], "takes the place of --name and --socket"),
    (["--config", "x.toml", "--iothreads", "2", "--filter", "readonly"], "takes the place of --iothreads and --filter"),
    (["--config", "x.toml", "--tls-certificates", "x"], "takes the place of --tls-certificates"),
    (["--config", "x.toml", "--tls-only", "x"], "takes the place of --tls-only"),
    (["--tls-only", "x", "memory:1M"], "--tls-only x: there is no export of that name"),
    (["--tls-only", "memory", "memory:1M"], "--tls-only needs --tls-certificates or --tls-psk"),
    (["--config", "x.toml", "--tls-psk", "x", "--tls-verify-peer"], "takes the place of --tls-verify-peer and"),
    (["--check", "memory:1M"], "--check is for --config FILE"),
    (["--config", "x.toml"], "No such file"),
    (["--switch-interval-ms", "0", "memory:1M"], "must be from 0.001"),
    (["--watchdog-s", "-1", "memory:1M"], "or 0 for never"),
])
def test_what_makes_no_sense(start: Callable[..., Running], arguments: list[str], says: str) -> None:
    running = start("serve", *arguments)
    assert running.status() in (1, 2)
    assert says in running.complained[0]


def test_socket_activation(tmp_path: Path) -> None:
    """The manager's sockets are used, its control socket too; their files stay when we end."""
    paths = [tmp_path / "nbd", tmp_path / "control"]
    socks = [socket.socket(socket.AF_UNIX) for _ in paths]
    for sock, path in zip(socks, paths, strict=True):
        sock.bind(str(path))
        sock.listen()
    # The shell puts its own number into LISTEN_PID, and keeps it.
    script = f"exec 3<&{socks[0].fileno()} 4<&{socks[1].fileno()}; export LISTEN_PID=$$; exec \"$@\""
    process = subprocess.Popen(
        ["bash", "-c", script, "x", sys.executable, "-m", "homeloop", "serve", "memory:1M"],
        env=environment(LISTEN_FDS="2", LISTEN_FDNAMES="nbd:control"), pass_fds=[sock.fileno() for sock in socks],
        stdout=subprocess.PIPE, text=True,
    )
    try:
        assert run(size_of(f"nbd+unix:///memory?socket={paths[0]}")) == 1 << 20
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(LIMIT_S)
            client.connect(str(paths[1]))
            assert b"QMP" in client.recv(4096)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, said
        assert all(path.exists() for path in paths)
    finally:
        process.kill()
        process.communicate()
        for sock in socks:
            sock.close()


def test_a_wrong_descriptor_is_named(tmp_path: Path) -> None:
    script = f"exec 3<'{tmp_path}'; export LISTEN_PID=$$; exec \"$@\""
    done = subprocess.run(
        ["bash", "-c", script, "x", sys.executable, "-m", "homeloop", "serve", "memory:1M"],
        env=environment(LISTEN_FDS="1"), capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )
    assert done.returncode == 2
    assert "descriptor 3 (LISTEN_FDNAMES: unknown), inherited from the service manager, is no socket" in done.stderr


def test_the_switch_interval(tmp_path: Path) -> None:
    """Half a millisecond unless somebody says otherwise."""
    code = (
        "import sys, os, signal, threading\n"
        "from homeloop.cli import serve\n"
        "from homeloop.cli.main import main\n"
        "serve.screen.say = lambda text='': text.startswith('Ctrl-C') and (\n"
        "    print(sys.getswitchinterval(), flush=True), os.kill(os.getpid(), signal.SIGTERM))\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    for options, expected in (([], 0.0005), (["--switch-interval-ms", "2"], 0.002)):
        done = subprocess.run(
            [sys.executable, "-c", code, "serve", "memory:1M", *options], env=environment(), capture_output=True,
            text=True, timeout=LIMIT_S, check=True,
        )
        assert float(done.stdout.split()[0]) == pytest.approx(expected)
