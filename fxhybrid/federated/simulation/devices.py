"""Simulated devices: real training in this process, on the clock and in the memory of another device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.client.trainer import LocalWork, TrainerPool, training_payload
from fxhybrid.federated.memory.forecast import UNLIMITED_BYTES
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request, failed, n_bytes
from fxhybrid.federated.tasks.data import ClientData
from fxhybrid.ir.plan import Plan

READING_INTERVAL_S = 30.0
MOST_READINGS = 20


@dataclass(frozen=True, eq=False)
class SimulatedMemory:
    """Holds the bytes that training may take, over time; the series repeats itself.

    Attributes:
        interval_s: between two values.
        available_bytes: the values.
    """

    interval_s: float
    available_bytes: NDArray[np.int64]

    def at(self, t_s: float) -> int:
        """Returns the value at a time."""
        return int(self.available_bytes[int(t_s / self.interval_s) % len(self.available_bytes)])

    def minimum(self, start_s: float, end_s: float) -> int:
        """Returns the lowest value between two times, both included."""
        first, last = int(start_s / self.interval_s), int(end_s / self.interval_s)
        if last - first >= len(self.available_bytes):
            return int(self.available_bytes.min())
        places = np.arange(first, last + 1) % len(self.available_bytes)
        return int(self.available_bytes[places].min())


@dataclass(frozen=True, eq=False)
class SimulatedDevice:
    """Simulates one device of a population.

    Attributes:
        name: its lasting name.
        profile: kind, and how much slower it is.
        memory: what its steps may take.
        bytes_per_s: of its link, each way.
        drop_rate: share of trainings at which it goes away.
        data: its examples.
        is_limited: False for a device on which memory never runs out.
    """

    name: str
    profile: DeviceProfile
    memory: SimulatedMemory
    bytes_per_s: float
    drop_rate: float
    data: ClientData
    is_limited: bool = True

    def handler(self, pool: TrainerPool, seed: int) -> Callable[[Request], Reply]:
        """Makes the function that answers requests for this device."""
        return lambda request: self._answer(request, pool, seed)

    def _answer(self, request: Request, pool: TrainerPool, seed: int) -> Reply:
        if request.kind is Kind.REPORT:
            return Reply(self.name, request.round, Outcome.OK, 0.0, self._report(request))
        random = np.random.default_rng([seed, request.round, *self.name.encode()])
        if random.random() < self.drop_rate:
            return failed(request, Outcome.LOST, request.deadline_s * float(random.random()), "went away")
        transfer_s = n_bytes(request.arrays) / self.bytes_per_s
        monitor = _SimulatedMonitor(self, request.now_s + transfer_s, request.now_s + request.deadline_s)
        work = LocalWork.from_payload(request.payload)
        try:
            with pool.trainer(work.width) as trainer:
                result = trainer.train(request.arrays, work, self.data, monitor)
        except _TooLate:
            return failed(request, Outcome.LATE, request.deadline_s, "not done at the deadline")
        except MemoryError as error:
            return failed(request, Outcome.OOM, monitor.now_s - request.now_s, str(error))
        elapsed_s = monitor.now_s - request.now_s + n_bytes(result.arrays) / self.bytes_per_s
        payload = training_payload(result, self.data)
        return Reply(self.name, request.round, Outcome.OK, elapsed_s, payload, result.arrays)

    def _report(self, request: Request) -> dict[str, object]:
        since_s = max(float(request.payload["since_s"]), request.now_s - MOST_READINGS * READING_INTERVAL_S, 0.0)
        times = [t for t in np.arange(since_s, request.now_s, READING_INTERVAL_S).tolist() if t > since_s]
        readings = [[t, self.memory.at(t)] for t in [*times, request.now_s]]
        payload: dict[str, object] = {"n_examples": self.data.n_examples, "readings": readings}
        if request.payload["introduce"]:
            payload |= {"bytes_per_s": self.bytes_per_s, "profile": self.profile.to_json()}
        return payload


class _TooLate(Exception):
    """Says that the deadline passed: the rest of the work is not worth simulating."""


class _SimulatedMonitor:
    """Simulates a device's memory and clock during one training."""

    def __init__(self, device: SimulatedDevice, now_s: float, end_s: float) -> None:
        self.device = device
        self.now_s = now_s
        self.end_s = end_s

    def available_bytes(self) -> int:
        """Returns what the trace says."""
        return self.device.memory.at(self.now_s) if self.device.is_limited else UNLIMITED_BYTES

    def run_step(self, step: Callable[[], float], plan: Plan) -> float:
        """Runs the step unless memory falls under the plan's peak meanwhile."""
        end_s = self.now_s + (plan.step_s + plan.added_s) * self.device.profile.slowdown
        if self.device.is_limited:
            lowest = self.device.memory.minimum(self.now_s, end_s)
            if lowest < plan.peak_bytes:
                raise MemoryError(f"{lowest} bytes were left during a step that takes {plan.peak_bytes}")
        self.now_s = end_s
        if end_s > self.end_s:
            raise _TooLate
        return step()

    def wait(self, seconds: float) -> None:
        """Moves the clock."""
        self.now_s += seconds
