"""Runs of policies on simulated populations; captures and plans are made once and shared by all runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.progress import Progress

from fxhybrid.federated.client.trainer import Trainer
from fxhybrid.federated.protocol.transport import InProcessTransport
from fxhybrid.federated.server.build_driver import build_driver
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.fleet_planner import FleetPlanner, Technique
from fxhybrid.federated.server.policies import Policy, Settings
from fxhybrid.federated.simulation.scenarios import KINDS, Scenario, population


class Experiment:
    """Runs policies with shared trainers and planners; results do not depend on what ran before."""

    def __init__(self) -> None:
        """Makes nothing yet."""
        self._trainers: dict[str, dict[float, Trainer]] = {}
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
        planners = {width: self._planner(scenario.task, width, policy.technique) for width in policy.widths}
        hybrid = self._planner(scenario.task, 1.0, Technique.HYBRID)
        devices = population(
            scenario,
            task,
            smallest_bytes=max(hybrid.smallest_bytes(kind) for kind in KINDS),
            full_bytes=hybrid.save_all_bytes,
            is_limited=policy.is_limited,
        )
        trainers = self._trainers[scenario.task]
        transport = InProcessTransport({device.name: device.handler(trainers) for device in devices})
        of = dataclasses.asdict(scenario)
        return build_driver(transport, task, planners, policy, settings, of=of, log=log, checkpoint=checkpoint)

    def _planner(self, name: str, width: float, technique: Technique) -> FleetPlanner:
        key = (name, width, technique)
        if key not in self._planners:
            trainers = self._trainers.setdefault(name, {})
            if width not in trainers:  # always of one scenario: codecs' errors are measured on its example
                trainers[width] = Trainer(Scenario(name).make_task(), width)
            self._planners[key] = FleetPlanner.of(trainers[width].hybrid, technique=technique)
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
