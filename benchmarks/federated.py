"""Trains federated populations under memory limits, by fxhybrid and baselines, and compares them at equal time.

Populations are those of ``GRID``, each as a mixed fleet and as phones only, and were fixed before any run. Runs last
``HOURS`` virtual hours. All policies ask 1.3 times as many devices as they need, take partial work at the deadline, and
lose a dead device for 60 s. Synchronous rounds are timed under the other models of failure, too: those change how long
a round lasts in which too few devices answered, and nothing else here (a run of its own would meet other memory).

Each run is one line of the file; runs that it holds are not repeated, so the work can be cut into slices, the most
telling first. ``python -m benchmarks.tables`` makes the tables of docs/FEDERATED.md from it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.lib.common import wide_console
from benchmarks.lib.results import RESULTS, Record, append_record, read_records
from fxhybrid.federated.server.policies import Settings, policy_of
from fxhybrid.federated.server.run_log import RoundRecord
from fxhybrid.federated.simulation.experiment import Experiment
from fxhybrid.federated.simulation.failures import FAILURES, retimed_s
from fxhybrid.federated.simulation.scenarios import FLEETS, Scenario

MINUTES = 600
NEEDS = "scikit-learn"

# capable share, label skew by device, contention
GRID = {
    "few-skewed": (0.2, 1.0, "steady"),
    "half-skewed": (0.5, 1.0, "steady"),
    "few-crowded": (0.2, 1.0, "crowded"),
    "few-bursty": (0.2, 1.0, "bursty"),
    "few-mild": (0.2, 0.6, "steady"),
    "few-even": (0.2, 0.0, "steady"),
}
SEEDS = (0, 1, 2)
N_DEVICES, DEVICES_PER_ROUND = 20, 5
HOURS = 2.0
LONGER = {"random": 4.0, "random-async": 4.0}  # hours where two see few targets; only the times to targets use them
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SMOOTHED = 3  # evaluations: a target counts as reached when their mean does
ASSUMED = "heartbeat"
MAIN = ("fxhybrid", "random", "oort-fedprox", "exclude")
BUFFERED = ("fxhybrid-async", "random-async", "oort-fedprox-async", "exclude-async")
SWAPPING = ("random", "oort-fedprox")
SWAP = "-swap"  # at the end of a cell's name: devices swap instead of dying

Run = tuple[str, str, str, int]  # fleet, cell, policy, seed


def runs() -> Iterator[Run]:
    """Yields all runs: the skewed population in full, then the others, seed by seed."""
    first, *others = GRID
    for policies in (MAIN, BUFFERED):
        for seed, fleet in itertools.product(SEEDS, reversed(FLEETS)):
            yield from ((fleet, first, policy, seed) for policy in policies)
    for seed, cell, fleet in itertools.product(SEEDS, others, reversed(FLEETS)):
        yield from ((fleet, cell, policy, seed) for policy in (*MAIN, *BUFFERED))
    for seed, fleet in itertools.product(SEEDS, reversed(FLEETS)):
        yield from ((fleet, first + SWAP, policy, seed) for policy in SWAPPING)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing."""
    parser = argparse.ArgumentParser("python -m benchmarks.federated", description=__doc__)
    default = RESULTS / "federated.jsonl"
    parser.add_argument("--json", type=Path, default=default, help="file of records, added to (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after this many seconds")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    experiment = Experiment()
    until = time.monotonic() + arguments.seconds
    known = read_records(arguments.json) if arguments.json.exists() else []
    done = {_key(record) for record in known if record["hours"] >= _hours(record["policy"])}
    for run in (run for run in runs() if run not in done):
        if time.monotonic() > until:
            wide_console().print("the time for this slice is over; call again for the rest")
            return
        record = _record(experiment, *run)
        append_record(arguments.json, record)
        text = f"{' '.join(map(str, run))}: {record['end']:.1%} in {record['cpu_s']:.0f} s"
        wide_console().print(text, highlight=False)


def _record(experiment: Experiment, fleet: str, cell: str, policy: str, seed: int) -> Record:
    share, skew, contention = GRID[cell.removesuffix(SWAP)]
    swaps = cell.endswith(SWAP)
    scenario = Scenario("digits", N_DEVICES, share, skew, contention, seed, fleet, ASSUMED, swaps)
    settings = Settings(1_000_000, DEVICES_PER_ROUND, seed=seed, until_s=3600 * _hours(policy))
    start = time.process_time()
    driver = experiment.driver(scenario, policy_of(policy), settings)
    records = driver.run()
    accuracies = [record.score.accuracy for record in records]
    models = (ASSUMED,) if driver.policy.is_async else FAILURES
    clocks = {name: _clock(records, name) for name in models}
    n_equal = sum(clock_s <= 3600 * HOURS for clock_s in clocks[ASSUMED])
    return {
        "task": fleet,
        "cell": cell,
        "policy": policy,
        "seed": seed,
        "hours": _hours(policy),
        "rounds": len(records),
        "reached_s": {name: [time_to(clock, accuracies, x) for x in TARGETS] for name, clock in clocks.items()},
        "mean": mean_over(clocks[ASSUMED], accuracies, 3600 * HOURS),
        "end": smoothed(accuracies[:n_equal])[-1],
        "outcomes": dict(driver.outcomes),
        "cpu_s": round(time.process_time() - start, 1),
    }


def _hours(policy: str) -> float:
    return LONGER.get(policy, HOURS)


def _key(record: Record) -> Run:
    return record["task"], record["cell"], record["policy"], record["seed"]


def _clock(records: Sequence[RoundRecord], failures: str) -> list[float]:
    """Returns the time after each round under a model of failure."""
    if failures == ASSUMED:
        return [record.clock_s for record in records]
    return list(itertools.accumulate(retimed_s(record, DEVICES_PER_ROUND, failures) for record in records))


def smoothed(accuracies: Sequence[float]) -> list[float]:
    """Computes the mean of each evaluation and those before it, ``SMOOTHED`` in all; fewer at the start."""
    windows = (accuracies[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(accuracies)))
    return [sum(window) / len(window) for window in windows]


def time_to(clock_s: Sequence[float], accuracies: Sequence[float], target: float) -> int | None:
    """Returns the seconds until the mean of three evaluations first reaches a target; None for never."""
    pairs = list(zip(clock_s, smoothed(accuracies), strict=True))[SMOOTHED - 1 :]
    return next((round(s) for s, accuracy in pairs if accuracy >= target), None)


def mean_over(clock_s: Sequence[float], accuracies: Sequence[float], end_s: float) -> float:
    """Computes the mean accuracy over time from 0 to ``end_s``; before the first evaluation it is 0."""
    ends = [*clock_s[1:], end_s]
    held_s = [max(min(end, end_s) - min(start, end_s), 0.0) for start, end in zip(clock_s, ends, strict=True)]
    return sum(a * s for a, s in zip(accuracies, held_s, strict=True)) / end_s


if __name__ == "__main__":
    main()
