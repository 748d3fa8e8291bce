"""Runs of policies on simulated populations; captures and plans are made once and shared by all runs."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from fxhybrid.federated.client.trainer import Trainer, TrainerPool
from fxhybrid.federated.protocol.transport import InProcessTransport
from fxhybrid.federated.server.build_driver import build_driver
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.fleet_planner import FleetPlanner, Technique
from fxhybrid.federated.server.policies import Policy, Settings
from fxhybrid.federated.simulation.scenarios import KINDS, Scenario, population


class Experiment:
    """Runs policies with shared trainers and planners; results do not depend on what ran before."""

    def __init__(self, workers: int = 1) -> None:
        """Makes nothing yet.

        Args:
            workers: devices that train at the same time.
        """
        self.workers = workers
        self._pools: dict[str, TrainerPool] = {}
        self._planners: dict[tuple[str, float, Technique], FleetPlanner] = {}

    def driver(
        self,
        scenario: Scenario,
        policy: Policy,
        settings: Settings,
        *,
        log: Path | None = None,
        checkpoint: Path | None = None,
    ) -> Driver:
        """Builds the driver of a run, ready to start."""
        task = scenario.make_task()
        pool = self._pool(scenario.task)
        planners = {width: self._planner(scenario.task, width, policy.technique) for width in policy.widths}
        hybrid = self._planner(scenario.task, 1.0, Technique.HYBRID)
        devices = population(
            scenario,
            task,
            smallest_bytes=max(hybrid.smallest_bytes(kind) for kind in KINDS),
            full_bytes=hybrid.save_all_bytes,
            is_limited=policy.is_limited,
        )
        transport = InProcessTransport(
            {device.name: device.handler(pool, scenario.seed) for device in devices}, workers=self.workers
        )
        return build_driver(transport, task, planners, policy, settings, log=log, checkpoint=checkpoint)

    def _pool(self, name: str) -> TrainerPool:
        if name not in self._pools:
            task = Scenario(name).make_task()  # always the same: codecs' errors are measured on its example
            self._pools[name] = TrainerPool(lambda width: Trainer(task, width), self.workers)
        return self._pools[name]

    def _planner(self, name: str, width: float, technique: Technique) -> FleetPlanner:
        key = (name, width, technique)
        if key not in self._planners:
            pool = self._pool(name)
            pool.open(width)
            with pool.trainer(width) as trainer:
                self._planners[key] = FleetPlanner.of(trainer.hybrid, technique=technique)
        return self._planners[key]


def run_policy(
    experiment: Experiment,
    scenario: Scenario,
    policy: Policy,
    settings: Settings,
    *,
    progress: Progress | None = None,
    log: Path | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Driver:
    """Runs all rounds, or those that a checkpoint leaves; returns the driver after the last.

    Raises:
        InvalidArgument: ``resume`` without a checkpoint of this run.
    """
    driver = experiment.driver(scenario, policy, settings, log=log, checkpoint=checkpoint)
    if resume:
        driver.resume()
    elif log is not None:
        log.unlink(missing_ok=True)
    driver.run(progress)
    return driver
