"""The command line: what is refused, with which exit status, in which words."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homeloop.block import file as block_file
from homeloop.cli import serve as command
from homeloop.cli.main import main
from homeloop.errors import BlockError, PeerError, UsageError, WrongState
from tests.cli.running import LIMIT_S, environment

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Said:
    """refused("serve", ...) -> exit status and the one line on stderr; there is nothing else."""

    def refused(*arguments: str) -> tuple[int, str]:
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        out, errors = capsys.readouterr()
        assert out == ""
        assert errors.endswith("\n")
        assert errors.count("\n") == 1, errors
        return status, errors.rstrip("\n")

    return refused


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "homeloop: the following arguments are required: COMMAND (homeloop --help explains)"),
        ("frobnicate", "homeloop: COMMAND: invalid choice: 'frobnicate'"),
        ("--frob", "homeloop: the following arguments are required: COMMAND"),
        ("serve", "homeloop serve: the following arguments are required: SOURCE (homeloop serve --help explains)"),
        ("serve memory:1M --frob", "homeloop: serve has no option or argument '--frob' (homeloop --help explains)"),
        ("serve memory:1M --sock x", "homeloop: serve has no option or argument '--sock'"),
        ("demo a b", "homeloop: demo has no option or argument 'b'"),
        ("serve memory:1M --iothreads x", "homeloop serve: --iothreads: 'x' is not a number"),
        ("serve memory:1M --iothreads -1", "homeloop serve: --iothreads: '-1' is not a number"),
        ("serve memory:1M --iothreads 0", "homeloop serve: --iothreads 0: it must be from 1 to 1024"),
        ("serve memory:1M --iothreads 9999", "homeloop serve: --iothreads 9999: it must be from 1 to 1024"),
        ("serve memory:1M --size", "homeloop serve: --size: expected one argument"),
        ("serve x --size 12q", "homeloop serve: --size: '12q' is not a size"),
        ("serve memory:1M --size 1M", "homeloop serve: 'memory:1M': memory takes its size behind the colon"),
        ("serve x --size 9999999T", "homeloop serve: --size: '9999999T' is 1099511"),
        ("serve x --size 1M --read-only", "homeloop serve: x: cannot create an image that is read-only"),
        ("serve memory:", "homeloop serve: '' is not a size"),
        ("serve memory:lots", "homeloop serve: 'lots' is not a size"),
        ("serve ftp://x", "homeloop serve: 'ftp://x': there is no kind of device 'ftp'"),
        ("serve file:", "homeloop serve: 'file:' names no file"),
        ("serve memory:1M --listen x", "homeloop serve: --listen 'x': write HOST:PORT"),
        ("serve memory:1M --listen x:", "homeloop serve: --listen 'x:': write HOST:PORT"),
        ("serve memory:1M --listen :-1", "homeloop serve: --listen ':-1': write HOST:PORT"),
        ("serve memory:1M --listen :65536", "homeloop serve: --listen ':65536': write HOST:PORT"),
        ("serve memory:1M --listen [::1]", "homeloop serve: --listen '[::1]': write HOST:PORT"),
        ("serve memory:1M --listen :0 --socket x", "homeloop serve: --socket: not allowed with argument --listen"),
        ("serve memory:1M --socket ''", "homeloop serve: --socket needs a path"),
        ("serve memory:1M memory:2M", "homeloop serve: 'memory:1M' and 'memory:2M' would both be named 'memory'"),
        ("serve a/disk b/disk", "homeloop serve: 'a/disk' and 'b/disk' would both be named 'disk'"),
        ("serve a b --name x", "homeloop serve: --name is for one SOURCE, and there are 2"),
    ],
)
def test_bad_arguments(refused: Said, arguments: str, line: str) -> None:
    """Exit 2, and one sentence that names what was wrong; nothing is served or made."""
    status, said = refused(*("" if word == "''" else word for word in arguments.split()))
    assert status == 2
    assert said.startswith(line), said


def test_a_port_of_many_digits(refused: Said) -> None:
    """int() itself refuses more than 4300."""
    status, said = refused("serve", "memory:1M", "--listen", ":" + "1" * 5000)
    assert status == 2
    assert said.startswith("homeloop serve: --listen ':111")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("x" * 4097, "export name has 4097 bytes, the protocol's limit is 4096"),
        ("\udcff", "export name '\\udcff' is no UTF-8: surrogates not allowed"),
    ],
)
def test_a_name_that_the_protocol_cannot_carry(refused: Said, tmp_path: Path, name: str, line: str) -> None:
    """Refused before an image is made for it."""
    image = tmp_path / "new.img"
    assert refused("serve", str(image), "--size", "1M", "--name", name) == (2, f"homeloop serve: {line}")
    assert not image.exists()


def test_images_that_cannot_be_served(refused: Said, tmp_path: Path) -> None:
    """Missing, a folder, neither file nor device, of another size: the path and what is wrong."""
    missing, fifo, image = tmp_path / "missing", tmp_path / "fifo", tmp_path / "disk.img"
    os.mkfifo(fifo)
    image.write_bytes(bytes(1000))
    assert refused("serve", str(missing)) == (1, f"homeloop serve: cannot open {missing}: No such file or directory")
    assert refused("serve", str(tmp_path)) == (1, f"homeloop serve: cannot open {tmp_path}: Is a directory")
    assert refused("serve", str(fifo)) == (2, f"homeloop serve: {fifo} is neither a regular file nor a block device")
    assert refused("serve", str(image), "--size", "1k") == (
        2, f"homeloop serve: {image}: the image has 1000 bytes, not 1024"
    )
    assert refused("serve", str(image), str(missing))[0] == 1
    assert refused("demo", str(missing)) == (1, f"homeloop demo: cannot open {missing}: No such file or directory")
    assert not missing.exists()


def test_no_permission_to_write(refused: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the way out, but not to who went it already."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1000))
    real = os.open

    def open_(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if path == str(image):          # tests may run as root, who is never refused
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(block_file.os, "open", open_)
    line = f"homeloop serve: cannot open {image}: Permission denied"
    assert refused("serve", str(image)) == (1, f"{line} (to serve it read-only: --read-only)")
    assert refused("serve", str(image), "--read-only") == (1, line)


def test_addresses_where_nobody_can_listen(refused: Said, tmp_path: Path) -> None:
    """Taken, no socket, no such folder, too long, nobody's host: the address is named, no number of an errno."""
    file, lost, long = tmp_path / "file", tmp_path / "no" / "s", tmp_path / ("x" * 200)
    file.write_bytes(b"")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused("serve", "memory:1M", "--listen", f"127.0.0.1:{port}") == (
            1, f"homeloop serve: cannot listen on 127.0.0.1 port {port}: Address already in use"
        )
    assert refused("serve", "memory:1M", "--socket", str(file)) == (
        1, f"homeloop serve: cannot listen: this is a file, and no socket: {file}"
    )
    assert refused("serve", "memory:1M", "--socket", str(lost)) == (
        1, f"homeloop serve: cannot listen: No such file or directory: {lost}"
    )
    status, said = refused("serve", "memory:1M", "--socket", str(long))
    assert status == 1
    assert "too long" in said
    assert str(long) in said
    # A label of more than 63 bytes is refused without asking anybody.
    status, said = refused("serve", "memory:1M", "--listen", "x" * 64 + ":0")
    assert status == 1
    assert said.startswith(f"homeloop serve: cannot find the host '{'x' * 64}': ")
    assert "Errno" not in said
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UsageError("no"), 2, "no"),
        (BlockError(errno.EIO, "the disk is gone"), 1, "the disk is gone"),
        (PeerError("it talks nonsense"), 1, "it talks nonsense"),
        (OSError(errno.ENOENT, "No such file", "/x"), 1, "No such file: /x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_each_error_becomes(
    refused: Said, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, text: str
) -> None:
    def fail(_options: object) -> int:
        raise error

    monkeypatch.setattr(command, "serve", fail)
    assert refused("serve", "memory:1M") == (status, f"homeloop serve: {text}")


