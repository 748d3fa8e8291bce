"""How much memory a device will still have at the worst moment of a coming round.

A round dies if available memory falls under the plan's peak once. So the forecast is a lower quantile of the MINIMUM
over the round, and it must be missed in ``miss_rate`` of all rounds, whatever the process is.

    share_i    = minimum_i / reference_i             over past stretches of the round's length
    own        = reference_now * quantile(share, level)
    level     += GAIN * (miss_rate - missed)         after every round

The last line is adaptive conformal inference (Gibbs and Candes, 2021): it holds the rate without a model of the
process. The reference is the reading now; or the lowest reading over one horizon before, or nothing (the plain
quantile of minima), where that has clearly the lower pinball loss on the same past.

The least of n independent stretches is undercut in one round of n + 1: a short past cannot tell what happens in
``miss_rate`` of all rounds. So what all devices met since their forecasts fills in for it, as 1 / miss_rate stretches:

    weight     = n / (n + 1 / miss_rate)
    fleet      = reading_now * quantile(lowest reading / reading at the start, fleet's level)
    forecast   = weight * own + (1 - weight) * min(own, fleet)

Why this and not another: docs/adr/0007-memory-forecast.md.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.memory.history import ReadingHistory, Windows

GAIN = 0.01
COLD_SHARE = 0.4  # of the reading, where no forecast of any device has had an outcome
FLEET_OUTCOMES = 400  # the last of all devices that are kept
SWITCH = 0.9  # another reference must have at most this share of the pinball loss
SETBACK, RECOVERY = 0.8, 0.97  # after an out-of-memory reply that the readings do not explain
_BEYOND_WORST = 4.0  # a level under zero asks for less than the worst seen, and at -1/4 for nothing
_HIGHEST_LEVEL = 4.0  # times the miss rate, where memory never moves

_Floats = NDArray[np.float64]


@dataclass
class _Forecast:
    """Holds a forecast whose outcome is still open; ``low_bytes`` is the lowest reading since, inf before the first."""

    start_s: float
    end_s: float
    available_bytes: float
    reading_bytes: float
    weight: float  # of the device's own past
    low_bytes: float = math.inf
    last_s: float = -math.inf
    missed: bool = False


@dataclass
class _Device:
    level: float
    history: ReadingHistory = field(default_factory=ReadingHistory)
    open_forecasts: list[_Forecast] = field(default_factory=list)
    setback: float = 1.0


@dataclass
class _Fleet:
    """Holds what all devices met since their forecasts: lowest readings as shares of the readings at the start."""

    level: float
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=FLEET_OUTCOMES))

    def share(self, least: float) -> float:
        """Computes the share of a reading that is left; fewer outcomes than ``least`` count by their number."""
        if not self.shares:
            return COLD_SHARE
        known = min(len(self.shares) / least, 1.0)
        return known * _quantile(np.array(self.shares), self.level) + (1 - known) * COLD_SHARE


class MemoryBudgetPredictor:
    """Forecasts the memory that a device will have throughout a coming stretch of time.

    Every device has its own history and its own quantile level; one of which little is known is forecast from what
    all devices met. Readings should come from the whole round, not only from its start: a device sends what it has
    recorded since its last message. Times are seconds of one clock per device; they rise.

    Args:
        miss_rate: share of forecasts that may turn out too high.
        overhead_bytes: what runtime and transport take; subtracted from every forecast.
    """

    def __init__(self, miss_rate: float = 0.05, *, overhead_bytes: int = 0) -> None:
        if not 0 < miss_rate < 0.5:
            raise InvalidArgument(f"miss_rate must lie between 0 and 0.5, got {miss_rate!r}")
        if overhead_bytes < 0:
            raise InvalidArgument(f"overhead_bytes cannot be negative, got {overhead_bytes!r}")
        self.miss_rate = miss_rate
        self.overhead_bytes = overhead_bytes
        self._devices: dict[str, _Device] = {}
        self._fleet = _Fleet(miss_rate)

    def observe(self, device: str, t_s: float, available_bytes: float) -> None:
        """Takes a reading and closes the forecasts whose time is over; one older than the last is left out."""
        if not (math.isfinite(t_s) and math.isfinite(available_bytes) and available_bytes >= 0):
            raise InvalidArgument(f"{device}: not a reading: {available_bytes!r} bytes at {t_s!r} s")
        own = self._device(device)
        if t_s < own.history.last_s:
            return
        own.history.observe(t_s, available_bytes)
        for forecast in own.open_forecasts:
            # a device that reports only between rounds: the next reading must do, unless it comes long after
            alone = forecast.last_s <= forecast.start_s and t_s < 2 * forecast.end_s - forecast.start_s
            if t_s < forecast.end_s or alone:
                forecast.low_bytes = min(forecast.low_bytes, available_bytes)
                forecast.last_s = t_s
        if any(forecast.end_s <= t_s for forecast in own.open_forecasts):
            self._close_forecasts(own, t_s)

    def predict(self, device: str, *, now_s: float, horizon_s: float) -> int:
        """Forecasts the bytes that a step may take from ``now_s`` to ``now_s + horizon_s``; 0 for an unknown device.

        The forecast counts towards the device's miss rate. One that is repeated for the same start replaces the first.
        """
        if not (math.isfinite(now_s) and math.isfinite(horizon_s) and horizon_s > 0):
            raise InvalidArgument(f"{device}: needs a finite time and a positive horizon, got {now_s!r}, {horizon_s!r}")
        own = self._devices.get(device)
        if own is None or own.history.last_s == -math.inf:
            return 0
        self._close_forecasts(own, now_s)
        past = own.history.windows(horizon_s)
        weight = past.independent / (past.independent + 1 / self.miss_rate)
        reading_bytes = own.history.last_bytes
        bytes_free = fleet_bytes = reading_bytes * self._fleet.share(1 / self.miss_rate)
        if past.independent:
            own_bytes = _forecast(own, past, now_s - horizon_s, self.miss_rate)
            bytes_free = weight * own_bytes + (1 - weight) * min(own_bytes, fleet_bytes)
        bytes_free *= own.setback
        own.open_forecasts = [forecast for forecast in own.open_forecasts if forecast.start_s != now_s]
        own.open_forecasts.append(_Forecast(now_s, now_s + horizon_s, bytes_free, reading_bytes, weight))
        return max(0, int(bytes_free) - self.overhead_bytes)

    def report_miss(self, device: str, t_s: float) -> None:
        """Takes in that the device ran out of memory at ``t_s``.

        Counts as a miss at once. If no reading of that round lies under the forecast, how deep memory fell is unknown:
        then the next forecasts shrink by a fifth and grow back slowly.
        """
        own = self._device(device)
        hit = [f for f in own.open_forecasts if f.start_s <= t_s <= f.end_s and not f.missed]
        if not any(forecast.low_bytes < forecast.available_bytes for forecast in hit):
            own.setback *= SETBACK
        for forecast in hit:
            forecast.missed = True
            self._learn(own, forecast.weight, missed=True)
        if not hit:
            self._learn(own, 1.0, missed=True)

    def _device(self, device: str) -> _Device:
        return self._devices.setdefault(device, _Device(self.miss_rate))

    def _close_forecasts(self, own: _Device, now_s: float) -> None:
        over = [forecast for forecast in own.open_forecasts if forecast.end_s <= now_s]
        own.open_forecasts = [forecast for forecast in own.open_forecasts if forecast.end_s > now_s]
        for forecast in over:
            if forecast.last_s <= forecast.start_s:
                continue  # without a reading after its start it has no outcome: a silent device is not a safe one
            if not forecast.missed:
                self._learn(own, forecast.weight, missed=forecast.low_bytes < forecast.available_bytes)
            self._fleet.shares.append(min(forecast.low_bytes / max(forecast.reading_bytes, 1.0), 1.0))

    def _learn(self, own: _Device, weight: float, *, missed: bool) -> None:
        """Moves both levels, the fleet's by its part in the forecast."""
        own.level = self._moved(own.level, GAIN, missed)
        self._fleet.level = self._moved(self._fleet.level, GAIN * (1 - weight), missed)
        if not missed:
            own.setback = min(1.0, own.setback / RECOVERY)

    def _moved(self, level: float, gain: float, missed: bool) -> float:
        level += gain * (self.miss_rate - missed)
        return min(max(level, -1 / _BEYOND_WORST), _HIGHEST_LEVEL * self.miss_rate)

    def to_state(self) -> dict[str, Any]:
        """Returns everything as JSON values; forecasts go on bit-exactly after :meth:`from_state`."""
        devices = {
            name: {
                "level": own.level,
                "setback": own.setback,
                "history": own.history.to_state(),
                "open_forecasts": [asdict(forecast) for forecast in own.open_forecasts],
            }
            for name, own in self._devices.items()
        }
        fleet = {"level": self._fleet.level, "shares": list(self._fleet.shares)}
        own = {"miss_rate": self.miss_rate, "overhead_bytes": self.overhead_bytes}
        return {**own, "devices": devices, "fleet": fleet}

    @staticmethod
    def from_state(state: dict[str, Any]) -> MemoryBudgetPredictor:
        """Restores the predictor that gave ``state``."""
        predictor = MemoryBudgetPredictor(state["miss_rate"], overhead_bytes=state["overhead_bytes"])
        predictor._fleet.level = state["fleet"]["level"]
        predictor._fleet.shares.extend(state["fleet"]["shares"])
        for name, saved in state["devices"].items():
            predictor._devices[name] = _Device(
                saved["level"],
                ReadingHistory.from_state(saved["history"]),
                [_Forecast(**forecast) for forecast in saved["open_forecasts"]],
                saved["setback"],
            )
        return predictor


