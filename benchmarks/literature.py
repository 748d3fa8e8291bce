"""Compares plans with those of two planners of the literature, in the same simulator.

* Knapsack: PyTorch's activation memory budget with its dynamic program. Every saved tensor is an item of its own:
  keeping it takes its bytes and saves its op's seconds. No chain costs (an op's sources count as being there), no
  liveness (the sum of the kept bytes is bounded, not the peak).
* Segments: checkpointing every sqrt(n) ops. Only what crosses a border of segments is kept; the rest is recomputed.

Both only save and recompute, so they are compared with a frontier that does no more than that, and with the whole one:

    python -m benchmarks.literature PROBLEM.json ...
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action
from fxhybrid.ir.problem import Problem, without_codecs
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import PlanFrontier
from fxhybrid.solvers.mps.frontier_search import build_frontier

MINUTES = 1
NEEDS = ""

Actions = dict[int, Action]
GRAINS = 2000  # sizes are rounded up to one part in so many of the capacity


def knapsack_plans(problem: Problem, count: int = 20) -> Iterator[Actions]:
    """The knapsack's plans for ``count`` even shares of the saved bytes."""
    items = [t for t in problem.backward_reads if t not in problem.outputs and _may_run_again(problem, t)]
    total = sum(problem.tensors[t].size_bytes for t in items)
    for k in range(count + 1):
        kept = _knapsack(problem, items, total * k // count)
        yield _completed(problem, {t: SAVE if t in kept else RECOMPUTE for t in items})


def segment_plans(problem: Problem) -> Iterator[Actions]:
    """Checkpointing every sqrt(n) forward ops, and every half and double as many."""
    n = len(problem.forward)
    for length in sorted({max(round(math.sqrt(n) * factor), 1) for factor in (0.5, 1.0, 2.0)}):
        crossing = {
            t for i, op in enumerate(problem.forward) for t in op.inputs if problem.producer[t] // length < i // length
        }
        actions: Actions = {t: SAVE if t in crossing else RECOMPUTE for t in problem.candidates}
        yield _completed(problem, actions)


def _knapsack(problem: Problem, items: list[int], capacity: int) -> set[int]:
    """The items worth most seconds within ``capacity`` bytes, by dynamic programming over rounded sizes."""
    grain = max(capacity // GRAINS, 1)
    best = np.zeros(capacity // grain + 1)
    taken: list[np.ndarray] = []
    for t in items:
        size = -(-problem.tensors[t].size_bytes // grain)
        worth = problem.forward[problem.producer[t]].seconds
        better = best.copy()
        if size < len(best):
            better[size:] = np.maximum(best[size:], best[: len(best) - size] + worth)
        taken.append(better > best)
        best = better
    kept, room = set(), len(best) - 1
    for t, took in zip(reversed(items), reversed(taken), strict=True):
        if took[room]:
            kept.add(t)
            room -= -(-problem.tensors[t].size_bytes // grain)
    return kept


def _may_run_again(problem: Problem, t: int) -> bool:
    return problem.forward[problem.producer[t]].recomputable


def _completed(problem: Problem, actions: Actions) -> Actions:
    """Sources that the planner says nothing about are recomputed where they can be: it counts them as free."""
    free = {t: RECOMPUTE if _may_run_again(problem, t) else SAVE for t in problem.candidates}
    wanted = {**free, **actions}
    return {t: action if _may_run_again(problem, t) else SAVE for t, action in wanted.items()}


def _beaten(frontier: PlanFrontier, peak_bytes: int, overhead_s: float) -> bool:
    point = frontier.point_for(peak_bytes)
    return point is not None and point.overhead_s <= overhead_s


def main(paths: list[str]) -> int:
    """Prints every plan and ours at the same peak; gives how many were not dominated."""
    failures = 0
    for path in paths:
        problem = Problem.from_json(Path(path).read_text(encoding="utf-8"))
        hybrid = build_frontier(problem, max_error=0.05)
        recompute_only = build_frontier(without_codecs(problem), max_error=0.0)
        for name, plans in (("knapsack", knapsack_plans(problem)), ("segments", segment_plans(problem))):
            lines = [simulate_actions(problem, actions) for actions in plans]
            beaten = [
                sum(_beaten(frontier, line.peak_bytes, line.overhead_s) for line in lines)
                for frontier in (recompute_only, hybrid)
            ]
            print(
                f"{Path(path).stem:12} {name}: of {len(lines)} plans recompute only beats {beaten[0]}, all {beaten[1]}"
            )
            failures += 2 * len(lines) - sum(beaten)
    return failures


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
