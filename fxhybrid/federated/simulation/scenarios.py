"""Simulated populations: devices of several kinds, most of which cannot hold the unmodified step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.simulation.devices import SimulatedDevice, SimulatedMemory
from fxhybrid.federated.simulation.failures import FAILURES
from fxhybrid.federated.simulation.trace_generator import POPULATIONS, generate_fleet
from fxhybrid.federated.tasks.named_tasks import TASKS, load_task
from fxhybrid.federated.tasks.tasks import Task, digits_task

TRACE_S, TRACE_INTERVAL_S = 24 * 3600.0, 10.0
# Tasks are tiny so that many runs can be made; these devices are slowed down in proportion, so that a round lasts
# minutes, as it does with models of the size that phones train, and memory moves meanwhile.
KINDS = (
    DeviceProfile("phone", 4 << 30, 4e6, 3e6, {"": 3e6}, launch_s=1e-3),
    DeviceProfile("board", 2 << 30, 1e6, 2e6, {"": 1e6}, launch_s=2e-3),
    DeviceProfile("laptop", 8 << 30, 2e7, 1e7, {"": 2e7}, launch_s=3e-4),
)
STRONG_SHARES, WEAK_SHARES = (1.5, 3.0), (0.15, 0.9)
BYTES_PER_S = 2e4
DROP_RATE = 0.02
FLEETS = ("mixed", "phones")


@dataclass(frozen=True)
class Scenario:
    """Describes one population.

    Attributes:
        task: name in ``TASKS``.
        n_devices: how many.
        capable_share: of devices that usually can hold the unmodified step.
        skew: how much the classes that weak devices hold are missing on strong ones (digits only), see
            ``capability_split``.
        contention: name of the memory traces' population.
        seed: of data, devices and traces.
        fleet: ``"mixed"``: the strong devices are laptops, which are faster, too; ``"phones"``: all devices are
            phones, the strong ones no faster than others but with more memory.
        failures: when the server learns of a death, see ``FAILURES``.
        swaps: steps that do not fit are swapped, and take longer, where else the device would die.
    """

    task: str = "digits"
    n_devices: int = 20
    capable_share: float = 0.2
    skew: float = 0.8
    contention: str = "steady"
    seed: int = 0
    fleet: str = "mixed"
    failures: str = "heartbeat"
    swaps: bool = False

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            InvalidArgument: one cannot be used.
        """
        choices: dict[str, Iterable[str]] = {
            "task": TASKS,
            "contention": POPULATIONS,
            "fleet": FLEETS,
            "failures": FAILURES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidArgument(f"{name} is {getattr(self, name)!r}; there are {', '.join(known)}")
        if not (0 <= self.capable_share <= 1 and 0 <= self.skew <= 1 and self.n_devices > 0):
            raise InvalidArgument("capable_share and skew lie between 0 and 1, n_devices is at least 1")

    def is_capable(self) -> list[bool]:
        """Chooses which devices are strong: a random choice of the asked share, at least one."""
        count = max(1, round(self.capable_share * self.n_devices))
        strong = np.random.default_rng([self.seed, 3]).permutation(self.n_devices)[:count]
        return [i in set(strong.tolist()) for i in range(self.n_devices)]

    def make_task(self) -> Task:
        """Makes model and data."""
        if self.task != "digits":
            return load_task(self.task, self.n_devices, self.seed)
        return digits_task(self.n_devices, seed=self.seed, is_capable=self.is_capable(), skew=self.skew)


def population(
    scenario: Scenario, task: Task, *, smallest_bytes: int, full_bytes: int, is_limited: bool = True
) -> list[SimulatedDevice]:
    """Makes the scenario's devices, one for each of the task's clients.

    A strong device's median memory is 1.5 to 3 times the unmodified step's peak; a weak one's lies between the
    smallest plan's peak and that, at 15 to 90 % of the way.

    Args:
        scenario: who there is.
        task: whose clients they are.
        smallest_bytes: peak of the smallest plan.
        full_bytes: peak of the unmodified step.
        is_limited: False for devices that never run out of memory.
    """
    random = np.random.default_rng([scenario.seed, 4])
    traces = generate_fleet(
        POPULATIONS[scenario.contention],
        len(task.clients),
        scenario.seed,
        duration_s=TRACE_S,
        interval_s=TRACE_INTERVAL_S,
    )
    devices = []
    for (name, data), trace, strong in zip(task.clients.items(), traces, scenario.is_capable(), strict=True):
        kind = KINDS[2] if strong else KINDS[int(random.integers(2))]
        kind = KINDS[0] if scenario.fleet == "phones" else kind
        if strong:
            median_bytes = full_bytes * random.uniform(*STRONG_SHARES)
        else:
            median_bytes = smallest_bytes + (full_bytes - smallest_bytes) * random.uniform(*WEAK_SHARES)
        profile = dataclasses.replace(kind, slowdown=float(random.lognormal(0.0, 0.4)))
        memory = SimulatedMemory(TRACE_INTERVAL_S, _scaled(trace.available_bytes, median_bytes))
        device = SimulatedDevice(
            name,
            profile,
            memory,
            bytes_per_s=BYTES_PER_S * float(random.lognormal(0.0, 0.5)),
            told_bytes_per_s=BYTES_PER_S,
            drop_rate=DROP_RATE,
            data=data,
            failures=scenario.failures,
            is_limited=is_limited,
            swaps=scenario.swaps,
        )
        devices.append(device)
    return devices


def _scaled(available_bytes: NDArray[np.int64], median_bytes: float) -> NDArray[np.int64]:
    """Scales the trace to a tiny model: its shape stays, its median becomes ``median_bytes``."""
    return (available_bytes * (median_bytes / float(np.median(available_bytes)))).astype(np.int64)
