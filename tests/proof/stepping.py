"""Runs every interleaving of a few threads of REAL code: a scheduler that lets one of them go at a time.

Why this and not a Promela model checked with spin: a model proves the model. The protocols here are a dozen lines of
Python each, and what breaks them is an edit of those lines; a check that runs the lines themselves sees the edit, needs
no second text that must be kept equal, and runs in the suite. What it gives up is size: the models must be small.

Threads switch only at points:
  - a substituted lock is about to be acquired (StepLock, StepRLock: put in place of core's locks);
  - a thread waits for a condition (Stepping.until): where the code would sleep in the kernel;
  - each line of the functions named in `lines` (sys.settrace): for code that looks without a lock, and for mutants
    from which the lock was taken away.
Code between two points touches shared state under a lock only, or not at all; then more points would show no more:
what one thread does behind a release and before its next acquire, nobody can tell from doing it before the release
(Lipton's reduction). Where code does look without a lock, its lines are points.

A lock with a time-out is a choice of two: the grant, or, where it is not to be had now, the end of the time. So every
time-out happens at every moment. A deadlock is when no thread can go on; a hang of the real program is this here.

explore() goes through the tree of choices depth first: it replays a prefix of choices and takes the first possibility
from there on, until there is no untried one left.
"""

from __future__ import annotations

import dis
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

RUN_STEPS_MAX = 2_000           # of one interleaving: beyond it something goes round for ever
REAL_LIMIT_S = 20.0             # for a thread to come to its next point

Ready = Callable[[], object]


class Broken(AssertionError):
    """An interleaving that went wrong; the text has its steps."""


class Aborted(BaseException):
    """Ends the threads of a run that went wrong already."""


class _Stepped:
    """One thread of a run."""

    def __init__(self, number: int, name: str, fn: Callable[[], object]) -> None:
        self.number = number
        self.name = name
        self.fn = fn
        self.go = threading.Semaphore(0)
        self.ready: Ready | None = None         # None: it can go on
        self.begun = False
        self.done = False


class Stepping:
    """One run: the threads, the choices made so far, the steps taken."""

    current: Stepping | None = None             # the run under way; there is one at a time

    def __init__(self, script: list[int], lines: Iterable[Callable[..., Any]] = ()) -> None:
        self.script = script
        self.taken: list[tuple[int, int]] = []  # (choice, possibilities)
        self.steps: list[tuple[int, str]] = []
        self.threads: list[_Stepped] = []
        self.failure = ""
        self.error: BaseException | None = None
        self.aborted = False
        self.clock = 0.0                        # for models with time: each time-out moves it
        self.cleanups: list[Callable[[], object]] = []      # of the model: called whatever came out
        self._by_ident: dict[int, _Stepped] = {}
        self._ended = threading.Event()
        self._codes = {fn.__code__ for fn in lines}
        self._real: list[threading.Thread] = []

    # -- for models --------------------------------------------------------------------------------------

    def thread(self, name: str, fn: Callable[[], object]) -> None:
        """Add a thread; also while the run is under way."""
        stepped = _Stepped(len(self.threads), name, fn)
        self.threads.append(stepped)
        real = threading.Thread(target=self._main, args=(stepped,), name=name, daemon=True)
        self._real.append(real)
        real.start()

    def until(self, label: str, ready: Ready) -> None:
        """A point at which the thread waits until ready()."""
        self.point(label, ready)
        if self.aborted:
            raise Aborted

    def point(self, label: str, ready: Ready | None = None) -> None:
        """Here another thread may go on. Nothing in threads that are not stepped."""
        stepped = self._by_ident.get(threading.get_ident())
        if stepped is None or self.aborted:
            return
        self.steps.append((stepped.number, label))
        if len(self.steps) > RUN_STEPS_MAX:
            self._abort(f"no end after {RUN_STEPS_MAX} steps")
            return
        stepped.ready = ready
        self._next(stepped)
        stepped.ready = None

    # -- inside ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Let all threads run to their end, in the order of the script."""
        self._next(None)
        if not self._ended.wait(REAL_LIMIT_S):
            self.failure = self.failure or "a thread did not come to its next point: it blocks in something real"
            self.aborted = True
        for real in self._real:
            real.join(REAL_LIMIT_S)

    def _main(self, stepped: _Stepped) -> None:
        self._by_ident[threading.get_ident()] = stepped
        stepped.go.acquire()
        if self._codes:
            sys.settrace(self._trace)
        try:
            if not self.aborted:
                stepped.fn()
        except Aborted:
            pass
        except BaseException as exc:
            self.error = self.error or exc
            self._abort(f"{stepped.name} raised {type(exc).__name__}: {exc}")
        finally:
            sys.settrace(None)
        stepped.done = True
        if not self.aborted:
            self._next(stepped)
        if all(other.done for other in self.threads):
            self._ended.set()

    def _next(self, here: _Stepped | None) -> None:
        """Choose who goes on; return when `here` does (at once, if it has ended)."""
        able = [other for other in self.threads if not other.done and (other.ready is None or other.ready())]
        if here in able:                        # the first possibility is no switch: cheap, and easy to read
            able.remove(here)
            able.insert(0, here)
        if not able:
            if not all(other.done for other in self.threads):
                self._abort("nobody can go on")
            return
        fresh = [other for other in able if not other.begun]
        if fresh:
            able = fresh[:1]                    # what comes before its first point is nobody else's business
            able[0].begun = True
        depth = len(self.taken)
        choice = self.script[depth] if depth < len(self.script) else 0
        if len(able) > 1:
            self.taken.append((choice, len(able)))
        else:
            choice = 0
        chosen = able[choice]
        if chosen is here:
            return
        chosen.go.release()
        if here is not None and not here.done:
            here.go.acquire()

    def _abort(self, why: str) -> None:
        if self.aborted:
            return
        stood = [f"{t.name} {'ended' if t.done else 'waits' if t.ready else 'could go on'}" for t in self.threads]
        self.failure = f"{why} ({', '.join(stood)})"
        self.aborted = True                     # from here on all run freely to their end
        for other in self.threads:
            other.go.release()

    def _trace(self, frame: Any, event: str, _arg: Any) -> Any:
        if frame.f_code not in self._codes:
            return None
        if event == "line":
            self.point(f"{frame.f_code.co_name}:{frame.f_lineno}")
        return self._trace

    def drawing(self) -> str:
        """The steps in columns, one for each thread."""
        width = 34
        heads = "".join(f"{stepped.name:{width}}" for stepped in self.threads)
        lines = [f"{' ' * (width * number)}{label}" for number, label in self.steps]
        return "\n".join([heads, *lines])


