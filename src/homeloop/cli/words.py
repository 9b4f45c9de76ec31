"""How the command talks: lines, a status line that is replaced in place, numbers, errors as sentences.

A reader of the output that goes away (`homeloop serve disk.img | head -1`) must not end what clients depend on, so
nothing here fails because nobody listens.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import threading
from collections.abc import Sequence

__all__ = ["Screen", "StatusAwareHandler", "amount", "plural", "screen", "sentence", "table"]


class Screen:
    """Standard output, and what is wrong on stderr. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()       # a leaf
        self._status = ""                   # under _lock: what stands in the last line of the terminal

    def is_terminal(self) -> bool:
        """Does a person look at it, on something that can replace a line?"""
        return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, text: str = "") -> None:
        """Write a line; it is out when this returns."""
        with self._lock:
            self._write(f"{self._erasing('')}{text}\n")

    def status(self, text: str) -> None:
        """Show text in place of the last status; "" takes it away. Nothing where stdout is no terminal."""
        if not self.is_terminal():
            return
        columns = shutil.get_terminal_size().columns
        text = text[:columns - 1]           # a line that wraps could not be replaced
        with self._lock:
            if text != self._status:
                self._write(f"{self._erasing(text)}{text}")

    def complain(self, text: str) -> None:
        """Write a line to stderr."""
        self.status("")
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()

    def _erasing(self, status: str) -> str:
        """Return what takes the status line away; from now on it is `status`."""
        before, self._status = self._status, status
        return "\r\x1b[K" if before else ""

    def _write(self, text: str) -> None:
        if sys.stdout is None:              # started with it closed
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:
            # The reader is gone, or the disk full. What is in the buffer would fail again when Python ends, so
            # the descriptor itself leads nowhere from now on.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


screen = Screen()


class StatusAwareHandler(logging.StreamHandler[io.TextIOBase]):
    """Log lines to stderr that do not stick to the status line."""

    def emit(self, record: logging.LogRecord) -> None:
        screen.status("")
        super().emit(record)


def amount(count: float) -> str:
    """A number of bytes for people: 512 B, 64.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        # Not 1024: 1023.96 KiB would be printed as 1024.0 KiB.
        if count < (1023.5 if unit == "B" else 1023.95):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def plural(count: int, noun: str) -> str:
    """1 client, 2 clients."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def sentence(error: OSError) -> str:
    """An error of the system without its number: what was tried and what was wrong, then with which file."""
    text = error.strerror or str(error)
    return f"{text}: {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else text


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the second to the right."""
    left = max(len(name) for name, _value in rows)
    right = max(len(value) for _name, value in rows)
    return "\n".join(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)
