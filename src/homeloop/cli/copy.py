"""`homeloop copy`: one device to another, or a comparison of the two."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import time

from homeloop.cli.ending import Ending
from homeloop.cli.words import amount, screen
from homeloop.core.runtime import run
from homeloop.errors import UsageError
from homeloop.nbd.copy_ends import End, open_source, open_target
from homeloop.nbd.copying import CopyPlan, CopyResult, Lanes, Moved, check_ends, compare, copy

__all__ = ["Bar", "copy_command", "plan_of"]

REDRAW_EVERY_S = 0.2
LANES_MAX = 16                  # as many as an end allows
REQUESTS_MAX = 1024
REQUEST_BYTES_MAX = 32 << 20    # what every NBD server takes


def copy_command(options: argparse.Namespace) -> int:
    """Copy; return the exit status: 130 if Ctrl-C ended it. The main thread.

    UsageError for options or sizes that make no sense. Leaves its signal handlers behind: see Ending.
    """
    return run(_copy(options.source, options.target, plan_of(options), options))


def plan_of(options: argparse.Namespace) -> CopyPlan:
    """What the options say of how to copy."""
    for name, value, most in (
        ("--connections", options.connections, LANES_MAX), ("--requests", options.requests, REQUESTS_MAX),
    ):
        if not 1 <= value <= most:
            raise UsageError(f"{name} {value}: it must be from 1 to {most}")
    if not 512 <= options.request_size <= REQUEST_BYTES_MAX or options.request_size % 512:
        raise UsageError(f"--request-size {options.request_size}: a multiple of 512, up to {REQUEST_BYTES_MAX}")
    return CopyPlan(
        lanes=options.connections,
        requests=options.requests,
        request_bytes=options.request_size,
        sparse=not options.no_sparse,
        detect_zeroes=options.detect_zeroes,
        flush=not options.no_flush,
    )


async def _copy(source: str, target: str, plan: CopyPlan, options: argparse.Namespace) -> int:
    with Ending(lambda: "homeloop copy: gave up before the end; the target is not complete") as ending:
        working = asyncio.ensure_future(_work(source, target, plan, options))
        wanted = asyncio.ensure_future(ending.wanted.wait())
        await asyncio.wait((working, wanted), return_when=asyncio.FIRST_COMPLETED)
        wanted.cancel()
        if not working.done():
            working.cancel()
            screen.complain("homeloop copy: ending what is in flight; Ctrl-C again gives up on that")
            await asyncio.wait((working,))
        if working.cancelled():
            screen.complain("homeloop copy: interrupted; the target is not complete")
            return 130
        working.result()
        return 0


async def _work(source_spec: str, target_spec: str, plan: CopyPlan, options: argparse.Namespace) -> None:
    async with contextlib.AsyncExitStack() as stack:
        lanes = await stack.enter_async_context(Lanes())
        source = await open_source(source_spec)
        stack.push_async_callback(lanes.close, source)
        target = await _open_to(target_spec, source, reads=options.compare_only)
        stack.push_async_callback(lanes.close, target)
        check_ends(source, target, writes=not options.compare_only)
        if not options.compare_only:
            with Bar("copying", source.size) as bar:
                result = await copy(source, target, plan, bar.moved, lanes=lanes)
            screen.say(f"copied {_summary(result, source.size, bar.seconds)}")
            if target.size > source.size:
                screen.say(f"the last {amount(target.size - source.size)} of the target are as they were")
        if options.compare_only or options.verify:
            with Bar("comparing", source.size) as bar:
                await compare(source, target, plan, bar.moved, lanes=lanes)
            screen.say(f"identical: {amount(source.size)} in {bar.seconds:.1f} s")


async def _open_to(spec: str, source: End, *, reads: bool) -> End:
    return await (open_source(spec) if reads else open_target(spec, source.size))


def _summary(result: CopyResult, size: int, seconds: float) -> str:
    zeroes = result.zeroes + result.skipped
    of_them = f", {amount(result.data)} of data and {amount(zeroes)} of zeroes" if zeroes else ""
    return f"{amount(size)} in {seconds:.1f} s, {amount(size / max(seconds, 1e-9))}/s{of_them}"


class Bar:
    """A progress bar on stderr, if that is a terminal; and a watch. `with` it, in a coroutine."""

    def __init__(self, what: str, size: int) -> None:
        self.moved: list[Moved] = []        # appended and written by the copy
        self.seconds = 0.0                  # once it is over
        self._what = what
        self._size = size
        self._began = 0.0
        self._shown = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Bar:
        self._began = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._tick()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        if self._timer is not None:
            self._timer.cancel()
        if self._shown:
            self._write("\r\x1b[K")

    def line(self, columns: int) -> str:
        """How far it is, in so many columns."""
        done = sum(moved.data + moved.zeroes + moved.skipped for moved in self.moved)
        part = done / self._size if self._size else 1.0
        seconds = max(time.monotonic() - self._began, 1e-9)
        text = f" {100 * part:3.0f} %  {amount(done)} of {amount(self._size)}  {amount(done / seconds)}/s"
        width = max(0, min(40, columns - len(self._what) - len(text) - 4))
        return f"{self._what} [{'#' * int(width * part):<{width}}]{text}"[: columns - 1]

    def _tick(self) -> None:
        self._write(f"\r\x1b[K{self.line(shutil.get_terminal_size().columns)}")
        self._shown = True
        self._timer = asyncio.get_running_loop().call_later(REDRAW_EVERY_S, self._tick)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):      # nobody looks any more: the copy goes on
            sys.stderr.write(text)
            sys.stderr.flush()