def test_our_own_mistakes_are_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong thread or state is a bug of ours: a traceback and exit 1, not `bad arguments`."""
    def fail(_options: object) -> int:
        raise WrongState("ours")

    monkeypatch.setattr(command, "serve", fail)
    with pytest.raises(WrongState):
        main(["serve", "memory:1M"])


@pytest.mark.parametrize("command_line", [["--help"], ["--version"], ["serve", "--help"], ["demo", "--help"]])
def test_help_is_no_failure(capsys: pytest.CaptureFixture[str], command_line: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(command_line)
    assert end.value.code == 0
    out, errors = capsys.readouterr()
    assert out.startswith(("usage: homeloop", "homeloop "))
    assert errors == ""


def test_a_subcommand_imports_no_other() -> None:
    """Half of the time of a short copy was the import of the daemon."""
    code = (
        "import sys\n"
        "from homeloop.cli.main import main\n"
        "assert main(['copy', 'memory:1M', 'memory:1M']) == 0\n"
        "assert 'homeloop.cli.copy' in sys.modules\n"
        "others = ('homeloop.daemon', 'homeloop.cli.serve', 'homeloop.cli.demo', 'importlib.metadata')\n"
        "print([name for name in others if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_as_a_process() -> None:
    """`python -m homeloop` hands the exit status on."""
    command_line = [sys.executable, "-m", "homeloop", "serve", "memory:nothing"]
    done = subprocess.run(
        command_line, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("homeloop serve: 'nothing' is not a size")
