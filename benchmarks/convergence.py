"""Trains models to the end, unmodified and at the smallest reachable budget.

Each run trains a model twice with the default settings, unmodified and inside the smallest budget in reach, from the
same weights on the same batches. The digits are cross-validated: a seed has five runs, each with another fifth of all
1,797 images held out. Judged are one-sided 95 % intervals of the seeds' paired differences; the spread of float32 over
the seeds is printed with them. Records are appended as they come and those of the file are not repeated, so a run can
be cut into slices.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from rich.table import Table
from torch import Tensor, nn

import fxhybrid
from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import add_slices, at_smallest_peak, names_of, wide_console, with_missing
from benchmarks.lib.results import Record
from benchmarks.lib.training_tasks import FOLDS, digits, language, packages
from fxhybrid.demo.demo_tasks import Task
from fxhybrid.optional_imports import require
from fxhybrid.profiling.allocator import measure_step
from fxhybrid.suite.small_models import evaluate

MINUTES = 90
NEEDS = "scikit-learn"

POINTS, LOSS_SHARE = 0.3, 0.01
CONFIDENCE = 0.95
SEEDS = 5
# how a task is made, its folds, and what is compared
TASKS: dict[str, tuple[Callable[[int, int], Task], int, str]] = {
    "digits": (digits, FOLDS, "accuracy"),
    "packages": (packages, 1, "accuracy"),
    "language": (language, 1, "loss"),
}


def train(task: Task, *, small: bool) -> Record:
    """Trains one run; ``small``: inside the smallest budget in reach."""
    model, batches = task.make_model(), task.batches()
    example = next(batches)
    hybrid = at_smallest_budget(model, example, task) if small else None
    optimizer = task.make_optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = task.loss_fn(model(x), y) if hybrid is None else hybrid(x, loss_args=(y,))
        return found

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(x, y).backward()

    for x, y in itertools.islice(itertools.chain([example], batches), task.steps):
        step(x, y)
        optimizer.step()
        schedule.step()
    peak = measure_step(lambda: step(*example), modules=model, tensors=example, repeats=0).peak_bytes
    optimizer.zero_grad()
    record: Record = {"peak_bytes": peak}
    if hybrid is not None:
        x, y = next(batches)
        record |= {"error": hybrid.check_error(x, loss_args=(y,)), "planned_error": hybrid.plan.gradient_error.value}
    return record | evaluated(model, task)


def at_smallest_budget(model: nn.Module, example: tuple[Tensor, Tensor], task: Task) -> fxhybrid.HybridModule:
    """Compiles the model a little above the smallest peak for which there is a plan; default settings."""
    x, y = example

    def compiled(budget: int) -> fxhybrid.HybridModule:
        return fxhybrid.compile(model, budget=budget, example_inputs=(x,), loss_fn=task.loss_fn, loss_args=(y,))

    return at_smallest_peak(compiled)


def evaluated(model: nn.Module, task: Task) -> Record:
    """Records the held-out loss, how many answers are right, and of how many."""
    found = evaluate(model, task.loss_fn, task.held_out)
    return {"loss": found.loss, "right": found.n_right, "of": found.n_predictions}


def bound(differences: Sequence[float]) -> float:
    """Computes the lower end of the one-sided interval of the mean."""
    n = len(differences)
    if n < 2:
        return -math.inf
    quantile = float(require("scipy.stats", "the interval").t.ppf(CONFIDENCE, n - 1))
    return statistics.fmean(differences) - quantile * statistics.stdev(differences) / n**0.5


def score(records: Sequence[Record], kind: str, measure: str) -> float:
    """Computes the accuracy in percent over all folds of a seed, or their mean loss."""
    runs = [record[kind] for record in records]
    if measure == "loss":
        return statistics.fmean(run["loss"] for run in runs)
    return 100 * sum(run["right"] for run in runs) / sum(run["of"] for run in runs)


def complete_seeds(records: Sequence[Record], name: str) -> dict[int, list[Record]]:
    """Selects the records of each seed of which all folds are there."""
    seeds: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record["model"] == name:
            seeds[record["seed"]].append(record)
    return {seed: own for seed, own in sorted(seeds.items()) if len(own) == TASKS[name][1]}


def judge(records: Sequence[Record]) -> list[Check]:
    """Makes one check per task."""
    checks = []
    for name, (_, _, measure) in TASKS.items():
        asked = f"not {POINTS} points lower" if measure == "accuracy" else f"not {LOSS_SHARE:.0%} higher"
        seeds = complete_seeds(records, name)
        if not seeds:
            checks.append(Check(name, asked, "", None))
            continue
        plain, ours = ([score(own, kind, measure) for own in seeds.values()] for kind in ("float32", "fxhybrid"))
        spread = statistics.stdev(plain) if len(plain) > 1 else math.nan
        if measure == "accuracy":
            low = bound([b - a for a, b in zip(plain, ours, strict=True)])
            text, met = f"at least {low:+.2f} points", low >= -POINTS
        else:
            low = bound([1 - b / a for a, b in zip(plain, ours, strict=True)])
            text, met = f"at most {-low:+.2%}", -low <= LOSS_SHARE
        means = f"{statistics.fmean(plain):.3f} float32 (spread {spread:.3f}), {statistics.fmean(ours):.3f} fxhybrid"
        checks.append(Check(f"{name}, {len(plain)} seeds", asked, f"{text}; {measure} {means}", met))
    return checks


def runs_table(records: Sequence[Record]) -> Table:
    """Makes one row per task and seed."""
    table = Table(title="Training to the end")
    for name in ("task", "seed", "peak share", "loss", "accuracy", "ours: loss", "accuracy", "error planned", "at end"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name in TASKS:
        for seed, own in complete_seeds(records, name).items():
            share = max(r["fxhybrid"]["peak_bytes"] / r["float32"]["peak_bytes"] for r in own)
            scores = [
                f"{score(own, kind, measure):.{digits}f}"
                for kind in ("float32", "fxhybrid")
                for measure, digits in (("loss", 4), ("accuracy", 2))
            ]
            errors = [f"{max(r['fxhybrid'][key] for r in own):.4f}" for key in ("planned_error", "error")]
            table.add_row(name, str(seed), f"{share:.2f}", *scores, *errors)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the runs and judges them."""
    arguments = _parser().parse_args(argv)
    console = wide_console()
    records = with_missing(arguments, _runs(arguments), lambda r: f"{r['model']} {r['key']}: {r['fxhybrid']}")
    console.print(runs_table(records))
    console.print(checks_table(judge(records)))


def _runs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], Record]]]:
    for name in names_of(arguments.tasks, TASKS, "task"):
        make, n_folds, _ = TASKS[name]
        for seed, fold in itertools.product(range(arguments.seeds), range(n_folds)):
            yield name, f"{seed}/{fold}", partial(_pair, make, seed, fold)


def _pair(make: Callable[[int, int], Task], seed: int, fold: int) -> Record:
    task = make(seed, fold)
    runs = {kind: train(task, small=kind == "fxhybrid") for kind in ("float32", "fxhybrid")}
    return {"part": "convergence", "seed": seed, **runs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--tasks", metavar="LIST", help=f"default: all of {','.join(TASKS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many (default: {SEEDS})")
    add_slices(parser)
    return parser


if __name__ == "__main__":
    main()