def _run() -> Stepping:
    run = Stepping.current
    assert run is not None, "a stepped lock is used outside explore()"
    return run


class StepLock:
    """Stands in for threading.Lock. A time-out may end at any moment."""

    name = "lock"

    def __init__(self) -> None:
        self.owner = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        run = _run()
        may_fail = not blocking or timeout >= 0
        run.point(f"acquire {self.name}", None if may_fail else lambda: not self.owner)
        if self.owner and not run.aborted:
            assert may_fail, "a thread without steps would block"
            run.clock += max(timeout, 0.0)
            return False
        self.owner = threading.get_ident()
        return True

    def release(self) -> None:
        if not self.owner:
            raise RuntimeError("release unlocked lock")
        self.owner = 0

    def locked(self) -> bool:
        return self.owner != 0

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_exc: object) -> None:
        self.release()


class StepRLock(StepLock):
    """Stands in for threading.RLock."""

    name = "mutex"

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self.owner != threading.get_ident():
            super().acquire(blocking, timeout)
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            super().release()


def explore(
    model: Callable[[Stepping], Callable[[], None]],
    *,
    lines: Iterable[Callable[..., Any]] = (),
    runs_max: int = 20_000,
) -> int:
    """Run every interleaving of a model; return how many there are. Broken at the first that goes wrong.

    model(run) makes fresh objects, adds threads, and returns the check of what they leave.
    """
    script: list[int] = []
    runs = 0
    lines = tuple(lines)
    while True:
        run = Stepping.current = Stepping(script, lines)
        try:
            check = model(run)
            run.run()
            if not run.failure:
                try:
                    check()
                except AssertionError as exc:
                    run.failure = f"at the end: {exc}"
                    run.error = exc
            for cleanup in run.cleanups:
                cleanup()
        finally:
            Stepping.current = None
        runs += 1
        if run.failure:
            raise Broken(f"interleaving {runs}: {run.failure}\n{run.drawing()}") from run.error
        assert runs < runs_max, f"more than {runs_max} interleavings: make the model smaller"
        taken = run.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return runs
        script = [choice for choice, _ in taken]
        script[-1] += 1


def mutated(fn: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """The function with one piece of its text replaced: what a careless edit would leave."""
    source = textwrap.dedent(inspect.getsource(fn))
    count = source.count(old)
    assert count == 1, f"{old!r} stands {count} times in {fn.__qualname__}: the mutant is out of date"
    text = "from __future__ import annotations\n" + source.replace(old, new)
    made: dict[str, Any] = {}
    exec(compile(text, f"<mutant of {fn.__name__}>", "exec"), fn.__globals__, made)
    mutant: Callable[..., Any] = made[fn.__name__]
    assert list(dis.get_instructions(mutant)) != list(dis.get_instructions(fn))
    return mutant


# What the tests of a protocol say


Check = Callable[[], None]
Model = Callable[[Stepping], Check]


def finds(model: Model, lines: Iterable[Callable[..., Any]] = ()) -> None:
    """Some interleaving goes wrong."""
    with pytest.raises(Broken) as broken:
        explore(model, lines=lines)
    print(broken.value)


def passes(model: Model, at_least: int, lines: Iterable[Callable[..., Any]] = ()) -> None:
    """No interleaving goes wrong, and there are as many as there should be: else the points are gone."""
    count = explore(model, lines=lines)
    print(count, "interleavings")
    assert count >= at_least


class Critical:
    """What a lock is for: nobody enters while another is inside."""

    def __init__(self, run: Stepping) -> None:
        self._run = run
        self._inside = 0
        self.entered = 0

    def enter(self) -> None:
        assert not self._inside, "two have the lock"
        self._inside += 1
        self._run.point("inside")
        self._inside -= 1
        self.entered += 1
