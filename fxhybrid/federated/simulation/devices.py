"""Simulated devices: real training in this process, on the clock and in the memory of another device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.client.local_steps import LocalWork, local_steps
from fxhybrid.federated.client.trainer import Trainer
from fxhybrid.federated.memory.forecast import UNLIMITED_BYTES
from fxhybrid.federated.protocol.compact_updates import BITS, FULL_BITS
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request, failed, n_bytes
from fxhybrid.federated.protocol.transport import Deferred, Handler
from fxhybrid.federated.simulation.failures import FAILURES
from fxhybrid.federated.tasks.data import ClientData
from fxhybrid.ir.plan import Plan

READING_INTERVAL_S = 30.0
MOST_READINGS = 20
PEAK_AT = 0.5  # share of a step after which memory peaks: between the passes, where all activations are held
# A page that does not fit goes out and comes back in once a step: 1.5 GB/s of compressed memory or flash, on phones
# whose operators move some 15 GB/s. Simulated devices are slowed down, so only the ratio of the two counts.
SWAP_SHARE = 1.5e9 / 15e9


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

    def between(self, start_s: float, end_s: float) -> NDArray[np.int64]:
        """Returns the values between two times, both included, each at most once."""
        first, last = int(start_s / self.interval_s), int(end_s / self.interval_s)
        last = min(last, first + len(self.available_bytes) - 1)
        return self.available_bytes[np.arange(first, last + 1) % len(self.available_bytes)]


@dataclass(frozen=True, eq=False)
class SimulatedDevice:
    """Simulates one device of a population.

    Attributes:
        name: its lasting name.
        profile: kind, and how much slower it is; the server is told the kind only.
        memory: what its steps may take.
        bytes_per_s: of its link, each way.
        told_bytes_per_s: what the server is told of it.
        drop_rate: share of trainings in which it goes away.
        data: its examples.
        failures: name of the model of failure, see ``FAILURES``.
        is_limited: False for a device on which memory never runs out.
        swaps: what does not fit is swapped, where else the device would die.
    """

    name: str
    profile: DeviceProfile
    memory: SimulatedMemory
    bytes_per_s: float
    told_bytes_per_s: float
    drop_rate: float
    data: ClientData
    failures: str = "heartbeat"
    is_limited: bool = True
    swaps: bool = False

    def handler(self, trainers: Mapping[float, Trainer]) -> Handler:
        """Makes the function that answers requests for this device."""
        return lambda request: self._report(request) if request.kind is Kind.REPORT else self._train(request, trainers)

    def _train(self, request: Request, trainers: Mapping[float, Trainer]) -> Reply | Deferred:
        """Simulates all steps at once; the training itself is left for when the server takes the answer."""
        work = LocalWork.from_payload(request.payload)
        start_s = request.now_s + n_bytes(request.arrays) / self.bytes_per_s
        monitor = _SimulatedMonitor(self, start_s)
        plans: list[Plan] = []
        detail = ""
        try:
            for plan in local_steps(work, monitor):
                monitor.run_step(lambda: 0.0, plan)
                plans.append(plan)
        except MemoryError as error:
            detail = str(error)
        trained_s = monitor.now_s - request.now_s
        random = np.random.default_rng(list(work.seed))
        if random.random() < self.drop_rate:
            return self._dead(request, Outcome.LOST, trained_s * float(random.random()), "went away")
        if detail:
            return self._dead(request, Outcome.OOM, trained_s, detail)

        def finish() -> Reply:
            result = trainers[work.width].train_by(plans, request.arrays, work, self.data)
            readings = self._readings(start_s, monitor.now_s)
            measured = result.measured(
                self.data.n_examples, steps_s=monitor.steps_s, busy_s=monitor.now_s - start_s, readings=readings
            )
            return result.reply(request, elapsed_s, measured)

        share = BITS / FULL_BITS if request.payload.get("update_bits") == BITS else 1.0
        elapsed_s = trained_s + share * n_bytes(request.arrays) / self.bytes_per_s
        return Deferred(elapsed_s, finish)

    def _dead(self, request: Request, outcome: Outcome, died_s: float, detail: str) -> Reply:
        noticed_s = FAILURES[self.failures](died_s, request.deadline_s)
        return failed(request, outcome, min(noticed_s, request.deadline_s), detail, {"died_s": died_s})

    def _report(self, request: Request) -> Reply:
        readings = self._readings(float(request.payload["since_s"]), request.now_s)
        payload: dict[str, object] = {"n_examples": self.data.n_examples, "readings": readings}
        if request.payload["introduce"]:
            told = dataclasses.replace(self.profile, slowdown=1.0)
            payload |= {"bytes_per_s": self.told_bytes_per_s, "profile": told.to_json()}
        return Reply(self.name, request.round, Outcome.OK, 0.0, payload)

    def _readings(self, since_s: float, now_s: float) -> list[list[float]]:
        first_s = max(since_s, now_s - MOST_READINGS * READING_INTERVAL_S, 0.0)
        times = [t for t in np.arange(first_s, now_s, READING_INTERVAL_S).tolist() if t > first_s]
        return [[t, self.memory.at(t)] for t in [*times, now_s]]


class _SimulatedMonitor:
    """Simulates a device's memory and clock during one training."""

    def __init__(self, device: SimulatedDevice, start_s: float) -> None:
        self.device = device
        self.start_s = self.now_s = start_s
        self.steps_s = 0.0

    def available_bytes(self) -> int:
        """Returns what the trace says."""
        return self.device.memory.at(self.now_s) if self.device.is_limited else UNLIMITED_BYTES

    def elapsed_s(self) -> float:
        """Returns the seconds since training began."""
        return self.now_s - self.start_s

    def run_step(self, step: Callable[[], float], plan: Plan) -> float:
        """Lets the step's time pass, unless memory falls under the plan's peak meanwhile.

        Raises:
            MemoryError: it does; the clock stands at the death then, never before the step's own peak.
        """
        device = self.device
        step_s = (plan.step_s + plan.added_s) * device.profile.slowdown
        if device.is_limited:
            short = plan.peak_bytes - device.memory.between(self.now_s, self.now_s + step_s)
            if short.max() > 0 and not device.swaps:
                index = int(self.now_s / device.memory.interval_s) + int(np.argmax(short > 0))
                self.now_s = max(self.now_s + PEAK_AT * step_s, index * device.memory.interval_s)
                raise MemoryError(f"{plan.peak_bytes - short.max()} bytes were left of {plan.peak_bytes} for a step")
            swapped = 2 * max(int(short.max()), 0)
            step_s += device.profile.slowdown * swapped / (SWAP_SHARE * device.profile.moved_bytes_per_s)
        self.now_s += step_s
        self.steps_s += step_s
        return step()

    def wait(self, seconds: float) -> None:
        """Moves the clock."""
        self.now_s += seconds
