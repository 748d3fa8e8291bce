"""The memory forecast: history at every scale, the promised rate, cold start, misses, and readings of a machine."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxhybrid.errors import FxHybridError, InvalidArgument
from fxhybrid.federated import MemoryBudgetPredictor
from fxhybrid.federated.history import CAPACITY, ReadingHistory
from fxhybrid.federated.predictor import SETBACK, pinball
from fxhybrid.federated.readings import MemoryReading, read_memory

MIB = 1 << 20
KIB = 1024


def play(predictor: MemoryBudgetPredictor, rounds: list[list[float]], round_s: float = 60.0) -> list[bool]:
    """Forecasts every round from what came before; gives which were missed."""
    missed = []
    for i, readings in enumerate(rounds):
        times = [i * round_s + j * round_s / len(readings) for j in range(len(readings))]
        predictor.observe("d", times[0], readings[0])
        forecast = predictor.predict("d", now_s=times[0], horizon_s=round_s)
        for t_s, reading in zip(times[1:], readings[1:], strict=True):
            predictor.observe("d", t_s, reading)
        missed.append(min(readings) < forecast)
    return missed


# --- history


@given(
    readings=st.lists(st.integers(0, 10**9), min_size=2, max_size=120),
    horizon_s=st.sampled_from([30.0, 60.0, 110.0, 200.0]),
)
@settings(max_examples=60, deadline=None)
def test_windows_hold_the_true_minima(readings: list[int], horizon_s: float) -> None:
    history = ReadingHistory()
    for i, reading in enumerate(readings):
        history.observe(5.0 * i, float(reading))
    windows = history.windows(horizon_s)
    # a stretch starts at a reading and covers the horizon and at most half of it more (blocks of up to an eighth
    # of it, or single readings), so it must be found among the stretches cut from the readings directly
    widths = range(math.ceil(horizon_s / 5), math.ceil(1.5 * horizon_s / 5) + 1)
    cut = {(readings[i], min(readings[i : i + w])) for w in widths for i in range(len(readings) - w + 1)}
    assert {(int(s), int(m)) for s, m in zip(windows.starts, windows.minima, strict=True)} <= cut
    assert np.all(windows.trailing <= windows.starts)


def test_history_stays_small_and_reaches_far_back() -> None:
    history = ReadingHistory()
    for i in range(6 * CAPACITY):
        history.observe(5.0 * i, 7.0)
    state = history.to_state()
    assert max(len(level["closed"][0]) for level in state["levels"]) <= CAPACITY
    # half an hour: blocks of 160 s (the widest under 225 s), 12 to a stretch; 6 * 1024 * 5 s hold 191 closed ones
    assert history.windows(1800.0).independent == pytest.approx(191 / 12, abs=1.5)


def test_stretches_that_a_device_was_silent_in_are_no_evidence() -> None:
    history = ReadingHistory()
    for t_s in [*range(0, 300, 5), *range(3000, 3300, 5)]:
        history.observe(float(t_s), 100.0 if t_s < 300 else 10.0)
    # the gap of 2,700 s must not join the two: no stretch of 60 s sees both values
    windows = history.windows(60.0)
    assert set(zip(windows.starts.tolist(), windows.minima.tolist(), strict=True)) == {(100.0, 100.0), (10.0, 10.0)}


def test_rare_readings_are_looked_at_over_longer_blocks() -> None:
    history = ReadingHistory()
    for i in range(200):
        history.observe(60.0 * i, 100.0 if i % 2 else 50.0)
    # one reading a minute: a stretch of a minute must reach the next reading, or every fall would go unseen
    windows = history.windows(60.0)
    assert len(windows.starts) > 20
    assert np.mean(windows.minima[windows.starts == 100.0] == 50.0) > 0.9


def test_trailing_minimum_sees_the_blocks_that_are_still_open() -> None:
    history = ReadingHistory()
    for t_s, reading in ((0.0, 9.0), (100.0, 5.0), (301.0, 7.0), (302.0, 3.0), (303.0, 8.0)):
        history.observe(t_s, reading)
    assert history.trailing_minimum(290.0) == 3.0
    assert history.trailing_minimum(0.0) == 3.0


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
    # ~59 stretches side by side: caution is 1 - 0.5 / 60^2
    assert predictor.predict("d", now_s=3600.0, horizon_s=60.0) == pytest.approx(
        800 * MIB * (1 - 0.5 / 60**2), rel=1e-4
    )


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
    assert predictor.predict("new", now_s=0.0, horizon_s=60.0) == 500 * MIB


def test_overhead_is_subtracted_and_never_makes_it_negative() -> None:
    predictor = MemoryBudgetPredictor(overhead_bytes=200 * MIB)
    predictor.observe("a", 0.0, 1000.0 * MIB)
    predictor.observe("b", 0.0, 100.0 * MIB)
    assert predictor.predict("a", now_s=0.0, horizon_s=60.0) == 300 * MIB  # half of the reading, less 200
    assert predictor.predict("b", now_s=0.0, horizon_s=60.0) == 0


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


def test_a_device_that_reports_between_rounds_only_is_judged_by_its_next_reading() -> None:
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


# --- readings of a machine


def machine(
    root: Path, *, cgroup: str = "0::/\n", status: str = "RssAnon: 300 kB\nRssShmem: 100 kB\nVmRSS: 900 kB\n"
) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    (root / "proc/self/status").write_text(f"Name:\tpython\n{status}")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, limit: str, usage: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def test_own_anonymous_pages_are_added_back(tmp_path: Path) -> None:
    # 5000 kB available + 300 anonymous + 100 shared of our own; the other 500 resident are file pages
    assert read_memory(root=machine(tmp_path)) == MemoryReading(5400 * KIB, 400 * KIB, 8000 * KIB)


def test_old_kernels_give_only_the_whole_resident_set(tmp_path: Path) -> None:
    assert read_memory(root=machine(tmp_path, status="VmRSS: 900 kB\n")).available_bytes == 5900 * KIB


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/pod/train\n")
    group(root / "sys/fs/cgroup/pod/train", "max", 900 * KIB)
    group(root / "sys/fs/cgroup/pod", str(2000 * KIB), 1500 * KIB, f"inactive_file {200 * KIB}\nanon 7\n")
    # 2000 - (1500 used - 200 reclaimable) = 700 left, + 400 of our own
    assert read_memory(root=root) == MemoryReading(1100 * KIB, 400 * KIB, 2000 * KIB)


def test_cgroup_version_1(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="7:cpu:/x\n5:memory:/docker/abc\n")
    folder = root / "sys/fs/cgroup/memory"  # inside a container the path does not exist, the mount is the group
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(3000 * KIB))
    (folder / "memory.usage_in_bytes").write_text(str(1000 * KIB))
    (folder / "memory.stat").write_text(f"total_inactive_file {100 * KIB}\ninactive_file 0\n")
    assert read_memory(root=root).available_bytes == (3000 - 900 + 400) * KIB


def test_no_proc_is_said(tmp_path: Path) -> None:
    with pytest.raises(FxHybridError, match="only be read on Linux"):
        read_memory(root=tmp_path)


def test_this_machine_can_be_read() -> None:
    reading = read_memory()
    assert 0 < reading.own_bytes < reading.available_bytes <= reading.total_bytes


def test_own_memory_does_not_lower_the_reading(tmp_path: Path) -> None:
    before = read_memory()
    block = np.ones(256 * MIB, dtype=np.uint8)
    after = read_memory()
    assert after.own_bytes - before.own_bytes > 0.9 * block.nbytes
    assert before.available_bytes - after.available_bytes < 0.5 * block.nbytes


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_devices_that_are_not_there(device: str) -> None:
    torch = pytest.importorskip("torch")
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InvalidArgument, match=device):
        read_memory(device)


def test_cuda_adds_back_what_the_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(device: str) -> tuple[int, int]:
        assert device == "cuda:1"
        return 600, 1000

    cuda = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=mem_get_info,
        memory_reserved=lambda device: 250 if device == "cuda:1" else 0,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert read_memory("cuda:1") == MemoryReading(850, 250, 1000)
