"""``fxhybrid federated``: runs policies on one simulated population and prints what became of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fxhybrid.errors import InvalidArgument

DEADLINE_S = 1800.0  # in time for almost every simulated device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.description = (
        "Trains one model on simulated devices, most of which cannot hold the unmodified training step. Training is "
        "real; clock and memory are the devices' own."
    )
    parser.add_argument("--task", choices=("digits", "text"), default="digits", help="default: %(default)s")
    parser.add_argument("--policies", default="fxhybrid,exclude", metavar="LIST", help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--capable-share", type=float, default=0.2, metavar="X", help="default: %(default)s")
    parser.add_argument(
        "--skew", type=float, default=0.8, metavar="X", help="of labels by device (default: %(default)s)"
    )
    parser.add_argument("--contention", default="steady", help="kind of memory traces (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--per-round", type=int, default=5, metavar="N", help="updates a round waits for (default: 5)")
    parser.add_argument("--local-steps", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="logs and checkpoints go there")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out.

    Raises:
        InvalidArgument: an option cannot be used.
    """
    from fxhybrid.federated.laboratory import Laboratory, run_policy
    from fxhybrid.federated.policies import Settings, policy_of
    from fxhybrid.federated.scenarios import Scenario

    if arguments.resume and arguments.folder is None:
        raise InvalidArgument("--resume needs --folder, where the checkpoints are")
    scenario = Scenario(
        arguments.task,
        arguments.devices,
        arguments.capable_share,
        arguments.skew,
        arguments.contention,
        arguments.seed,
    )
    settings = Settings(
        arguments.rounds, arguments.per_round, local_steps=arguments.local_steps, deadline_s=1800.0, seed=arguments.seed
    )
    policies = [policy_of(name) for name in arguments.policies.split(",")]
    console = Console()
    table = Table(title=f"{scenario.task}: {scenario.n_devices} devices, {scenario.capable_share:.0%} capable")
    for column in ("policy", "accuracy", "loss", "virtual time", "replies"):
        table.add_column(column, justify="left" if column in ("policy", "replies") else "right")
    laboratory = Laboratory()
    with _bars() as progress:
        for policy in policies:
            files = _files(arguments.folder, policy.name)
            driver = run_policy(
                laboratory, scenario, policy, settings, progress=progress, resume=arguments.resume, **files
            )
            score = driver.evaluate(driver.arrays)
            told = ", ".join(f"{count} {name}" for name, count in driver.outcomes.most_common())
            hours = f"{driver.clock_s / 3600:.2f} h"
            table.add_row(policy.name, f"{score.accuracy:.1%}", f"{score.loss:.3f}", hours, told)
    console.print(table)


def _files(folder: Path | None, name: str) -> dict[str, Path]:
    return {} if folder is None else {"log": folder / f"{name}.jsonl", "checkpoint": folder / f"{name}.npz"}


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} rounds"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
