"""Memory traces: what the generator promises, the file format, and the recorder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.memory.recorder import main, record_trace
from fxhybrid.federated.memory.traces import MemoryTrace
from fxhybrid.federated.simulation.trace_generator import POPULATIONS, Population, generate_fleet, generate_trace
from fxhybrid.profiling.system_memory import MemoryReading

HOUR_S = 3600.0


@given(name=st.sampled_from(sorted(POPULATIONS)), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_memory_stays_between_nothing_and_what_the_system_leaves(name: str, seed: int) -> None:
    population = POPULATIONS[name]
    trace = generate_trace(population, seed, duration_s=6 * HOUR_S)
    assert trace.available_bytes.min() >= 0
    # the system keeps at least 0.85 of its share, drift and jitter (sd 1.2 % and 0.1 % of the total) aside
    assert trace.available_bytes.max() <= trace.total_bytes * (1 - 0.85 * population.os_share + 0.06)
    assert len(trace.t_s) == 6 * 720


def test_the_same_seed_gives_the_same_trace_and_another_does_not() -> None:
    one, same, other = (generate_trace(Population(), seed, duration_s=HOUR_S) for seed in (1, 1, 2))
    assert np.array_equal(one.available_bytes, same.available_bytes)
    assert not np.array_equal(one.available_bytes, other.available_bytes)


def test_fleets_of_different_seeds_share_no_device() -> None:
    fleets = [generate_fleet(Population(), 5, seed, duration_s=600.0) for seed in (1, 2)]
    seeds = [{trace.details["seed"] for trace in fleet} for fleet in fleets]
    assert len(seeds[0]) == 5
    assert not seeds[0] & seeds[1]


def test_the_low_memory_killer_keeps_the_floor() -> None:
    greedy = Population(n_apps=40, footprint_share=0.1, pause_s=60.0, kill_floor_share=0.1)
    trace = generate_trace(greedy, 3, duration_s=8 * HOUR_S)
    share = trace.available_bytes / trace.total_bytes
    # demand is far above memory, so it stands near the floor: 0.1 by a log-normal factor (sd 0.25), plus the highest
    # minus the present bytes of the system
    assert np.quantile(share, 0.002) > 0.1 * np.exp(-3.5 * 0.25)
    assert np.median(share) < 0.3


def test_without_apps_only_drift_and_jitter_are_left() -> None:
    quiet = Population(n_apps=0, bursts_per_hour=1e-9)
    share = generate_trace(quiet, 3, duration_s=24 * HOUR_S)
    assert np.std(share.available_bytes / share.total_bytes) < 0.03


def test_bursts_are_short() -> None:
    quiet = Population(n_apps=0, bursts_per_hour=6.0, burst_share=0.2)
    trace = generate_trace(quiet, 3, duration_s=48 * HOUR_S, interval_s=1.0)
    low = trace.available_bytes < np.median(trace.available_bytes) - 0.1 * trace.total_bytes
    n_bursts = int(np.sum(np.diff(low.astype(int)) == 1))
    assert n_bursts > 50
    # mean of a log-normal with median 20 s and sigma 0.7: 20 * exp(0.245) = 25.6 s
    assert low.sum() / n_bursts == pytest.approx(25.6, rel=0.35)


def test_habits_shift() -> None:
    # with endless sessions memory only moves when apps start; a shift changes what they take
    steady = [generate_trace(POPULATIONS["steady"], s, duration_s=96 * HOUR_S) for s in range(12)]
    shifting = [
        generate_trace(replace(POPULATIONS["steady"], shift_every_s=8 * HOUR_S), s, duration_s=96 * HOUR_S)
        for s in range(12)
    ]

    def between_days(traces: list[MemoryTrace]) -> float:
        days = [(t.available_bytes / t.total_bytes).reshape(4, -1).mean(axis=1) for t in traces]
        return float(np.mean([day.std() for day in days]))

    assert between_days(shifting) > 1.3 * between_days(steady)


def test_minimum_of_a_stretch() -> None:
    trace = MemoryTrace("d", 100, np.array([0.0, 5.0, 10.0]), np.array([9, 3, 7]), "recorded")
    assert trace.minimum_bytes(0.0, 10.0) == 3
    assert trace.minimum_bytes(10.0, 15.0) == 7
    assert trace.minimum_bytes(11.0, 15.0) is None


# --- file format


def test_files_give_back_what_was_saved(tmp_path: Path) -> None:
    trace = generate_trace(Population(), 4, duration_s=900.0)
    trace.save(tmp_path / "t.jsonl")
    loaded = MemoryTrace.load(tmp_path / "t.jsonl")
    assert loaded.header() == trace.header()
    assert np.array_equal(loaded.t_s, trace.t_s)
    assert np.array_equal(loaded.available_bytes, trace.available_bytes)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    generate_trace(Population(), 4, duration_s=100.0).save(path)
    path.write_text(path.read_text()[:-6])
    assert len(MemoryTrace.load(path).t_s) == 19


@pytest.mark.parametrize("text", ["", "[]\n", '{"format": "other", "version": 1}\n', "no json\n"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InvalidArgument, match=r"t\.jsonl"):
        MemoryTrace.load(tmp_path / "t.jsonl")


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    generate_trace(Population(), 4, duration_s=100.0).save(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:4], *lines[6:]]))
    with pytest.raises(InvalidArgument, match="not a readable memory trace"):
        MemoryTrace.load(path)


@pytest.mark.parametrize(
    ("times", "values"), [([0.0, 0.0], [1, 1]), ([0.0, 1.0], [1]), ([0.0, np.nan], [1, 1]), ([0.0, 1.0], [1, -1])]
)
def test_impossible_traces_are_refused(times: list[float], values: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        MemoryTrace("d", 100, np.array(times), np.array(values), "recorded")


# --- recorder


class FakeClock:
    """Time that passes only by sleeping, and 0.1 s per reading."""

    def __init__(self) -> None:
        self.now = 50.0

    def read(self, device: str) -> MemoryReading:
        self.now += 0.1
        return MemoryReading(int(self.now), 0, 1000)

    def clock(self) -> float:
        return self.now

    def sleep(self, duration: float) -> None:
        self.now += duration


def test_recordings_keep_their_pace_and_load_as_traces(tmp_path: Path) -> None:
    fake = FakeClock()
    path = tmp_path / "r.jsonl"
    taken = record_trace(
        path, interval_s=5.0, n_readings=4, name="pi", read=fake.read, clock=fake.clock, sleep=fake.sleep
    )
    trace = MemoryTrace.load(path)
    assert taken == 4
    assert (trace.device, trace.total_bytes, trace.source) == ("pi", 1000, "recorded")
    # the first reading stands at 0; the others are due at 5, 10, 15 and are stamped when read, 0.1 s later: no drift
    assert trace.t_s.tolist() == pytest.approx([0.0, 5.1, 10.1, 15.1])
    assert trace.available_bytes.tolist() == [50, 55, 60, 65]


def test_ctrl_c_ends_a_recording_that_can_be_read(tmp_path: Path) -> None:
    fake = FakeClock()

    def interrupt(duration: float) -> None:
        fake.sleep(duration)
        if fake.now > 60:
            raise KeyboardInterrupt

    assert record_trace(tmp_path / "r.jsonl", read=fake.read, clock=fake.clock, sleep=interrupt) == 2
    assert len(MemoryTrace.load(tmp_path / "r.jsonl").t_s) == 2


def test_the_command_records_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    main([str(path), "--interval", "0.01", "--duration", "0.02"])
    assert "3 readings" in capsys.readouterr().out
    assert json.loads(path.read_text().splitlines()[0])["source"] == "recorded"
    with pytest.raises(SystemExit):
        main([str(path)])
    assert "exists" in capsys.readouterr().err
