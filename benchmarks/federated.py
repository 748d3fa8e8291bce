"""Trains federated populations under memory limits, by fxhybrid and by the baselines.

Populations are those of ``GRID``, fixed before any run. Each run is one line of the file; runs that it holds are not
repeated, so the work can be cut into slices. ``--show`` makes tables, and with ``--plot`` plots, of what is there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.lib.common import names_of, wide_console
from benchmarks.lib.results import Record, append_record, read_records
from fxhybrid.federated.server.policies import POLICIES, Settings, policy_of
from fxhybrid.federated.simulation.experiment import Experiment
from fxhybrid.federated.simulation.scenarios import DEADLINE_S, Scenario
from fxhybrid.optional_imports import require

MINUTES = 600
NEEDS = "scikit-learn"

# capable share, label skew by device, contention
GRID = {
    "few-skewed": (0.2, 1.0, "steady"),
    "few-mild": (0.2, 0.6, "steady"),
    "few-even": (0.2, 0.0, "steady"),
    "half-skewed": (0.5, 1.0, "steady"),
    "few-crowded": (0.2, 1.0, "crowded"),
    "few-bursty": (0.2, 1.0, "bursty"),
}
TEXT_SKEW = 1.0  # text has no labels to skew: cells that differ only by that are one, run under this one's name
SEEDS = (0, 1, 2)
N_DEVICES = 20
ROUNDS = {"digits": 40, "text": 30}
MAIN = ("fxhybrid", "exclude", "random", "oort-fedprox", "no-limit")


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, or shows those that are there."""
    arguments = _parser().parse_args(argv)
    if arguments.show:
        _show(_read(arguments.json), arguments.plot)
        return
    torch.set_num_threads(1)
    experiment = Experiment()
    until = time.monotonic() + arguments.seconds
    done = {_key(record) for record in _read(arguments.json)}
    for run in _runs(arguments):
        if time.monotonic() > until:
            wide_console().print("the time for this slice is over; call again for the rest")
            return
        if run not in done:
            record = _run(experiment, *run)
            append_record(arguments.json, record)
            accuracy = record["accuracies"][-1]
            wide_console().print(
                f"{' '.join(map(str, run))}: {accuracy:.1%} in {record['seconds']:.0f} s", highlight=False
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.federated", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file of records, added to")
    parser.add_argument("--tasks", help="of digits, text (default: all)")
    parser.add_argument("--cells", help=f"of {', '.join(GRID)} (default: all)")
    parser.add_argument("--policies", default=",".join(MAIN), help=f"of {', '.join(POLICIES)} (default: %(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after this many seconds")
    parser.add_argument("--show", action="store_true", help="make no runs")
    parser.add_argument("--plot", type=Path, help="folder of the plots")
    return parser


Run = tuple[str, str, str, int]


def _runs(arguments: argparse.Namespace) -> Iterable[Run]:
    tasks = names_of(arguments.tasks, ROUNDS, "task")
    cells = names_of(arguments.cells, GRID, "cell")
    policies = names_of(arguments.policies, POLICIES, "policy")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    cases = [(t, c) for t in tasks for c in cells if t != "text" or GRID[c][1] == TEXT_SKEW]
    return [(t, c, p, s) for s in seeds for t, c in cases for p in policies]  # balanced if cut short


def _run(experiment: Experiment, task: str, cell: str, policy: str, seed: int) -> Record:
    share, skew, contention = GRID[cell]
    scenario = Scenario(task, N_DEVICES, share, skew, contention, seed)
    settings = Settings(
        ROUNDS[task], devices_per_round=5, local_steps=5, deadline_s=DEADLINE_S, seed=seed, evaluate_every=2
    )
    start = time.perf_counter()
    driver = experiment.driver(scenario, policy_of(policy), settings)
    records = driver.run()
    scored = [record for record in records if record.score is not None]
    return {
        "task": task,
        "cell": cell,
        "policy": policy,
        "seed": seed,
        "clocks_s": [record.clock_s for record in scored],
        "accuracies": [record.score.accuracy for record in scored if record.score],
        "losses": [record.score.loss for record in scored if record.score],
        "outcomes": dict(driver.outcomes),
        "seconds": time.perf_counter() - start,
    }


def _key(record: Record) -> Run:
    return record["task"], record["cell"], record["policy"], record["seed"]


def _read(path: Path) -> list[Record]:
    return read_records(path) if path.exists() else []


# -- what came out ----------------------------------------------------------------------------------------


def time_to(record: Record, accuracy: float) -> float | None:
    """Returns the virtual seconds until a run first has an accuracy; None if it never has."""
    pairs = zip(record["clocks_s"], record["accuracies"], strict=True)
    return next((clock_s for clock_s, reached in pairs if reached >= accuracy), None)


