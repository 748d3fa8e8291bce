"""Forecasts with one fixed parameter, tuned in hindsight: what the memory predictor is compared with.

Every method gives, for a parameter in [0, 1], one forecast per round; larger is bolder. ``tuned`` finds the parameter
at which the method misses as often as asked on the very rounds it is tested on, over all devices together. No method
that must choose before the rounds can do this; so it is an upper bound for its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fxhybrid.federated.memory.predictor import pinball
from fxhybrid.federated.memory.traces import MemoryTrace
from fxhybrid.federated.simulation.trace_generator import MIB

Floats = NDArray[np.float64]
Method = Callable[[float], Floats]
TRAILING_ROUNDS = (1, 4, 16, 64)
QUANTILE_ROUNDS = 50
GRID = np.linspace(0.0, 1.0, 101)
_MOST_READINGS = 500  # a plain quantile of more readings is the same number
_BISECTIONS = 20
_SMALLEST = 0.1


@dataclass(frozen=True)
class Rounds:
    """Holds back-to-back rounds of one device; arrays have one entry per round, ``readings`` (rounds, per round)."""

    total_bytes: int
    start_s: Floats
    readings: Floats

    @property
    def now(self) -> Floats:
        """Returns the reading at the start."""
        return np.asarray(self.readings[:, 0])

    @property
    def minima(self) -> Floats:
        """Returns the lowest reading of the round, its start included."""
        return np.asarray(self.readings.min(axis=1))


def rounds_of(trace: MemoryTrace, round_s: float) -> Rounds:
    """Cuts a trace with evenly spaced readings into rounds."""
    interval_s = float(trace.t_s[1] - trace.t_s[0])
    per_round = round(round_s / interval_s)
    n = len(trace.t_s) // per_round
    readings = trace.available_bytes[: n * per_round].astype(np.float64).reshape(n, per_round)
    return Rounds(trace.total_bytes, trace.t_s[: n * per_round : per_round], readings)


@dataclass(frozen=True)
class Score:
    """Says how good forecasts were.

    Attributes:
        miss_rate: share of rounds whose minimum lay under the forecast.
        used: mean over rounds of forecast / minimum; a missed round counts 0, as its work is lost.
        pinball_mib: mean pinball loss at the promised miss rate.
        overshoot_mib: mean of forecast - minimum over the missed rounds; 0 without any.
    """

    miss_rate: float
    used: float
    pinball_mib: float
    overshoot_mib: float


def score(forecasts: Floats, minima: Floats, promised: float) -> Score:
    """Judges one forecast per round."""
    missed = minima < forecasts
    over = (forecasts - minima)[missed]
    return Score(
        float(missed.mean()),
        float(np.where(missed, 0.0, forecasts / np.maximum(minima, 1.0)).mean()),
        float(pinball(minima - forecasts, promised).mean()) / MIB,
        float(over.mean()) / MIB if over.size else 0.0,
    )


def methods(fleet: Sequence[Rounds]) -> dict[str, Method]:
    """Makes every fixed method over the rounds of all devices, one after another; ``/n`` is over the last n rounds."""
    now = np.concatenate([rounds.now for rounds in fleet])
    total = np.concatenate([np.full(len(rounds.now), float(rounds.total_bytes)) for rounds in fleet])
    found: dict[str, Method] = {
        "share of reading": lambda s: s * now,
        "reading - margin": lambda s: np.maximum(now - (1 - s) * total, 0.0),
    }
    for width in TRAILING_ROUNDS:
        trailing = np.concatenate([_trailing(rounds, width) for rounds in fleet])
        found[f"share of min/{width}"] = partial(_multiple, trailing, now)
    for name, sample in (("minima", _minima_before), ("readings", _readings_before)):
        table = np.concatenate([_quantiles(rounds, sample) for rounds in fleet])
        found[f"quantile of {name}/{QUANTILE_ROUNDS}"] = partial(_at, np.minimum(table, now[:, None]))
    return found


def tuned(method: Method, minima: Floats, miss_rate: float) -> float:
    """Finds the boldest parameter at which the method misses at most ``miss_rate`` of the rounds."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float((minima < method(middle)).mean()) > miss_rate:
            high = middle
        else:
            low = middle
    return low


def _trailing(rounds: Rounds, width: int) -> Floats:
    padded = np.concatenate([np.full(width, np.inf), rounds.minima[:-1]])
    return np.minimum(sliding_window_view(padded, width).min(axis=1), rounds.now)


def _minima_before(rounds: Rounds, first: int, index: int) -> Floats:
    return rounds.minima[first:index]


def _readings_before(rounds: Rounds, first: int, index: int) -> Floats:
    readings = rounds.readings[first:index].ravel()
    return readings[:: max(1, len(readings) // _MOST_READINGS)]


def _quantiles(rounds: Rounds, sample: Callable[[Rounds, int, int], Floats]) -> Floats:
    """Computes each round's quantiles at ``GRID`` of a sample of those before; half the reading for the first."""
    table = np.full((len(rounds.now), len(GRID)), 0.5 * rounds.now[0])
    for index in range(1, len(rounds.now)):
        table[index] = np.quantile(sample(rounds, max(0, index - QUANTILE_ROUNDS), index), GRID)
    return table


def _multiple(trailing: Floats, now: Floats, parameter: float) -> Floats:
    """Takes up to twice the trailing minimum, which alone may be more careful than asked."""
    return np.minimum(2 * parameter * trailing, now)


def _at(table: Floats, parameter: float) -> Floats:
    """Takes a quantile, for the lowest parameters a share of the smallest: so that every miss rate can be reached."""
    if parameter < _SMALLEST:
        return table[:, 0] * (parameter / _SMALLEST)
    position = (parameter - _SMALLEST) / (1 - _SMALLEST) * (len(GRID) - 1)
    below = min(int(position), len(GRID) - 2)
    return table[:, below] + (position - below) * (table[:, below + 1] - table[:, below])
