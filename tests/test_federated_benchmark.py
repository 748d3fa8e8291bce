"""How forecasts and federated runs are scored."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.federated import TARGETS, mean_over, runs, time_to
from benchmarks.lib.federated_tables import buffered_rows, failure_rows, ratio_rows, time_rows
from benchmarks.lib.fixed_forecasts import Rounds, methods, rounds_of, score, tuned
from benchmarks.predictor import compare, forecasts_of, judge, table_of
from fxhybrid.federated.memory.traces import MemoryTrace
from fxhybrid.federated.simulation.trace_generator import MIB, POPULATIONS, generate_fleet


def test_rounds_are_cut_back_to_back() -> None:
    trace = MemoryTrace("d", 100, np.arange(7) * 5.0, np.array([9, 8, 7, 6, 5, 4, 3]), "recorded")
    rounds = rounds_of(trace, 10.0)
    assert rounds.start_s.tolist() == [0.0, 10.0, 20.0]
    assert rounds.now.tolist() == [9.0, 7.0, 5.0]
    assert rounds.minima.tolist() == [8.0, 6.0, 4.0]  # the seventh reading begins a round that is not whole


def test_score_by_hand() -> None:
    found = score(np.array([6.0, 12.0]) * MIB, np.array([8.0, 10.0]) * MIB, 0.05)
    # first: 6 of 8 used, 2 MiB unused cost 0.1; second: missed by 2 MiB, which cost 1.9, nothing used
    assert (found.miss_rate, found.used, found.overshoot_mib) == (0.5, 0.375, 2.0)
    assert found.pinball_mib == pytest.approx((0.1 + 1.9) / 2)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
def test_every_fixed_method_reaches_the_miss_rate_in_hindsight(share: float) -> None:
    readings = np.random.default_rng(0).uniform(0.3, 1.0, (1000, 4)) * MIB
    fleet = [Rounds(MIB, np.arange(1000.0), readings)]
    minima = fleet[0].minima
    for name, method in methods(fleet).items():
        reached = float((minima < method(tuned(method, minima, share))).mean())
        assert share - 0.005 <= reached <= share, name
        grid = [float(method(s).sum()) for s in np.linspace(0, 1, 21)]
        assert grid == sorted(grid), f"{name}: a larger parameter must be bolder"


def test_a_forecast_knows_nothing_of_its_own_round() -> None:
    trace = generate_fleet(POPULATIONS["steady"], 1, 0, duration_s=3600.0)[0]
    rounds = rounds_of(trace, 60.0)
    changed = Rounds(rounds.total_bytes, rounds.start_s, rounds.readings.copy())
    changed.readings[30, 1:] = 1.0  # after the start of round 30
    before, after = forecasts_of(rounds, 60.0), forecasts_of(changed, 60.0)
    assert before[:31].tolist() == after[:31].tolist()
    assert after[31] < before[31]


def test_a_comparison_has_what_tables_and_checks_need() -> None:
    fleet = [rounds_of(t, 60.0) for t in generate_fleet(POPULATIONS["calm"], 2, 0, duration_s=3600.0)]
    record = {"model": "calm", "part": "predictor", "key": "0/60", "round_s": 60, **compare(fleet, 60.0)}
    assert table_of([record]).row_count == 1
    assert {check.name for check in judge([record])} >= {"missed at most", "missed at least", "memory used"}


def test_times_to_targets_are_those_of_three_evaluations() -> None:
    clock_s, accuracies = [60.0, 120.0, 180.0, 240.0], [0.9, 0.0, 0.6, 0.9]
    assert time_to(clock_s, accuracies, 0.5) == 180  # (0.9 + 0 + 0.6) / 3; the first two evaluations alone do not count
    assert time_to(clock_s, accuracies, 0.6) is None
    # nothing for a minute, then 0.9, 0, 0.6 for a minute each, and 0.9 for the last of five
    assert mean_over(clock_s, accuracies, 300.0) == pytest.approx((0.9 + 0.0 + 0.6 + 0.9) / 5)
    assert mean_over(clock_s, accuracies, 150.0) == pytest.approx((60 * 0.9 + 30 * 0.0) / 150)


def test_rows_say_who_never_got_there() -> None:
    def record(policy: str, seed: int, minutes: list[int | None], hours: float = 2.0) -> dict[str, object]:
        reached_s = [None if m is None else 60 * m for m in minutes]
        models = dict.fromkeys(("at-once", "heartbeat", "deadline"), reached_s)
        shared = {"task": "phones", "cell": "few-skewed", "policy": policy, "seed": seed, "hours": hours}
        return {**shared, "reached_s": models, "mean": 0.5, "end": 0.9, "outcomes": {"ok": 9, "oom": 1, "unused": 5}}

    assert len(TARGETS) == 6
    records = [
        record("fxhybrid", 0, [10, 20, 30, 40, 60, None]),
        record("fxhybrid", 1, [10, 20, 30, 40, 60, 60]),
        record("random", 0, [20, 60, None, None, None, None], hours=4.0),
        record("random", 1, [10, 60, 90, None, None, None], hours=4.0),
    ]
    ours, theirs = time_rows(records)
    assert ours[:2] == ("phones-few-skewed", "`fxhybrid`")
    assert ours[7:] == ("60 (1 of 2)", "50.0", "90.0", "10.0%")  # one death of ten answers; who was not used is none
    assert theirs[4:6] == ("90 (1 of 2)", "never")
    ratios = next(iter(ratio_rows(records)))
    assert ratios[2:4] == ("1.5 (1.0, 2.0)", "3.0 (3.0, 3.0)")
    assert ratios[4] == "> 5.5 (3.0, 8.0)"  # 90 / 30, and at least 240 / 30
    assert ratios[7] == "> 4.0, 1 of 2"
    assert next(iter(failure_rows(records)))[2:] == ("40", "40", "40", "-")
    records += [record("random-async", seed, [5, None, 45, 48, None, None], hours=4.0) for seed in (0, 1)]
    buffered = next(iter(buffered_rows(records)))
    assert buffered[2:6] == ("3.0 (2.0, 4.0)", "slower", "> 3.7 (2.0, 5.3)", "> 5.0 (5.0, 5.0)")  # 240 / 45, 240 / 48
    records[-1] |= {"reached_s": {"heartbeat": [None] * 6}}
    # never within 240 minutes, against 10; and against 90
    assert next(iter(buffered_rows(records)))[2::2] == (
        "< 2.0 (0.0, 4.0)",
        "~ 2.9 (0.4, 5.3)",
        "never",
        "0.0 (0.0, 0.0)",
    )


def test_every_population_is_run_by_every_policy() -> None:
    found = list(runs())
    assert len(set(found)) == len(found) == 2 * 3 * (6 * 8 + 2)  # fleets, seeds, cells by policies, two that swap