def speedup(record: Record, baseline: Record) -> float | None:
    """Computes how much sooner a run reaches the baseline's own best accuracy."""
    best = max(baseline["accuracies"])
    own, other = time_to(record, best), time_to(baseline, best)
    return None if own is None or other is None else other / own


def _show(records: Sequence[Record], folder: Path | None) -> None:
    by_cell: dict[tuple[str, str], dict[tuple[str, int], Record]] = defaultdict(dict)
    for record in records:
        by_cell[record["task"], record["cell"]][record["policy"], record["seed"]] = record
    for (task, cell), runs in by_cell.items():
        wide_console().print(_table(task, cell, runs))
        if folder is not None:
            _plot(folder / f"{task}-{cell}.png", f"{task}, {cell}", runs)
    wide_console().print(_summary(by_cell))


def _summary(by_cell: Mapping[tuple[str, str], Mapping[tuple[str, int], Record]]) -> Table:
    """Makes one row per population: what the claim is about."""
    table = Table(title="fxhybrid against the others", caption="mean (least to most over seeds)")
    columns = ("exclude", "oort-fedprox", "random", "no-limit")
    for name in ("task", "cell", "accuracy", *(f"ahead of {policy}" for policy in columns), "sooner than random"):
        table.add_column(name, justify="left" if name in ("task", "cell") else "right")
    for (task, cell), runs in by_cell.items():
        ours = {seed: run for (policy, seed), run in runs.items() if policy == "fxhybrid"}
        row = [_spread([100 * run["accuracies"][-1] for run in ours.values()], "%")]
        for policy in columns:
            pairs = [(run, runs[policy, seed]) for seed, run in ours.items() if (policy, seed) in runs]
            row.append(_spread([100 * (a["accuracies"][-1] - b["accuracies"][-1]) for a, b in pairs], ""))
        pairs = [(run, runs["random", seed]) for seed, run in ours.items() if ("random", seed) in runs]
        row.append(_spread([ratio for a, b in pairs if (ratio := speedup(a, b)) is not None], " x"))
        table.add_row(task, cell, *row)
    return table


def _table(task: str, cell: str, runs: dict[tuple[str, int], Record]) -> Table:
    share, skew, contention = GRID[cell]
    title = f"{task}, {cell}: {share:.0%} capable, skew {skew:g}, {contention}"
    table = Table(
        title=title, caption="mean (least to most over seeds); faster: virtual time to the row's own best accuracy"
    )
    names = ("policy", "seeds", "accuracy at the end", "of the last five", "fxhybrid ahead by", "faster by", "replies")
    for name in names:
        table.add_column(name, justify="left" if name in ("policy", "replies") else "right")
    for policy in dict.fromkeys(policy for policy, _ in runs):
        own = {seed: run for (name, seed), run in runs.items() if name == policy}
        pairs = [(runs["fxhybrid", seed], run) for seed, run in own.items() if ("fxhybrid", seed) in runs]
        ahead = [100 * (ours["accuracies"][-1] - run["accuracies"][-1]) for ours, run in pairs]
        faster = [ratio for ours, run in pairs if (ratio := speedup(ours, run)) is not None]
        totals: dict[str, int] = defaultdict(int)
        for run in own.values():
            for outcome, count in run["outcomes"].items():
                totals[outcome] += count
        table.add_row(
            policy,
            str(len(own)),
            _spread([100 * run["accuracies"][-1] for run in own.values()], "%"),
            _spread([100 * statistics.fmean(run["accuracies"][-5:]) for run in own.values()], "%"),
            _spread(ahead, " points") if policy != "fxhybrid" else "",
            f"{_spread(faster, ' x')}, {len(faster)} of {len(pairs)}" if policy != "fxhybrid" else "",
            ", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items())),
        )
    return table


def _spread(values: Sequence[float], unit: str) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1f}{unit} ({min(values):.1f} to {max(values):.1f})"


def _plot(path: Path, title: str, runs: dict[tuple[str, int], Record]) -> None:
    require("matplotlib", "a plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "a plot")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for place, policy in enumerate(dict.fromkeys(policy for policy, _ in runs)):
        for number, run in enumerate(run for (name, _), run in runs.items() if name == policy):
            hours = [clock_s / 3600 for clock_s in run["clocks_s"]]
            label = policy if number == 0 else None
            axes.plot(hours, run["accuracies"], color=f"C{place}", alpha=0.8, linewidth=1.2, label=label)
    axes.set(title=title, xlabel="virtual hours", ylabel="held-out accuracy")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