def _forecast(own: _Device, past: Windows, since_s: float, miss_rate: float) -> float:
    """Forecasts the available bytes at the quantile level of the device; never above its last reading."""
    reference, shares = _reference(past, own.history, since_s, miss_rate)
    return min(reference * _quantile(shares, own.level), own.history.last_bytes)


def _reference(past: Windows, history: ReadingHistory, since_s: float, miss_rate: float) -> tuple[float, _Floats]:
    """Chooses the reference; returns its value now, and the past minima as shares of its value then."""
    now = max(history.last_bytes, 1.0)
    ones = np.ones_like(past.starts)
    choices = [
        (now, past.starts, 1.0),
        (max(history.trailing_minimum(since_s), 1.0), past.trailing, 1 / SWITCH),
        (1.0, ones, 1 / SWITCH),
    ]
    best = None
    for at_present, at_past, handicap in choices:
        shares = past.minima / np.maximum(at_past, 1.0)
        error = past.minima - at_past * _quantile(shares, miss_rate)
        # per byte of the reading, as stretches with much memory would outvote the others
        loss = handicap * float(np.mean(pinball(error, miss_rate) / np.maximum(past.starts, 1.0)))
        if best is None or loss < best[0]:
            best = loss, at_present, shares
    assert best is not None
    return best[1], best[2]


def _quantile(shares: _Floats, level: float) -> float:
    """Computes the quantile at ``level``, half-way between ranks; under level 0 less than the smallest."""
    if level <= 0:
        return float(shares.min()) * max(0.0, 1 + _BEYOND_WORST * level)
    rank = min(max(level * len(shares) - 0.5, 0.0), len(shares) - 1.0)
    below = int(rank)
    above = min(below + 1, len(shares) - 1)
    low, high = np.partition(shares, (below, above))[[below, above]]
    return float(low + (rank - below) * (high - low))


def pinball(error: _Floats, miss_rate: float) -> _Floats:
    """Computes the pinball loss of ``minimum - forecast``: 1 - miss_rate a byte too much, miss_rate a byte unused."""
    return np.where(error < 0, (miss_rate - 1) * error, miss_rate * error)
