"""A homeloop process to talk to: its output is read as it comes, every wait has a limit."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 20.0          # Python's start takes a quarter of a second, on a busy machine much more


def environment(**more: str) -> dict[str, str]:
    """For a child that runs from the source tree, whatever is installed."""
    return os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"} | more


class Lines:
    """What comes out of a pipe, read by a thread of its own so that the writer never waits."""

    def __init__(self, pipe: IO[str]) -> None:
        self.seen: list[str] = []
        self.coming: queue.SimpleQueue[str | None] = queue.SimpleQueue()        # None: it ended
        self._reader = threading.Thread(target=self._read, args=(pipe,), name="lines of a child")
        self._reader.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.seen.append(line.rstrip("\n"))
            self.coming.put(self.seen[-1])
        self.coming.put(None)

    def ended(self) -> None:
        """Wait until its last line is here: the writer has ended."""
        self._reader.join(LIMIT_S)
        assert not self._reader.is_alive(), "somebody else still has the pipe"


class Running:
    """One process. `said` and `complained` are its lines so far, on stdout and stderr."""

    def __init__(self, *arguments: str, module: str = "homeloop", env: dict[str, str] | None = None) -> None:
        self.command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment() if env is None else env, text=True, encoding="utf-8", errors="surrogateescape",
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._stdout = Lines(self.process.stdout)
        self._stderr = Lines(self.process.stderr)
        self.said = self._stdout.seen
        self.complained = self._stderr.seen

    def wait_for(self, pattern: str, *, on_stderr: bool = False) -> re.Match[str]:
        """The next line of stdout (or stderr) that has the pattern."""
        until = time.monotonic() + LIMIT_S
        lines = self._stderr if on_stderr else self._stdout
        while True:
            try:
                line = lines.coming.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"nothing like {pattern!r} in {LIMIT_S} s\n{self}") from None
            if line is None:
                raise AssertionError(f"ended without anything like {pattern!r}\n{self}")
            if (found := re.search(pattern, line)) is not None:
                return found

    def uri(self) -> str:
        """The next export's: clients may come when it is there."""
        return self.wait_for(r"^  (nbd\S+)$")[1]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """Wait for the end; the exit status, negative for a signal that killed it."""
        try:
            status = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {LIMIT_S} s\n{self}") from None
        self._stdout.ended()
        self._stderr.ended()
        return status

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.send(number)
        return self.status()

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.status()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def __str__(self) -> str:
        lines = [" ".join(self.command), *(f"  {line}" for line in self.said)]
        return "\n".join([*lines, *(f"  stderr: {line}" for line in self.complained)])
