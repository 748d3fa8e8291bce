"""Times planning and bookkeeping of federated rounds for a thousand devices.

Devices are synthetic: three kinds, each device with its own speed and a memory of its own that wanders. They train by
adding noise, so what is timed is the driver: reports, forecasts, plans, selection, checks, averages.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.lib.common import wide_console
from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.memory.predictor import MemoryBudgetPredictor
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request
from fxhybrid.federated.protocol.model_arrays import to_arrays
from fxhybrid.federated.protocol.transport import InProcessTransport
from fxhybrid.federated.selection.strategies import SELECTORS
from fxhybrid.federated.server.device_records import DeviceRecord
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.server.policies import Settings, policy_of
from fxhybrid.federated.server.round_plans import Fleet
from fxhybrid.federated.server.scheduler import Scheduler
from fxhybrid.federated.simulation.scenarios import KINDS
from fxhybrid.federated.tasks.captured_step import capture_step
from fxhybrid.federated.tasks.tasks import Score, digits_task

MINUTES = 1
NEEDS = "scikit-learn"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both parts."""
    parser = argparse.ArgumentParser("python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = digits_task(20)
    model, hybrid = capture_step(task)
    planner = FleetPlanner.of(hybrid)
    _planning(planner, to_arrays(model), arguments.devices)
    _bookkeeping(planner, arguments.devices, arguments.rounds)


def _profiles(count: int) -> list[DeviceProfile]:
    random = np.random.default_rng(0)
    return [
        dataclasses.replace(KINDS[i % 3], name=f"d{i}", slowdown=float(random.lognormal(0, 0.5))) for i in range(count)
    ]


def _planning(planner: FleetPlanner, arrays: dict[str, np.ndarray], count: int) -> None:
    fleet = Fleet({1.0: planner}, {1.0: arrays})
    random = np.random.default_rng(1)
    records = {p.name: DeviceRecord(p.to_json(), 1e6, 10) for p in _profiles(count)}
    for place in range(3):
        low, high = planner.smallest_bytes(KINDS[0]), planner.save_all_bytes
        budgets = dict(zip(records, random.integers(low, high, count).tolist(), strict=True))

        def forecast(device: str, _horizon_s: float, budgets: dict[str, int] = budgets) -> int:
            return budgets[device]

        start = time.perf_counter()
        round_plans = fleet.round_plans(records, policy_of("fxhybrid"), Settings(1, 10), forecast, records)
        seconds = time.perf_counter() - start
        plans = {id(round_plan.plans[0]) for round_plan in round_plans if round_plan.plans}
        text = f"planning round {place + 1}: {count} devices, {len(plans)} plans of {planner.n_buckets} buckets a kind"
        wide_console().print(f"{text}: {seconds:.2f} s", highlight=False)


def _handler(profile: DeviceProfile) -> Callable[[Request], Reply]:
    seed = int(profile.name.removeprefix("d"))

    def handler(request: Request) -> Reply:
        random = np.random.default_rng([seed, request.round])
        if request.kind is Kind.REPORT:
            level = 4_000_000 + 2_000_000 * np.sin(request.now_s / 3000 + seed) + random.normal() * 200_000
            payload = {"n_examples": 50, "readings": [[request.now_s, int(level)]]}
            payload |= {"bytes_per_s": 1e5, "profile": profile.to_json()} if request.payload["introduce"] else {}
            return Reply(profile.name, request.round, Outcome.OK, 0.0, payload)
        noise = random.normal(0, 0.1, 1000).astype(np.float32)
        arrays = {name: array + noise for name, array in request.arrays.items()}
        payload = {"n_examples": 50, "loss": 1.0, "squared_loss": float(random.random())}
        return Reply(profile.name, request.round, Outcome.OK, float(random.uniform(30, 300)), payload, arrays)

    return handler


def _bookkeeping(planner: FleetPlanner, count: int, rounds: int) -> None:
    arrays = {"w": np.zeros(1000, np.float32)}
    driver = Driver(
        InProcessTransport({p.name: _handler(p) for p in _profiles(count)}),
        Scheduler(
            Fleet({1.0: planner}, {1.0: arrays}),
            policy=policy_of("fxhybrid"),
            settings=Settings(rounds, devices_per_round=20),
            forecaster=MemoryBudgetPredictor(),
            select=SELECTORS["utility"],
        ),
        arrays,
        evaluate=lambda _: Score(0.0, 0.0),
        of={},
    )
    start = time.perf_counter()
    for _ in range(rounds):
        driver.run_round()
        if driver.round % max(rounds // 10, 1) == 0:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            text = f"round {driver.round}: {time.perf_counter() - start:.1f} s, at most {resident:.0f} MiB resident"
            wide_console().print(text, highlight=False)


if __name__ == "__main__":
    main()
