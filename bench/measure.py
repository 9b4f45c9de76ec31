"""What is measured and how: rows, contenders, interleaved rounds, medians with spread.

Nothing here knows a library or a program: a contender brings a context manager that opens it and yields a
round.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

# A round does `count` operations and returns the seconds that they took: it times itself, so that its own
# preparations do not count.
Round = Callable[[int], float]
Opening = Callable[[], AbstractContextManager[Round]]

T = TypeVar("T")
CALIBRATE_COUNT_MAX = 1 << 24


class Missing(Exception):
    """This contender cannot run here; the text says what is not installed or refused to start."""


class Better(Enum):
    """Which way a figure is good."""

    LOWER = "lower"
    HIGHER = "higher"


@dataclass(frozen=True, slots=True)
class Unit:
    """How seconds per operation become the figure that is shown."""

    name: str
    better: Better
    from_seconds: Callable[[float], float]


MICROSECONDS = Unit("µs", Better.LOWER, lambda seconds: seconds * 1e6)
PER_SECOND = Unit("per s", Better.HIGHER, lambda seconds: 1 / seconds)


def mib_per_second(total_bytes: int) -> Unit:
    return Unit("MiB/s", Better.HIGHER, lambda seconds: total_bytes / seconds / 2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to do the job of a row. `ours`: judged against the row's targets."""

    name: str
    open: Opening
    ours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One job. `targets`: the ratio that ours must reach against each of these contenders.

    `count`: operations in a round; None: as many as fill the round's time (found once per contender).
    """

    name: str
    unit: Unit
    contenders: Sequence[Contender]
    targets: Mapping[str, float]
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure. Rows with a fixed count (whole programs) have rounds of their own."""

    rounds: int
    round_s: float
    program_rounds: int


@dataclass(slots=True, kw_only=True)
class Figures:
    """What one contender reached, one value per round, in the row's unit."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times better `ours` is than `against`; target None: shown, not judged."""

    ours: str
    against: str
    value: float
    target: float | None

    @property
    def passed(self) -> bool | None:
        return None if self.target is None else self.value >= self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """A measured row: figures by contender, the missing ones with the reason, and the ratios."""

    name: str
    unit: str
    better: Better
    figures: Mapping[str, Figures]
    missing: Mapping[str, str]
    ratios: Sequence[Ratio]


def measure(row: Row, plan: Plan) -> RowResult:
    """Open all contenders of a row, interleave their rounds, close them, judge.

    All are open at once, because a round of each follows a round of the others: an idle loop thread sleeps
    and costs nothing. The order turns by one from round to round.
    """
    missing: dict[str, str] = {}
    figures: dict[str, Figures] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[Round, int]] = {}
        for contender in row.contenders:
            with noting(missing, contender.name):
                round_ = stack.enter_context(contender.open())
                running[contender.name] = (round_, row.count or calibrate(round_, plan.round_s))
                figures[contender.name] = Figures()
        for number in range(plan.rounds if row.count is None else plan.program_rounds):
            for name in turned([name for name in running if name not in missing], number):
                round_, count = running[name]
                gc.collect()            # nobody pays for the garbage of the one before
                with noting(missing, name):
                    figures[name].values.append(row.unit.from_seconds(round_(count) / count))
    figures = {name: reached for name, reached in figures.items() if name not in missing}
    return RowResult(
        name=row.name,
        unit=row.unit.name,
        better=row.unit.better,
        figures=figures,
        missing=missing,
        ratios=judge(row, figures),
    )


@contextlib.contextmanager
def noting(missing: dict[str, str], name: str) -> Iterator[None]:
    """A contender that fails is out of its row, with the reason; the others, and the other rows, go on."""
    try:
        yield
    except Missing as error:
        missing[name] = str(error)
    except Exception as error:
        missing[name] = f"failed: {type(error).__name__}: {error}"


def calibrate(round_: Round, round_s: float) -> int:
    """The count that fills `round_s`. Doubling until it is half full is the warm-up, too.

    Of two rounds the faster counts: where threads hand each other the GIL one round of a few operations can take
    as long as a thousand, and a count found by it would measure nothing else.
    """
    count = 1
    while (seconds := min(round_(count), round_(count))) < round_s / 2 and count < CALIBRATE_COUNT_MAX:
        count *= 2
    return max(1, round(count * round_s / seconds))


def turned(items: Sequence[T], by: int) -> list[T]:
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def judge(row: Row, figures: Mapping[str, Figures]) -> list[Ratio]:
    ratios = []
    for ours in row.contenders:
        if not ours.ours or ours.name not in figures:
            continue
        for other in row.contenders:
            if other.ours or other.name not in figures:
                continue
            our, their = figures[ours.name].median, figures[other.name].median
            value = their / our if row.unit.better is Better.LOWER else our / their
            target = row.targets.get(other.name)
            ratios.append(Ratio(ours=ours.name, against=other.name, value=value, target=target))
    return ratios
