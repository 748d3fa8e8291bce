"""Readings kept at every time scale: past stretches of any length, and the lowest of late."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxhybrid.federated.memory.history import CAPACITY, ReadingHistory


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
