"""What a call needs at least where other calls of the same step stand beside it."""

from __future__ import annotations

import weakref

from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.portfolio.known_plans import KnownPlans
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes, compact_plans, plan_bytes

# By a problem's identity, while it lives: hashing its thousands of numbers takes long.
_COMPACT: dict[int, list[PlanBytes]] = {}


def search_compact(known: KnownPlans) -> None:
    """Searches for plans that hold little between the halves, once for each problem."""
    problem: Problem = known.problem
    if id(problem) not in _COMPACT and not known.fixed:
        _COMPACT[id(problem)] = [plan_bytes(problem, actions) for actions in compact_plans(known)]
        weakref.finalize(problem, _COMPACT.pop, id(problem), None)


def least_bytes(known: KnownPlans, n_others: int) -> PlanBytes:
    """Returns what the plan needs by which that many calls beside each other, and one that runs, take least."""
    smallest = plan_bytes(known.problem, known.smallest.actions)
    plans = [smallest, *_COMPACT.get(id(known.problem), ())]

    def together_bytes(needs: PlanBytes) -> int:
        return needs.peak_bytes + n_others * needs.held_bytes

    least: PlanBytes = min(plans, key=together_bytes)
    return least
