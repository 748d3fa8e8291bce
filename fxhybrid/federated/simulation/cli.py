"""``fxhybrid federated``: runs policies on one simulated population and prints their results."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fxhybrid.console import COUNT, progress_bar
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.server.policies import Settings, policy_of
from fxhybrid.federated.simulation.experiment import Experiment, run_policy
from fxhybrid.federated.simulation.scenarios import Scenario


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out.

    Raises:
        InvalidArgument: an option cannot be used.
    """
    if arguments.resume and arguments.folder is None:
        raise InvalidArgument("--resume needs --folder, where the checkpoints are")
    scenario = Scenario(
        arguments.task,
        arguments.devices,
        arguments.capable_share,
        arguments.skew,
        arguments.contention,
        arguments.seed,
        arguments.fleet,
        arguments.failures,
        arguments.swap,
    )
    settings = Settings(
        arguments.rounds,
        arguments.per_round,
        local_steps=arguments.local_steps,
        deadline_s=arguments.deadline,
        seed=arguments.seed,
        until_s=3600 * arguments.hours,
    )
    policies = [policy_of(name) for name in arguments.policies.split(",")]
    console = Console()
    table = Table(title=f"{scenario.task}: {scenario.n_devices} devices, {scenario.capable_share:.0%} capable")
    for column in ("policy", "accuracy", "loss", "virtual time", "replies"):
        table.add_column(column, justify="left" if column in ("policy", "replies") else "right")
    experiment = Experiment()
    with progress_bar(f"{COUNT} rounds") as progress:
        for policy in policies:
            files = _files(arguments.folder, policy.name)
            driver = run_policy(
                experiment, scenario, policy, settings, progress=progress, resume=arguments.resume, **files
            )
            score = driver.evaluate(driver.arrays)
            outcomes = ", ".join(f"{count} {name}" for name, count in driver.outcomes.most_common())
            hours = f"{driver.clock_s / 3600:.2f} h"
            table.add_row(policy.name, f"{score.accuracy:.1%}", f"{score.loss:.3f}", hours, outcomes)
    console.print(table)


def _files(folder: Path | None, name: str) -> dict[str, Path]:
    return {} if folder is None else {"log": folder / f"{name}.jsonl", "checkpoint": folder / f"{name}.npz"}
