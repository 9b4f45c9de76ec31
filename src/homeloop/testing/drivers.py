"""The conformance suite for block drivers: does a class keep the contract of homeloop.block.driver?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.core.iothread import IOThread
from homeloop.errors import BlockError, UsageError
from homeloop.testing.driver_bench import Bench, Skipped
from homeloop.testing.driver_checks import CHECKS, Check

__all__ = ["DriverReport", "check_driver"]

_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverReport:
    """What was checked. `seed` repeats it. A value, for any thread."""

    driver: str                     # the driver's class
    seed: int
    passed: tuple[str, ...]
    skipped: dict[str, str]         # check -> why it says nothing about this driver
    requests: int

    def __str__(self) -> str:
        skipped = "".join(f"\n  {name}: skipped, {why}" for name, why in self.skipped.items())
        return f"{self.driver}: {len(self.passed)} checks passed with {self.requests} requests{skipped}"


def check_driver(
    make: Callable[[], Driver],
    *,
    seed: int | None = None,
    moves: int = 150,
    limit_s: float = 60.0,
    fail_next: Callable[[Any], object] | None = None,
    only: str | None = None,
) -> DriverReport:
    """Check a driver: sizes, ranges, writes, zeroes, trim, flush, extents, hints, resizes, many at once, its end.

    make() returns a new driver for each check, of any size and contents, that nobody else uses; it is called in this
    thread and may block. The driver is used as an export does it: behind a Device, at home in an IOThread. A driver
    that can write is written to. Its reads must be repeatable.

    fail_next(driver), called at home, must make the driver's next read fail: then it is checked that the ones behind
    it do not. moves: random requests, for each of up to two windows. only: the name of one check.

    Raises AssertionError, naming the driver, the check, what was asked and what came, and the seed; also if a check
    takes longer than limit_s seconds, or if make() returns what no Device takes. What then still runs in the driver is
    cancelled, and left alone if that does not end it. Call it in a thread without a context.
    """
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    checks = [check for check in CHECKS if only is None or _name_of(check) == only]
    if not checks:
        raise UsageError(f"there is no check {only!r}, only {', '.join(map(_name_of, CHECKS))}")
    passed: list[str] = []
    skipped: dict[str, str] = {}
    requests, label = 0, "driver"
    for check in checks:
        driver = make()
        label = type(driver).__name__
        try:
            bench = Bench(driver, seed=seed, moves=moves, fail_next=fail_next)
            _run_check(check, bench, limit_s)
            passed.append(_name_of(check))
            requests += bench.requests
        except Skipped as reason:
            skipped[_name_of(check)] = str(reason)
        except (AssertionError, UsageError) as error:
            text = f"check_driver: {label}: {_name_of(check)}: {error} (seed={seed})"
            raise AssertionError(text) from error
    return DriverReport(driver=label, seed=seed, passed=tuple(passed), skipped=skipped, requests=requests)


def _run_check(check: Check, bench: Bench, limit_s: float) -> None:
    iothread = IOThread("check_driver").start()
    running = iothread.spawn(_checked(check, bench))
    try:
        running.result(timeout=limit_s)
    except TimeoutError:
        running.cancel()
        try:
            running.result(timeout=_GRACE_S)
        except TimeoutError:
            # Its thread is left behind: to stop it would be to wait for it.
            raise AssertionError(f"it hangs: not done after {limit_s:g} s, and cancelling it did not help") from None
        except BaseException:                       # whatever a cancelled driver raises: it has ended
            pass
        iothread.stop()
        raise AssertionError(f"it hangs: not done after {limit_s:g} s") from None
    except BaseException:
        iothread.stop()
        raise
    iothread.stop()


async def _checked(check: Check, bench: Bench) -> None:
    """Run one check; the device is closed after it, whether it passed or not."""
    try:
        await check(bench)
    except BaseException:
        await _closed_anyhow(bench.device)
        raise
    await bench.close()


async def _closed_anyhow(device: Device) -> None:
    try:
        await device.close()
    except BlockError:
        pass                                        # the first failure is the one to be told


def _name_of(check: Check) -> str:
    return check.__name__.removeprefix("_check_")
