"""Faults as a script: rules that say which requests get which fate, and a record of what has happened.

    faults = Faults(seed=7)
    faults.on("write", nth=3).error("ENOSPC")
    stall = faults.on("read", at=(4096, 8192)).stall()
    device = Device(faults.over(Memory(1 << 20)))

Rules are looked at in the order in which they were made, at the home of the device and when the request is asked for;
each that matches has its effect, until one ends the request. They are made, armed, disarmed and removed by any thread
while requests run, and count for the next request. What chance decides comes from the seed, for each rule apart: the
same requests in the same order meet the same faults.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.block.fates import WAIT_S, Crash, Damage, Delayed, Drop, Fail, Fate, Keep, Stall, Torn, check_may_wait
from homeloop.block.fault_filter import FaultFilter
from homeloop.block.fault_state import Crashes, Decided
from homeloop.block.filters.errnos import errno_of
from homeloop.block.filters.requests import KINDS, Request, kinds_of
from homeloop.errors import UsageError

__all__ = ["Faults", "Happened", "Rule"]

_LOG_MAX: Final = 10_000        # entries of faults.log; the counts go on
_RULES_MAX: Final = 1000        # each is looked at for each request
_WITH_DATA: Final = frozenset({"read", "write"})
_TEARABLE: Final = frozenset({"write", "write_zeroes"})


@dataclass(frozen=True, slots=True)
class Happened:
    """One fate that met one request. A value, for any thread."""

    number: int             # of the request, among all that the faults have seen, from 1
    kind: str
    offset: int
    length: int
    rule: str               # as the rule is printed
    fate: str
    at_s: float             # since the Faults were made

    def __str__(self) -> str:
        return f"{self.at_s:9.3f} s  request {self.number}: {self.kind} of {self.length} at {self.offset}: {self.fate}"


class Rule:
    """Which requests; and, by the method that is called on it, which fate. Any thread.

    A rule without a fate does nothing but count; one that gets its fate begins to count anew. Each fate method returns
    the rule, stall() the Stall.
    """

    def __init__(
        self, faults: Faults, number: int, *, kinds: frozenset[str], at: tuple[int, int] | None,
        nth: frozenset[int], every: int | None, times: int | None, when: Callable[[Request], object] | None,
    ) -> None:
        self._faults = faults
        self._lock = faults.lock
        self.number = number                                # from 1, in the order in which they were made
        self._at = at
        self._nth = nth
        self._every = every
        self._times = times
        self._when = when
        self._chance = random.Random(f"{faults.seed}/{number}")     # under _lock
        # Under _lock when written; read without: each is one value.
        self._kinds = kinds
        self._fate: Fate | None = None
        self._armed = True
        self.seen = 0                                       # requests that matched while it was armed
        self.fired = 0                                      # of these, those that it had a fate for

    def __repr__(self) -> str:
        state = "" if self._armed else " disarmed"
        return f"<Rule {self}{state}, seen {self.seen}, fired {self.fired}>"

    def __str__(self) -> str:
        kinds = "any" if self._kinds == frozenset(KINDS) else "/".join(sorted(self._kinds))
        words = [kinds]
        if self._nth:
            words.append("#" + ",".join(map(str, sorted(self._nth))))
        if self._every is not None:
            words.append(f"every {self._every}th")
        if self._at is not None:
            words.append(f"at {self._at[0]}-{self._at[1]}")
        if self._when is not None:
            words.append("when told")
        if self._times is not None:
            words.append(f"{self._times} times")
        return f"{' '.join(words)}: {self._fate or 'counted'}"

    @property
    def is_armed(self) -> bool:
        """Does it meet requests? See disarm()."""
        return self._armed

    def arm(self) -> Rule:
        """Undo disarm(): it goes on counting where it was."""
        self._armed = True
        return self

    def disarm(self) -> Rule:
        """Let requests pass, and do not count them. Those that are stalled stay so until release()."""
        self._armed = False
        return self

    def remove(self) -> None:
        """As Faults.remove."""
        self._faults.remove(self)

    # Fates

    def error(self, errno: int | str = "EIO", text: str = "") -> Rule:
        """The request fails with this errno, a number or a name, and is not passed on."""
        return self._meet(Fail(errno_of(errno), text))

    def delay(self, seconds: float) -> Rule:
        """The request waits so long, then goes on."""
        if not 0 <= seconds < float("inf"):
            raise UsageError(f"a delay of {seconds} is not a time in seconds")
        return self._meet(Delayed(seconds))

    def stall(self) -> Stall:
        """The request stands still until the Stall that this returns is released, then goes on."""
        stall = Stall()
        self._meet(stall)
        return stall

    def torn(
        self, sectors: int = 1, then: Literal["error", "success", "crash"] = "error", *,
        errno: int | str = "EIO", sector_bytes: int = 512, keep: Keep = "none",
    ) -> Rule:
        """Of a write, or of zeroes, only the first sectors are written; then: what becomes of it.

        error: it fails with errno. success: it is answered as if all were well. crash: these sectors are on the medium,
        and the device crashes; keep: see Faults.crash().
        """
        if sectors < 0 or sector_bytes <= 0 or sector_bytes % 512:
            raise UsageError(f"torn after {sectors} sectors of {sector_bytes} bytes: not a number of whole sectors")
        if then not in ("error", "success", "crash"):
            raise UsageError(f"torn, then {then!r}: not error, success or crash")
        return self._meet(Torn(sectors, sector_bytes, then, errno_of(errno), _checked(keep)), _TEARABLE)

    def drop(self) -> Rule:
        """The NBD connection that the request came by is cut; a program gets ConnectionDropped. Not passed on."""
        return self._meet(Drop())

    def crash(self, keep: Keep = "none") -> Rule:
        """The device crashes, and the request with it: see Faults.crash()."""
        return self._meet(Crash(_checked(keep)))

    def flip(self, *bits: int) -> Rule:
        """These bits of what is read or written are flipped, counted from its first byte's lowest; none: one by chance.
        """
        if any(bit < 0 for bit in bits):
            raise UsageError(f"flip of bits {bits}: they are counted from 0")
        return self._meet(Damage(bits or None, 0), _WITH_DATA)

    def corrupt(self, length: int = 512) -> Rule:
        """So many bytes in a row of what is read or written are other than they were."""
        if length <= 0:
            raise UsageError(f"corrupt {length} bytes: there must be at least one")
        return self._meet(Damage(None, length), _WITH_DATA)

    # For Faults

    def decide(self, request: Request) -> Decided | None:
        """Count the request if it matches; return what it meets, or None."""
        if (
            not self._armed
            or request.kind not in self._kinds
            or (self._at is not None and not request.overlaps(*self._at))
            or (self._when is not None and not self._when(request))     # not under the lock: it is the user's
        ):
            return None
        with self._lock:
            self.seen += 1
            if (
                (self._times is not None and self.fired >= self._times)
                or (self._nth and self.seen not in self._nth)
                or (self._every is not None and self.seen % self._every)
            ):
                return None
            self.fired += 1
            return None if self._fate is None else Decided(str(self), self._fate, self._chance)

    def _meet(self, fate: Fate, kinds: frozenset[str] | None = None) -> Rule:
        with self._lock:
            if self._fate is not None:
                raise UsageError(f"rule {str(self)!r} has a fate already: make another rule")
            if kinds is not None:
                if not self._kinds & kinds:
                    raise UsageError(f"{fate} is for {' and '.join(sorted(kinds))} requests, the rule for {self}")
                self._kinds &= kinds
            self._fate = fate
            self.seen = self.fired = 0          # requests may have come since on(): they met no fate
        return self


class Faults:
    """Rules, and what has happened by them. Any thread; over any number of drivers at the same time.

    seed: for all that chance decides. volatile: the devices get a volatile write cache: what is written is seen at
    once, and lost by crash() unless it was flushed, or written with fua.
    """

    def __init__(self, *, seed: int = 0, volatile: bool = False) -> None:
        self.seed = seed
        self.volatile = volatile
        self.lock = threading.Lock()                        # of this and of its rules; a leaf
        self._changed = threading.Condition(self.lock)      # something fired
        self._crashes = Crashes(seed)
        self._began = time.monotonic()
        # Under lock when written.
        self._rules: tuple[Rule, ...] = ()                  # replaced, never changed: read without the lock
        self._made = 0
        self._armed = True
        self._requests: Counter[str] = Counter()
        self._number = 0
        self._log: deque[Happened] = deque(maxlen=_LOG_MAX)

    def __repr__(self) -> str:
        state = "armed" if self._armed else "disarmed"
        crashed = ", crashed" if self.is_crashed else ""
        rules = "".join(f"\n  {rule!r}" for rule in self._rules)
        return f"<Faults seed={self.seed} {state}{crashed}, {self._number} requests, {len(self._rules)} rules>{rules}"

    def over(self, driver: Driver | Device) -> FaultFilter:
        """Return a driver that is the one below with these faults."""
        return FaultFilter(driver, self)

    def on(
        self,
        kinds: str | Iterable[str] | None = None,
        *,
        at: tuple[int, int] | None = None,
        nth: int | Iterable[int] | None = None,
        every: int | None = None,
        times: int | None = None,
        when: Callable[[Request], object] | None = None,
    ) -> Rule:
        """Make a rule; the method that is called on it says what happens.

        kinds: "read", "write", "flush", "trim", "write_zeroes", "cache", "extents", several of them, or None for all.
        at: (start, stop), only requests that touch these bytes. when: only if when(request) is true; called at the
        device's home, it must not block. Of those that match: nth: only the n-th (from 1), or these; every: each n-th;
        times: at most so many.

        A write with fua is one request, with fua=True; trim and write_zeroes with fua are two, with a flush behind.
        """
        numbers = frozenset(() if nth is None else (nth,) if isinstance(nth, int) else nth)
        for name, number in [("nth", n) for n in numbers] + [("every", every), ("times", times)]:
            if number is not None and number < 1:
                raise UsageError(f"{name}={number}: requests are counted from 1")
        if at is not None and not 0 <= at[0] < at[1]:
            raise UsageError(f"at={at}: not a range of bytes (start, stop)")
        with self.lock:
            if len(self._rules) >= _RULES_MAX:
                raise UsageError(f"there are {_RULES_MAX} rules already")
            self._made += 1
            number = self._made
        rule = Rule(self, number, kinds=kinds_of(kinds), at=at, nth=numbers, every=every, times=times, when=when)
        with self.lock:
            self._rules = (*self._rules, rule)
        return rule

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules, in the order in which they are looked at."""
        return self._rules

    def remove(self, rule: Rule) -> None:
        """Forget a rule. What it stalled stays so until it is released."""
        with self.lock:
            self._rules = tuple(other for other in self._rules if other is not rule)

    def clear(self) -> None:
        """Forget all rules, let go what they stall, and recover: the devices are as good as those below."""
        with self.lock:
            rules, self._rules = self._rules, ()
        for rule in rules:
            if isinstance(rule._fate, Stall):
                rule._fate.release()
        self.recover()

    def arm(self) -> None:
        """Undo disarm()."""
        self._armed = True

    def disarm(self) -> None:
        """Let all requests pass, and do not count them for rules, until arm()."""
        self._armed = False

    # Crashes

    @property
    def is_crashed(self) -> bool:
        """Has it crashed, and not recovered?"""
        return self._crashes.is_crashed

    def crash(self, keep: Keep = "none") -> None:
        """Let the devices crash: requests fail with EIO, also those in flight, until recover().

        Of a volatile device's changes that were not flushed, `keep` survive: "none", "random" (each by chance),
        "prefix" (the first of them in the order in which they were answered, as many as chance says), or the first so
        many. Without volatile nothing is lost.
        """
        self._crashes.crash(_checked(keep))

    def recover(self) -> None:
        """Let the devices work again, with what survived."""
        self._crashes.recover()

    # What has happened

    @property
    def log(self) -> tuple[Happened, ...]:
        """The fates that met requests, oldest first; the last 10,000."""
        with self.lock:
            return tuple(self._log)

    def count(self, what: str | Rule | None = None) -> int:
        """How often a rule has fired; how many requests of a kind have come; of all kinds, with None."""
        if isinstance(what, Rule):
            return what.fired
        if what is None:
            return self._number
        if what not in KINDS:
            raise UsageError(f"there are no {what!r} requests, only {', '.join(KINDS)}")
        return self._requests[what]

    def wait_for(self, rule: Rule, timeout: float = WAIT_S, *, times: int = 1) -> None:
        """Wait until the rule has fired so often, since it was made. A thread that serves no loop.

        AssertionError, with what did happen, if it has not within `timeout` seconds.
        """
        check_may_wait("wait_for()")
        with self._changed:
            if self._changed.wait_for(lambda: rule.fired >= times, timeout):
                return
        raise AssertionError(f"{rule!r} has not fired {times} times in {timeout:g} s\n{self!r}")

    # For the filters

    @property
    def crashes(self) -> Crashes:
        return self._crashes

    def decide(self, request: Request) -> list[Decided]:
        """Count a request, and find out what it meets. The home of the device."""
        return list(self._deciding(request))

    def _deciding(self, request: Request) -> Iterator[Decided]:
        with self.lock:
            self._number += 1
            self._requests[request.kind] += 1
            number = self._number
        if not self._armed:
            return
        for rule in self._rules:
            fired = rule.fired
            decided = rule.decide(request)
            if decided is None and rule.fired == fired:
                continue
            with self._changed:
                if decided is not None:
                    at_s = time.monotonic() - self._began
                    self._log.append(Happened(number, request.kind, request.offset, request.length, decided.rule,
                                              str(decided.fate), at_s))
                self._changed.notify_all()
            if decided is not None:
                yield decided
                if decided.ends:
                    return


def _checked(keep: Keep) -> Keep:
    if keep not in ("none", "random", "prefix") and (type(keep) is not int or keep < 0):
        raise UsageError(f"keep={keep!r}: not none, random, prefix or a number of changes")
    return keep
