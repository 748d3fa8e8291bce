"""Joins a run's parts into its driver, wherever the devices are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxhybrid.federated.memory.forecast import LastReading
from fxhybrid.federated.memory.predictor import MemoryBudgetPredictor
from fxhybrid.federated.protocol.messages import Arrays
from fxhybrid.federated.protocol.model_arrays import load_arrays, to_arrays
from fxhybrid.federated.protocol.transport import Transport
from fxhybrid.federated.selection.strategies import SELECTORS
from fxhybrid.federated.server.aggregation import kept_by_step
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.server.policies import Policy, Settings
from fxhybrid.federated.server.round_plans import Fleet
from fxhybrid.federated.server.scheduler import Scheduler
from fxhybrid.federated.tasks.captured_step import capture_step
from fxhybrid.federated.tasks.tasks import Score, Task, score_model

# Of all forecasts. Those of the devices chosen are missed more often, since selection prefers who is forecast much; of
# their answers at most 5 % are to be deaths.
MISS_RATE = 0.025


def build_driver(
    transport: Transport,
    task: Task,
    planners: Mapping[float, FleetPlanner],
    policy: Policy,
    settings: Settings,
    *,
    of: Mapping[str, Any],
    log: Path | None = None,
    checkpoint: Path | None = None,
) -> Driver:
    """Builds the driver of a run of ``policy``, ready to start.

    Args:
        transport: reaches the devices.
        task: what they train.
        planners: for each of the policy's widths.
        policy: method or baseline.
        settings: of the run.
        of: what is trained by whom, as JSON values; a checkpoint of anything else is refused.
        log: JSON lines of every round go here.
        checkpoint: written after each round.
    """
    model = task.make_model(1.0)

    def score(arrays: Arrays) -> Score:
        load_arrays(model, arrays)
        return score_model(task, model)

    return Driver(
        transport,
        build_scheduler(task, planners, policy, settings),
        to_arrays(model),
        evaluate=score,
        of=of,
        kept=kept_by_step(model),
        log=log,
        checkpoint=checkpoint,
    )


def planners_of(task: Task, policy: Policy) -> dict[float, FleetPlanner]:
    """Captures the task's step for each of the policy's widths, for planning."""
    captured = {width: capture_step(task, width)[1] for width in policy.widths}
    return {width: FleetPlanner.of(hybrid, technique=policy.technique) for width, hybrid in captured.items()}


def build_scheduler(
    task: Task, planners: Mapping[float, FleetPlanner], policy: Policy, settings: Settings
) -> Scheduler:
    """Builds the scheduler of a run, which knows no device yet."""
    return Scheduler(
        Fleet(planners, {width: to_arrays(task.make_model(width)) for width in planners}),
        policy=policy,
        settings=settings,
        forecaster=LastReading() if policy.forecast == "last" else MemoryBudgetPredictor(MISS_RATE),
        select=SELECTORS[policy.selector],
    )
