"""Decides ADR 5: measures what making a tensor more than once would save.

From the smallest plan of the frontier, each recomputed or compressed tensor in turn is dropped again between distant
uses, and this is kept where it lowers the heights near the peak, until nothing changes. Runs on the recorded
problems, on plain numbers; the peaks are the simulator's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.table import Table

from benchmarks.lib.common import names_of, wide_console
from benchmarks.lib.record_corpus import MAX_ERROR, load, names
from fxhybrid.ir.plan import RECOMPUTE, RECOMPUTE_AGAIN, Action, Actions, Compress
from fxhybrid.ir.problem import Problem, without_codecs
from fxhybrid.ir.simulator import Timeline, simulate_actions
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.units import format_bytes

MINUTES = 2
NEEDS = ""

NEAR_PEAK = 0.98  # heights above this share of the peak count


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one row per problem and technique."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.repeats", description=__doc__)
    parser.add_argument("--problems", metavar="LIST", help=f"default: {','.join(names())}")
    console = wide_console()
    table = Table(title="smallest peak, each tensor made once or more often")
    for column in ("problem", "compression", "save all", "once", "more often", "saved", "tensors", "added / step"):
        table.add_column(column, justify="left" if column in ("problem", "compression") else "right")
    for name in names_of(parser.parse_args(argv).problems, names(), "problem"):
        for compression in (True, False):
            table.add_row(name, "auto" if compression else "off", *_row(load(name), compression))
    console.print(table)


def _row(problem: Problem, compression: bool) -> tuple[str, ...]:
    frontier = build_frontier(problem if compression else without_codecs(problem), max_error=MAX_ERROR)
    once = frontier.points[-1]
    actions, often = made_again(problem, once.actions)
    count = sum(action is RECOMPUTE_AGAIN or getattr(action, "again", False) for action in actions.values())
    return (
        format_bytes(frontier.points[0].peak_bytes),
        format_bytes(once.peak_bytes),
        format_bytes(often.peak_bytes),
        f"{1 - often.peak_bytes / once.peak_bytes:.1%}",
        str(count),
        f"{once.overhead_s / problem.step_s:.3f} -> {often.overhead_s / problem.step_s:.3f}",
    )


def made_again(problem: Problem, start: Actions) -> tuple[dict[int, Action], Timeline]:
    """Actions that peak no higher than ``start`` by making tensors more than once, and their timeline."""
    actions: dict[int, Action] = {t: RECOMPUTE for i in problem.deferrable for t in problem.forward[i].outputs}
    actions |= start
    best = simulate_actions(problem, actions)
    improved = True
    while improved:
        improved, target = False, best.peak_bytes
        for t, action in list(actions.items()):
            switched = _switched(action)
            if switched is None:
                continue
            trial = {**actions, t: switched}
            found = simulate_actions(problem, trial)
            if _excess(found, target) < 0.9999 * _excess(best, target):
                actions, best, improved = trial, found, True
    return actions, best


def _switched(action: Action) -> Action | None:
    """The action with making again turned on, or off; None for a tensor that is kept."""
    if isinstance(action, Compress):
        return replace(action, again=not action.again)
    return {RECOMPUTE: RECOMPUTE_AGAIN, RECOMPUTE_AGAIN: RECOMPUTE}.get(action)


def _excess(line: Timeline, target: int) -> float:
    over = np.maximum(line.during_bytes - NEAR_PEAK * target, 0.0)
    return float((over * over).sum())


if __name__ == "__main__":
    main()
