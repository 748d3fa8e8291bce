"""Decides ADR 15: measures what each phase of the frontier search earns, by leaving it out.

Every recorded problem is searched with all phases, and once more without each of them; the moves that a phase would get
go to the filling of gaps (those of the gaps to the walk down), so that all searches may make as many. Compared are the
overheads at budgets between the smallest peak of the full search (share 0) and that of the save-all step (share 1),
and the smallest peaks. Seconds are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from benchmarks.lib.common import names_of, table_of_rows, wide_console
from benchmarks.lib.record_corpus import MAX_ERROR, load, names
from benchmarks.lib.results import Record, append_record, read_records
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.base import PlanFrontier
from fxhybrid.solvers.mps.frontier_search import PHASES, Effort, FrontierSearch, Phase

MINUTES = 5
NEEDS = ""

ALL = "all phases"
COLUMNS = ("left out", "overhead", "at worst", "budgets not met", "smallest peak", "at worst", "points", "CPU s")
SHARES = tuple(i / 12 for i in range(12))
FLOOR_SHARE = 1e-3  # of the step, on top of every overhead


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one row per phase left out."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.frontier_phases", description=__doc__)
    parser.add_argument("--problems", metavar="LIST", help=f"default: {','.join(names())}")
    parser.add_argument("--without", metavar="LIST", help="phases to leave out together; default: each in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="records of an earlier run to show instead")
    arguments = parser.parse_args(argv)
    if arguments.summary:
        records = [record for record in read_records(arguments.summary) if "without" in record]
    else:
        records = []
        for name in names_of(arguments.problems, names(), "problem"):
            for record in _records(load(name), arguments.without):
                records.append({"model": name, "part": "frontier phases", "key": record["without"], **record})
                append_record(arguments.json, records[-1])
    wide_console().print(summary(records))


def without(left_out: Sequence[str]) -> tuple[Phase, ...]:
    """Returns the phases less some, whose share of the moves goes to the filling of gaps, or to the walk down."""
    share = sum(phase.share for phase in PHASES if phase.name in left_out)
    heir = "walk down" if "fill gaps" in left_out else "fill gaps"
    kept = (phase for phase in PHASES if phase.name not in left_out)
    return tuple(replace(phase, share=phase.share + share * (phase.name == heir)) for phase in kept)


def searched(problem: Problem, phases: Sequence[Phase]) -> tuple[PlanFrontier, float]:
    """Returns a frontier and its CPU seconds."""
    start = time.process_time()
    search = FrontierSearch(problem, MAX_ERROR, Effort())
    search.run(phases)
    return search.frontier(), time.process_time() - start


def _records(problem: Problem, together: str | None) -> Iterator[Record]:
    full, full_s = searched(problem, PHASES)
    low, high = full.points[-1].peak_bytes, full.points[0].peak_bytes
    budgets = [int(low + share * (high - low)) for share in SHARES]
    floor_s = FLOOR_SHARE * problem.step_s
    for name in (together,) if together else (ALL, *(phase.name for phase in PHASES)):
        frontier, seconds = (full, full_s) if name == ALL else searched(problem, without(name.split(",")))
        logs = []
        for budget_bytes in budgets:
            point, best = frontier.point_for(budget_bytes), full.point_for(budget_bytes)
            if point is not None and best is not None:
                logs.append(math.log((point.overhead_s + floor_s) / (best.overhead_s + floor_s)))
        yield {
            "without": name,
            "ratios": [math.exp(ratio) for ratio in logs],
            "unreached": len(budgets) - len(logs),
            "smallest_peak": frontier.points[-1].peak_bytes / low,
            "points": len(frontier.points),
            "seconds": seconds,
        }


def summary(records: Sequence[Record]) -> Table:
    """Returns the rows as a table to print."""
    title = "without one phase, relative to all: overhead + 0.1 % of the step, smallest peak"
    return table_of_rows(title, COLUMNS, summary_rows(records))


def summary_rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Yields means over the problems, one row per phase left out."""
    for name in dict.fromkeys(record["without"] for record in records):
        own = [record for record in records if record["without"] == name]
        ratios = [ratio for record in own for ratio in record["ratios"]]
        peaks = [record["smallest_peak"] for record in own]
        yield (
            "nothing" if name == ALL else name.replace(",", ", "),
            f"{statistics.geometric_mean(ratios):.4f}",
            f"{max(ratios):.3f}",
            str(sum(record["unreached"] for record in own)),
            f"{statistics.geometric_mean(peaks):.4f}",
            f"{max(peaks):.4f}",
            f"{statistics.fmean(record['points'] for record in own):.0f}",
            f"{sum(record['seconds'] for record in own):.1f}",
        )


if __name__ == "__main__":
    main()
