"""Generates traces of available memory.

No public trace of the memory available on phones over time is known to us, so a generator takes its place. It is a
model, not data. A device is

    available = total - operating system (slow drift, jitter) - running apps - foreground burst

Apps switch on and off; a session's footprint and stay are log-normal. Bursts are short allocations by whatever is in
the foreground (camera, a page load). Where available memory falls under the kill floor, the low-memory killer ends
apps, those started longest ago first, and what starts then gets no more than there is. At a habit shift the device's
apps get new footprints and new rates.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.memory.traces import MemoryTrace

MIB = 1 << 20
_DRIFT_STEP_S = 60.0


@dataclass(frozen=True)
class Population:
    """Describes the habits that devices are drawn from; durations and footprints are medians of log-normal laws.

    Attributes:
        total_mib: choices of physical memory, drawn evenly.
        os_share: of the total that the operating system keeps.
        n_apps: apps per device.
        footprint_share: of the total that an app takes; ``footprint_sigma`` is its log-spread.
        stay_s: how long a session lasts; ``stay_sigma`` is its log-spread.
        pause_s: mean time between sessions of one app (exponential).
        bursts_per_hour: foreground bursts; ``burst_share`` of the total each, for ``burst_s``.
        kill_floor_share: of the total that the low-memory killer keeps free.
        shift_every_s: mean time between habit shifts; inf for none.
    """

    total_mib: tuple[int, ...] = (2048, 3072, 4096, 6144, 8192)
    os_share: float = 0.28
    n_apps: int = 10
    footprint_share: float = 0.06
    footprint_sigma: float = 0.6
    stay_s: float = 600.0
    stay_sigma: float = 1.2
    pause_s: float = 3600.0
    bursts_per_hour: float = 6.0
    burst_share: float = 0.05
    burst_s: float = 20.0
    kill_floor_share: float = 0.06
    shift_every_s: float = math.inf


POPULATIONS = {
    "steady": Population(),
    "shifting": Population(shift_every_s=8 * 3600.0),
    "bursty": Population(bursts_per_hour=40.0, burst_share=0.08, stay_s=240.0, pause_s=1500.0),
    "crowded": Population(n_apps=16, footprint_share=0.08, pause_s=1800.0, total_mib=(2048, 3072, 4096)),
    "restless": Population(
        n_apps=8, footprint_share=0.1, footprint_sigma=1.0, stay_s=1200.0, bursts_per_hour=15.0, shift_every_s=3600.0
    ),
    "calm": Population(n_apps=5, stay_s=3600.0, pause_s=6 * 3600.0, bursts_per_hour=1.0),
}


def generate_trace(
    population: Population, seed: int, *, duration_s: float, interval_s: float = 5.0, device: str | None = None
) -> MemoryTrace:
    """Generates one device drawn from ``population``: the same seed gives the same trace."""
    if not (duration_s > 0 and interval_s > 0):
        raise InvalidArgument("duration_s and interval_s must be positive")
    random = np.random.default_rng(seed)
    total_bytes = int(random.choice(population.total_mib)) * MIB
    t_s = np.arange(0.0, duration_s, interval_s)
    system = _system_bytes(population, total_bytes, t_s, random)
    times, levels = _Usage(population, total_bytes, float(system.max()), random).run(duration_s)
    used = system + levels[np.searchsorted(times, t_s, side="right") - 1]
    available = np.maximum(total_bytes - used, 0).astype(np.int64)
    return MemoryTrace(device or f"device-{seed}", total_bytes, t_s, available, "generated", {"seed": seed})


def _system_bytes(
    population: Population, total_bytes: int, t_s: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.float64]:
    """Draws the operating system's share: a mean-reverting drift (time constant one hour) and a reading's jitter."""
    base = population.os_share * random.uniform(0.85, 1.15)
    n_steps = int(t_s[-1] / _DRIFT_STEP_S) + 2
    keep = math.exp(-_DRIFT_STEP_S / 3600.0)
    level, drift = 0.0, []
    for shock in random.normal(0.0, 0.012 * math.sqrt(1 - keep**2), n_steps):
        drift.append(level)
        level = keep * level + float(shock)
    smooth = np.interp(t_s, np.arange(n_steps) * _DRIFT_STEP_S, drift)
    return total_bytes * (base + smooth + random.normal(0.0, 0.001, len(t_s)))


@dataclass(frozen=True)
class _Habit:
    """Holds one app's usual footprint, and the mean time between its sessions."""

    footprint_bytes: float
    pause_s: float


