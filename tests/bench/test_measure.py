"""bench.measure: interleaving, calibration, missing contenders, ratios; and that every in-process row runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from bench import rows_call, rows_loop, rows_run, rows_sync, rows_wake
from bench.measure import (
    MICROSECONDS,
    PER_SECOND,
    Contender,
    Figures,
    Missing,
    Opening,
    Plan,
    Row,
    calibrate,
    judge,
    measure,
    mib_per_second,
)

PEERS = {"uvloop", "anyio", "asgiref", "aiologic", "culsans", "janus"}


def taking(seconds: float, log: list[str], name: str) -> Opening:
    """A contender that takes `seconds` for each operation, and writes down when it is asked."""

    @contextlib.contextmanager
    def opening() -> Iterator[object]:
        def round_(count: int) -> float:
            log.append(name)
            return seconds * count

        log.append(f"open {name}")
        yield round_
        log.append(f"close {name}")

    return opening  # type: ignore[return-value]


@contextlib.contextmanager
def not_here() -> Iterator[object]:
    raise Missing("it is not installed")
    yield


def test_rounds_are_interleaved_and_turned() -> None:
    log: list[str] = []
    row = Row(
        name="r", unit=MICROSECONDS, count=1, targets={},
        contenders=[Contender(name=name, open=taking(1e-6, log, name)) for name in "abc"],
    )
    measure(row, Plan(rounds=1, round_s=1.0, program_rounds=3))
    assert log == [
        "open a", "open b", "open c",
        "a", "b", "c", "b", "c", "a", "c", "a", "b",
        "close c", "close b", "close a",
    ]


@pytest.mark.parametrize("per_operation_s", [1e-7, 1e-3, 0.5])
def test_calibrate_fills_the_round(per_operation_s: float) -> None:
    count = calibrate(lambda count: count * per_operation_s, 0.08)
    assert count == max(1, round(0.08 / per_operation_s))


def test_missing_is_named_and_the_others_are_measured() -> None:
    log: list[str] = []
    row = Row(
        name="r", unit=MICROSECONDS, targets={"gone": 2.0, "slow": 3.0},
        contenders=[
            Contender(name="ours", open=taking(1e-6, log, "ours"), ours=True),
            Contender(name="gone", open=not_here),  # type: ignore[arg-type]
            Contender(name="slow", open=taking(4e-6, log, "slow")),
        ],
    )
    result = measure(row, Plan(rounds=7, round_s=0.001, program_rounds=1))
    assert result.missing == {"gone": "it is not installed"}
    assert result.figures["ours"].median == pytest.approx(1.0)
    assert len(result.figures["slow"].values) == 7
    [ratio] = result.ratios
    assert (ratio.against, ratio.passed) == ("slow", True)
    assert ratio.value == pytest.approx(4.0)


def test_contender_that_fails_in_a_round_is_out_and_the_others_go_on() -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def failing() -> Iterator[object]:
        rounds = iter([0.5])
        yield lambda count: next(rounds)

    row = Row(
        name="r", unit=MICROSECONDS, count=1, targets={"fails": 1.0},
        contenders=[
            Contender(name="ours", open=taking(1e-6, log, "ours"), ours=True),
            Contender(name="fails", open=failing),  # type: ignore[arg-type]
        ],
    )
    result = measure(row, Plan(rounds=1, round_s=0.001, program_rounds=4))
    assert result.missing == {"fails": "failed: StopIteration: "}
    assert len(result.figures["ours"].values) == 4
    assert result.figures.keys() == {"ours"}
    assert not result.ratios


def test_ratio_above_one_is_ours_also_where_higher_is_better() -> None:
    row = Row(
        name="r", unit=PER_SECOND, targets={"b": 1.5},
        contenders=[Contender(name="a", open=not_here, ours=True), Contender(name="b", open=not_here)],  # type: ignore[arg-type]
    )
    [ratio] = judge(row, {"a": Figures(values=[120.0]), "b": Figures(values=[100.0])})
    assert ratio.value == pytest.approx(1.2)
    assert ratio.passed is False


def test_units() -> None:
    assert MICROSECONDS.from_seconds(2e-6) == pytest.approx(2.0)
    assert PER_SECOND.from_seconds(0.25) == 4.0
    assert mib_per_second(64 << 20).from_seconds(0.5) == 128.0


def test_quartiles() -> None:
    assert Figures(values=[3.0]).quartiles == (3.0, 3.0)
    figures = Figures(values=[5.0, 1.0, 2.0, 4.0, 3.0])
    assert (figures.median, figures.quartiles) == (3.0, (2.0, 4.0))


IN_PROCESS = [*rows_call.rows(), *rows_wake.rows(), *rows_run.rows(), *rows_loop.rows(), *rows_sync.rows()]


@pytest.mark.parametrize("row", IN_PROCESS, ids=lambda row: row.name)
def test_row_runs(row: Row) -> None:
    """A benchmark that nobody runs rots: each row once, as short as it gets."""
    result = measure(row, Plan(rounds=1, round_s=0.001, program_rounds=1))
    assert result.missing.keys() <= PEERS
    assert "homeloop" in result.figures
    assert {contender.name for contender in row.contenders} - PEERS <= result.figures.keys()
