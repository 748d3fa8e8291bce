"""The memory forecast: the promised rate, cold start, misses, and what a restart keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated import MemoryBudgetPredictor
from fxhybrid.federated.memory.predictor import SETBACK, pinball

MIB = 1 << 20


def play(predictor: MemoryBudgetPredictor, rounds: list[list[float]], round_s: float = 60.0) -> list[bool]:
    """Forecasts every round from what came before; returns which were missed."""
    missed = []
    for i, readings in enumerate(rounds):
        times = [i * round_s + j * round_s / len(readings) for j in range(len(readings))]
        predictor.observe("d", times[0], readings[0])
        forecast = predictor.predict("d", now_s=times[0], horizon_s=round_s)
        for t_s, reading in zip(times[1:], readings[1:], strict=True):
            predictor.observe("d", t_s, reading)
        missed.append(min(readings) < forecast)
    return missed


# --- the promise


def noise(random: np.random.Generator) -> list[list[float]]:
    return [list(1e9 * random.uniform(0.2, 1.0, 4)) for _ in range(500)]


def regime_changes(random: np.random.Generator) -> list[list[float]]:
    level = np.repeat(random.uniform(0.2, 1.0, 10), 50)
    return [list(1e9 * own * random.uniform(0.7, 1.0, 4)) for own in level]


def random_walk(random: np.random.Generator) -> list[list[float]]:
    walk = np.exp(np.cumsum(random.normal(0, 0.05, 2000)).clip(-3, 3))
    return (1e9 * walk.reshape(500, 4)).tolist()  # type: ignore[no-any-return]


def rare_falls(random: np.random.Generator) -> list[list[float]]:
    return [
        [1e9, 1e9 * random.uniform(0.99, 1.0), 1e9 * (random.uniform(0.2, 1) ** (random.random() < 0.08))] * 2
        for _ in range(500)
    ]


def growing_trouble(random: np.random.Generator) -> list[list[float]]:
    return [[1e9, 1e9 * random.uniform(1 - (i + 1) / 600, 1.0)] for i in range(500)]


@pytest.mark.parametrize("process", [noise, regime_changes, random_walk, rare_falls, growing_trouble])
@pytest.mark.parametrize("miss_rate", [0.05, 0.1])
def test_the_promised_rate_holds_for_processes_it_was_not_made_for(
    process: Callable[[np.random.Generator], list[list[float]]], miss_rate: float
) -> None:
    missed = play(MemoryBudgetPredictor(miss_rate), process(np.random.default_rng(5)))
    # 500 rounds; |rate - promise| <= (way of the level) / (gain * rounds), and the level
    # seldom moves by more than 0.125 here: 0.125 / (0.01 * 500) = 0.025
    assert abs(np.mean(missed) - miss_rate) <= 0.025


def test_memory_that_never_moves_is_used_almost_whole_and_never_missed() -> None:
    predictor = MemoryBudgetPredictor()
    missed = play(predictor, [[800.0 * MIB] * 6] * 60)
    assert not any(missed)
    predictor.observe("d", 3600.0, 800.0 * MIB)
    assert predictor.predict("d", now_s=3600.0, horizon_s=60.0) == 800 * MIB


def test_a_longer_round_gets_less() -> None:
    random = np.random.default_rng(1)
    predictor = MemoryBudgetPredictor()
    for i in range(4000):
        predictor.observe("d", 5.0 * i, 1e9 * (0.3 if random.random() < 0.01 else 0.9))
    predictor.observe("d", 20_000.0, 0.9e9)
    forecasts = [predictor.predict("d", now_s=20_000.0 + i, horizon_s=h) for i, h in enumerate((5.0, 60.0, 600.0))]
    # a fall comes once in 500 s: 1 % of the 5 s rounds see one, 11 % of those of a minute, most of ten minutes
    assert forecasts[0] > 0.85e9
    assert forecasts[1] < 0.31e9
    assert forecasts[2] <= forecasts[1]


# --- cold start, overhead, misses


def test_cold_start_is_careful_and_never_above_the_reading() -> None:
    predictor = MemoryBudgetPredictor()
    assert predictor.predict("new", now_s=0.0, horizon_s=60.0) == 0
    predictor.observe("new", 0.0, 1000.0 * MIB)
    assert predictor.predict("new", now_s=0.0, horizon_s=60.0) == 400 * MIB  # COLD_SHARE


def test_overhead_is_subtracted_and_never_makes_it_negative() -> None:
    predictor = MemoryBudgetPredictor(overhead_bytes=200 * MIB)
    predictor.observe("a", 0.0, 1000.0 * MIB)
    predictor.observe("b", 0.0, 100.0 * MIB)
    assert predictor.predict("a", now_s=0.0, horizon_s=60.0) == 200 * MIB  # 0.4 of the reading, less 200
    assert predictor.predict("b", now_s=0.0, horizon_s=60.0) == 0


def fallen(n_rounds: int) -> list[list[float]]:
    """Rounds of which every fourth ends at a quarter of what it begins with."""
    return [[1000.0 * MIB] * 5 + [(250.0 if i % 4 == 3 else 1000.0) * MIB] for i in range(n_rounds)]


def test_a_new_device_gets_what_others_kept() -> None:
    predictor = MemoryBudgetPredictor()
    play(predictor, fallen(200))
    predictor.observe("new", 0.0, 800.0 * MIB)
    # a quarter of all outcomes, so that the level near 1 in 20 is among them, kept 0.25 of the reading
    assert predictor.predict("new", now_s=0.0, horizon_s=60.0) == pytest.approx(0.25 * 800 * MIB)


def test_few_outcomes_count_by_their_number() -> None:
    predictor = MemoryBudgetPredictor()
    play(predictor, [[1000.0 * MIB] * 6] * 6)
    predictor.observe("new", 0.0, 1000.0 * MIB)
    # the last of 6 rounds is still open: 5 of 20 outcomes kept everything, for the others stands COLD_SHARE
    assert predictor.predict("new", now_s=0.0, horizon_s=60.0) == (5 * 1000 + 15 * 400) // 20 * MIB


def test_a_short_past_counts_by_its_length() -> None:
    predictor = MemoryBudgetPredictor()
    play(predictor, fallen(200))
    for i in range(6 * 5 + 1):
        predictor.observe("new", 10.0 * i, 1000.0 * MIB)
    found = predictor.predict("new", now_s=300.0, horizon_s=60.0)
    # about 4 stretches of its own, in which nothing fell, against 1 / 0.05 = 20 in which a quarter was left
    n = predictor._devices["new"].history.windows(60.0).independent
    assert 3 < n < 5
    assert found == pytest.approx((n * 1000 + 20 * 250) / (n + 20) * MIB, rel=1e-6)


def test_the_fleets_level_learns_from_forecasts_that_it_took_part_in() -> None:
    predictor = steady()
    levels = [predictor.to_state()["fleet"]["level"]]
    for i in range(2):
        predictor.observe("new", 10_000.0 * i, 1000.0 * MIB)  # so far apart that no stretch lies between them
        predictor.predict("new", now_s=10_000.0 * i, horizon_s=60.0)
        predictor.observe("new", 10_000.0 * i + 70.0, 10.0 * MIB * (i == 0) + 1000.0 * MIB * (i == 1))
        levels.append(predictor.to_state()["fleet"]["level"])
    # nothing of its own: the whole step, 0.01 * 0.95 down and 0.01 * 0.05 up
    assert np.diff(levels) == pytest.approx([-0.0095, 0.0005])


def steady(n_rounds: int = 40) -> MemoryBudgetPredictor:
    predictor = MemoryBudgetPredictor()
    play(predictor, [[1000.0 * MIB] * 6] * n_rounds)
    predictor.observe("d", n_rounds * 60.0, 1000.0 * MIB)
    return predictor


def test_an_unexplained_death_shrinks_at_once_and_recovers_slowly() -> None:
    predictor = steady()
    before = predictor.predict("d", now_s=2400.0, horizon_s=60.0)
    predictor.report_miss("d", 2430.0)
    after = predictor.predict("d", now_s=2431.0, horizon_s=60.0)
    assert after == pytest.approx(SETBACK * before, rel=0.01)
    later = []
    for i in range(41, 61):
        predictor.observe("d", 60.0 * i, 1000.0 * MIB)
        later.append(predictor.predict("d", now_s=60.0 * i, horizon_s=60.0))
        for j in range(1, 6):
            predictor.observe("d", 60.0 * i + 10 * j, 1000.0 * MIB)
    assert later == sorted(later)
    assert later[2] < 0.9 * before  # three forecasts came true since: 0.8 / 0.97^3 = 0.88
    assert later[-1] > 0.98 * before


def test_a_device_that_dies_every_time_is_asked_for_nothing_in_the_end() -> None:
    predictor = steady()
    now_s, forecast = 2400.0, 1
    for _ in range(100):
        forecast = predictor.predict("d", now_s=now_s, horizon_s=60.0)
        predictor.report_miss("d", now_s + 30)
        now_s += 60
        predictor.observe("d", now_s, 1000.0 * MIB)
    assert forecast < 1 * MIB  # 0.8^100 of 1000 MiB


def test_a_death_is_counted_once() -> None:
    reported, seen = steady(), steady()
    for predictor in (reported, seen):
        predictor.predict("d", now_s=2400.0, horizon_s=60.0)
        predictor.observe("d", 2420.0, 300.0 * MIB)
    reported.report_miss("d", 2425.0)  # the readings explain it: no setback on top
    for predictor in (reported, seen):
        predictor.observe("d", 2500.0, 1000.0 * MIB)
    assert reported.to_state()["devices"]["d"]["level"] == seen.to_state()["devices"]["d"]["level"]
    assert reported.to_state()["devices"]["d"]["setback"] == 1.0


def test_silence_is_no_success() -> None:
    predictor = steady()
    level = predictor.to_state()["devices"]["d"]["level"]
    predictor.predict("d", now_s=2400.0, horizon_s=60.0)
    predictor.observe("d", 9000.0, 1000.0 * MIB)  # nothing was heard during the round
    assert predictor.to_state()["devices"]["d"]["level"] == level


def test_a_device_that_reports_between_rounds_only_is_measured_by_its_next_reading() -> None:
    predictor = steady()
    levels = [predictor.to_state()["devices"]["d"]["level"]]
    for t_s, reading in ((2460.0, 1000.0 * MIB), (2520.0, 10.0 * MIB)):
        predictor.predict("d", now_s=t_s - 60, horizon_s=60.0)
        predictor.observe("d", t_s, reading)
        levels.append(predictor.to_state()["devices"]["d"]["level"])
    # a hit moves the level by 0.01 * 0.05 up, a miss by 0.01 * 0.95 down
    assert np.diff(levels) == pytest.approx([0.0005, -0.0095])


def test_devices_do_not_touch_each_other() -> None:
    alone, crowd = MemoryBudgetPredictor(), MemoryBudgetPredictor()
    rounds = noise(np.random.default_rng(3))[:40]
    crowd.observe("other", 0.0, 1.0)
    crowd.report_miss("other", 1.0)
    assert play(alone, rounds) == play(crowd, rounds)
    assert alone.to_state()["devices"]["d"] == crowd.to_state()["devices"]["d"]


def test_a_restored_predictor_goes_on_bit_exactly() -> None:
    rounds = noise(np.random.default_rng(3))[:60]
    whole, first = MemoryBudgetPredictor(), MemoryBudgetPredictor()
    play(whole, rounds)
    play(first, rounds[:25])
    second = MemoryBudgetPredictor.from_state(json.loads(json.dumps(first.to_state())))
    for i, readings in enumerate(rounds[25:], start=25):
        second.observe("d", i * 60.0, readings[0])
        second.predict("d", now_s=i * 60.0, horizon_s=60.0)
        for j, reading in enumerate(readings[1:], start=1):
            second.observe("d", i * 60.0 + j * 15.0, reading)
    assert second.to_state() == whole.to_state()


def test_late_readings_are_left_out() -> None:
    predictor = steady()
    before = predictor.to_state()
    predictor.observe("d", 100.0, 1.0)
    assert predictor.to_state() == before


@pytest.mark.parametrize("reading", [-1.0, math.nan, math.inf])
def test_what_is_no_reading_is_refused(reading: float) -> None:
    with pytest.raises(InvalidArgument, match="not a reading"):
        MemoryBudgetPredictor().observe("d", 0.0, reading)


def test_parameters_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="miss_rate"):
        MemoryBudgetPredictor(0.0)
    with pytest.raises(InvalidArgument, match="overhead_bytes"):
        MemoryBudgetPredictor(overhead_bytes=-1)
    with pytest.raises(InvalidArgument, match="horizon"):
        MemoryBudgetPredictor().predict("d", now_s=0.0, horizon_s=0.0)


def test_pinball_loss() -> None:
    # 10 bytes unused cost 0.05 each, 10 too many 0.95 each
    assert pinball(np.array([10.0, -10.0]), 0.05).tolist() == pytest.approx([0.5, 9.5])
