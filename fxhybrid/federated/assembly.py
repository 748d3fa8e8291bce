"""Joins a run's parts into its driver, wherever the devices are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fxhybrid.federated.driver import Driver
from fxhybrid.federated.forecast import Forecaster, LastReading
from fxhybrid.federated.messages import Arrays
from fxhybrid.federated.planning import FleetPlanner
from fxhybrid.federated.policies import Policy, Settings
from fxhybrid.federated.predictor import MemoryBudgetPredictor
from fxhybrid.federated.preparation import Fleet
from fxhybrid.federated.selectors import SELECTORS
from fxhybrid.federated.tasks import Score, Task, evaluate
from fxhybrid.federated.transport import Transport
from fxhybrid.federated.wire import load_arrays, to_arrays


def make_driver(
    transport: Transport,
    task: Task,
    planners: Mapping[float, FleetPlanner],
    policy: Policy,
    settings: Settings,
    *,
    log: Path | None = None,
    checkpoint: Path | None = None,
) -> Driver:
    """A run of ``policy``, ready to start.

    Args:
        transport: reaches the devices.
        task: what they train.
        planners: for each of the policy's widths.
        policy: method or baseline.
        settings: of the run.
        log: JSON lines of every round go here.
        checkpoint: written after each round.
    """
    model = task.make_model(1.0)

    def score(arrays: Arrays) -> Score:
        load_arrays(model, arrays)
        return evaluate(task, model)

    return Driver(
        transport,
        Fleet(planners, {width: to_arrays(task.make_model(width)) for width in planners}),
        to_arrays(model),
        policy=policy,
        settings=settings,
        forecaster=make_forecaster(policy),
        selector=SELECTORS[policy.selector](settings.seed),
        evaluate=score,
        log=log,
        checkpoint=checkpoint,
    )


def make_forecaster(policy: Policy) -> Forecaster:
    """The policy's forecaster, without readings yet."""
    return LastReading() if policy.forecast == "last" else MemoryBudgetPredictor()
