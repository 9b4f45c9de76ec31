"""The configuration file: what it means, and all that is wrong with one, each with its line."""

from __future__ import annotations

import pytest

from homeloop.daemon.config import ConfigError, read_config
from homeloop.daemon.exporting import ListenConfig

GOOD = """\
[daemon]
control = "/run/control"
switch-interval-ms = 1
watchdog-s = 0

[[listen]]
socket = "/run/nbd.sock"
[[listen]]
host = "localhost"
port = 10809

[limits]
connections = 10
requests = 64
unsent-bytes = "1M"
all-in-flight-bytes = "2G"
idle-s = 600
stalled-s = 0

[tls]
certificates = "pki"
verify-peer = true

[iothreads.fast]
poll-max-ns = 1000

[nodes.slow]
driver = "delay"
file = "disk"
options = { read = "5ms" }

[nodes.disk]
driver = "file"
filename = "a.img"

[exports.slow]
node = "slow"
iothread = "fast"
writable = false

[exports.memory]
source = "memory:1M"
filters = ["rate:bytes=1M"]
"""


def test_what_it_means() -> None:
    config = read_config(GOOD, "x.toml")
    assert config.listen == (ListenConfig(socket="/run/nbd.sock"), ListenConfig(host="localhost", port=10809))
    assert (config.limits.connections_max, config.limits.connection.requests_max) == (10, 64)
    assert config.limits.connection.unsent_bytes_max == 1 << 20
    assert config.limits.in_flight_bytes_max == 2 << 30
    assert (config.limits.idle_s, config.limits.stalled_s) == (600, None)
    assert [node["node-name"] for node in config.nodes] == ["disk", "slow"]         # what is below comes first
    assert config.iothreads == {"fast": {"poll-max-ns": 1000}}
    assert [(export.name, export.node, export.writable) for export in config.exports] == [
        ("slow", "slow", False), ("memory", None, True),
    ]
    assert config.tls is not None
    assert config.tls.verify_peer
    assert (config.control, config.switch_interval_ms) == ("/run/control", 1.0)
    assert config.limits.blocked_s is None


def test_an_empty_file() -> None:
    assert read_config("", "x").exports == ()


def test_all_that_is_wrong_at_once() -> None:
    text = """\
[deamon]
x = 1
[[listen]]
port = 70000
[[listen]]
socket = "a"
host = "b"
[limits]
conections = 5
requests = "many"
[nodes.a]
driver = "fil"
[nodes.b]
driver = "file"
filname = "x"
filename = "y"
[nodes.c]
driver = "raw"
file = "bb"
[nodes.d]
driver = "raw"
file = "d"
[nodes.e]
driver = "raw"
file = {driver = "raw", file = {driver = "nul-co"}}
[exports.a]
node = "a"
source = "memory:1M"
[exports.b]
node = "bx"
iothread = "io"
size = "1M"
[exports.c]
source = "memory:1M"
filters = ["dely"]
"""
    with pytest.raises(ConfigError) as failed:
        read_config(text, "x.toml")
    lines = str(failed.value).splitlines()
    for expected in (
        "x.toml:1: deamon: is not known here; did you mean 'daemon'?",
        "x.toml:4: listen.0.port: must be a whole number from 0 to 65535",
        "x.toml:5: listen.1: needs a socket, or a port and perhaps a host",
        "x.toml:9: limits.conections: is not known here; did you mean 'connections'?",
        "x.toml:10: limits.requests: must be a whole number from 1 to 1048576",
        "x.toml:12: nodes.a.driver: there is no driver 'fil'; did you mean 'file'?",
        "x.toml:15: nodes.b.filname: is no option of file; did you mean 'filename'?",
        "x.toml:19: nodes.c.file: there is no node 'bb'",
        "x.toml:22: nodes.d.file: is over itself",
        "x.toml:25: nodes.e.file.file.driver: there is no driver 'nul-co'; did you mean 'null-co'?",
        "x.toml:26: exports.a: needs either a node or a source",
        "x.toml:30: exports.b.node: there is no node 'bx'",
        "x.toml:31: exports.b.iothread: there is no iothread 'io'",
        "x.toml:32: exports.b.size: is for a source; a node has its own",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    assert any(line.startswith("x.toml:35: exports.c.filters: filter 'dely'") for line in lines)
    assert lines == sorted(lines, key=lambda line: int(line.split(":")[1]))


@pytest.mark.parametrize(("text", "says"), [
    ("a = 1\nb = = 2\n", "x:2: Invalid value"),
    ("a = 'open", "x:1: "),
    ("listen = 1", "x:1: listen: must be written"),
    ("nodes = 1", "x:1: nodes: must be tables"),
    ("daemon = 1", "x:1: daemon: must be a table"),
    ("[nodes]\na = 1", "x:2: nodes.a: must be a table"),
    ("[nodes.1a]\ndriver='file'", "x:1: nodes.1a: a node's name"),
    ("[nodes.a]\nnode-name='b'", "x:2: nodes.a.node-name: the name is the table's"),
    ("[exports.a]\nsource='x'\ntls-only=true", "x:3: exports.a.tls-only: there is no [tls]"),
    ("[tls]\nverify-peer=true", "x:1: tls: needs either certificates or psk"),
    ("[daemon]\nwatchdog-s=-1", "x:2: daemon.watchdog-s: must be a number above 0"),
    ("[daemon]\nswitch-interval-ms=0", "x:2: daemon.switch-interval-ms: must be a number above 0"),
    ("[exports.a]\nsource='x'\nwritable=1", "x:3: exports.a.writable: must be true or false"),
    ("[daemon]\ncontrol=''", "x:2: daemon.control: must be a text"),
    ("a = " + "[" * 10_000, "x:1: "),
])
def test_one_thing_wrong(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as failed:
        read_config(text, "x")
    assert str(failed.value).startswith(says)
    assert "\n" not in str(failed.value)
