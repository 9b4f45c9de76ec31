"""How the command writes numbers, tables, errors and lines."""

from __future__ import annotations

import errno
import io
import logging
import os

import pytest

from homeloop.cli.words import Screen, StatusAwareHandler, amount, plural, sentence, table
from homeloop.cli.words import screen as the_screen


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    """In the test itself: between a fixture and the test pytest changes sys.stdout again."""
    terminal = FakeTerminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    return terminal


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1023.4, "1023 B"), (1023.9, "1.0 KiB"), (1024, "1.0 KiB"),
        (1536, "1.5 KiB"), ((1 << 20) - 1, "1.0 MiB"), (64 << 20, "64.0 MiB"), (5 << 30, "5.0 GiB"),
        (3 << 40, "3.0 TiB"), (1 << 62, "4194304.0 TiB"),
    ],
)
def test_amount(count: float, text: str) -> None:
    assert amount(count) == text


def test_plural() -> None:
    assert [plural(count, "client") for count in (0, 1, 2)] == ["0 clients", "1 client", "2 clients"]


def test_table() -> None:
    assert table([("a", "1"), ("long name", "12345")]) == "  a              1\n  long name  12345"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOENT, "No such file or directory", "/x"), "No such file or directory: /x"),
        (OSError(errno.ENOENT, "No such file or directory", b"/x"), "No such file or directory: /x"),
        (OSError(errno.ENOENT, "No such file or directory"), "No such file or directory"),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "Bad file descriptor"),
        (OSError("just text"), "just text"),
    ],
)
def test_sentence(error: OSError, text: str) -> None:
    assert sentence(error) == text


def test_a_status_is_replaced_and_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced by the next, not written twice, gone before a line, cut where the terminal ends."""
    terminal = use_terminal(monkeypatch)
    screen = Screen()
    screen.status("one")
    screen.status("one")
    screen.status("two")
    screen.say("line")
    screen.status("")
    screen.status("x" * 30)
    screen.status("")
    assert terminal.getvalue() == f"one\r\x1b[Ktwo\r\x1b[Kline\n{'x' * 19}\r\x1b[K"


def test_no_status_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a pipe nor on a terminal that cannot replace a line."""
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    for output in (pipe, use_terminal(monkeypatch)):
        monkeypatch.setenv("TERM", "xterm" if output is pipe else "dumb")
        monkeypatch.setattr("sys.stdout", output)
        screen = Screen()
        screen.status("one")
        screen.say("line")
        assert output.getvalue() == "line\n"


def test_closed_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with stdout and stderr closed, Python has None for them."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    screen = Screen()
    screen.status("x")
    screen.say("x")
    screen.complain("x")
    assert not screen.is_terminal()


def test_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line that nobody reads is lost, and all that follow; nothing is left to fail at the end."""
    reading, writing = os.pipe()
    with open(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        screen = Screen()
        screen.say("read")
        assert os.read(reading, 100) == b"read\n"
        os.close(reading)
        screen.say("lost")
        screen.say("lost too")
        pipe.flush()


def test_a_log_line_does_not_stick_to_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    errors = io.StringIO()
    monkeypatch.setattr("sys.stderr", errors)
    handler = StatusAwareHandler()
    the_screen.status("status")
    handler.emit(logging.LogRecord("x", logging.WARNING, __file__, 1, "logged", None, None))
    assert terminal.getvalue() == "status\r\x1b[K"
    assert errors.getvalue() == "logged\n"