class _Usage:
    """Simulates what apps and bursts hold together, event by event."""

    SHIFT, BURST = -1, -2  # in place of an app's number

    def __init__(
        self, population: Population, total_bytes: int, system_bytes: float, random: np.random.Generator
    ) -> None:
        self.population, self.random = population, random
        self.total_bytes, self.system_bytes = total_bytes, system_bytes
        self.running: dict[tuple[int, int], float] = {}  # (app or BURST, number of its session) -> bytes, oldest first
        self.events: list[tuple[float, int, int]] = []  # (time, app, session that ends or 0)
        self.sessions = 0

    def run(self, duration_s: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Runs all events; returns a step function: times, and the bytes held from each on."""
        self._shift_habits()
        for app, habit in enumerate(self.habits):
            stay_s = self.population.stay_s
            runs = self.random.random() < stay_s / (stay_s + habit.pause_s)
            self._push(0.0 if runs else self._wait(habit.pause_s), app)
        self._push(self._wait(self.burst_every_s), self.BURST)
        self._push(self._wait(self.population.shift_every_s), self.SHIFT)
        times, levels = [0.0], [0.0]
        while self.events and self.events[0][0] < duration_s:
            self._step(*heapq.heappop(self.events))
            times.append(self.now_s)
            levels.append(sum(self.running.values()))
        return np.array(times), np.array(levels)

    def _step(self, now_s: float, app: int, ends: int) -> None:
        self.now_s = now_s
        if app == self.SHIFT:
            self._shift_habits()
            self._push(now_s + self._wait(self.population.shift_every_s), self.SHIFT)
        elif ends:
            self._end(app, ends)
        else:
            self._begin(app)

    def _shift_habits(self) -> None:
        population, random = self.population, self.random
        activity = random.lognormal(0.0, 0.4)
        footprints = population.footprint_share * random.lognormal(0.0, population.footprint_sigma, population.n_apps)
        pauses = population.pause_s * random.lognormal(0.0, 0.6, population.n_apps) / activity
        self.habits = [_Habit(float(f) * self.total_bytes, float(p)) for f, p in zip(footprints, pauses, strict=True)]
        self.burst_every_s = 3600.0 / (population.bursts_per_hour * activity)

    def _begin(self, app: int) -> None:
        population, random = self.population, self.random
        self.sessions += 1
        if app == self.BURST:
            size = population.burst_share * self.total_bytes * float(random.lognormal(0.0, 0.5))
            stay_s = population.burst_s * float(random.lognormal(0.0, 0.7))
            self._push(self.now_s + self._wait(self.burst_every_s), self.BURST)
        else:
            size = self.habits[app].footprint_bytes * float(random.lognormal(0.0, 0.3))
            stay_s = population.stay_s * float(random.lognormal(0.0, population.stay_sigma))
        self.running[app, self.sessions] = size
        self._push(self.now_s + stay_s, app, self.sessions)
        self._make_room((app, self.sessions))

    def _end(self, app: int, session: int) -> None:
        if self.running.pop((app, session), None) is not None and app != self.BURST:
            self._push(self.now_s + self._wait(self.habits[app].pause_s), app)

    def _make_room(self, newest: tuple[int, int]) -> None:
        """Acts as the low-memory killer does: how deep memory falls before it acts differs from time to time."""
        floor = self.population.kill_floor_share * self.total_bytes * float(self.random.lognormal(0.0, 0.25))
        room = max(self.total_bytes - self.system_bytes - floor, 0.0)
        for key in list(self.running):
            if sum(self.running.values()) <= room:
                return
            if key != newest and key[0] != self.BURST:
                self._end(*key)
        others = sum(self.running.values()) - self.running[newest]
        self.running[newest] = min(self.running[newest], max(room - others, 0.0))  # it gets no more than there is

    def _wait(self, mean_s: float) -> float:
        return math.inf if math.isinf(mean_s) else float(self.random.exponential(mean_s))

    def _push(self, time_s: float, app: int, ends: int = 0) -> None:
        heapq.heappush(self.events, (time_s, app, ends))


def generate_fleet(
    population: Population, n_devices: int, seed: int, *, duration_s: float, interval_s: float = 5.0
) -> list[MemoryTrace]:
    """Generates traces of ``n_devices`` devices; fleets of different seeds share none."""
    seeds = np.random.SeedSequence(seed).generate_state(n_devices, dtype=np.uint64)
    traces = (
        generate_trace(population, int(own), duration_s=duration_s, interval_s=interval_s, device=f"device-{i}")
        for i, own in enumerate(seeds)
    )
    return [replace(trace, details={**trace.details, "fleet_seed": seed}) for trace in traces]
