"""What a call needs at least where other calls of the same step stand beside it."""

from __future__ import annotations

import weakref

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.portfolio.known_plans import KnownPlans
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes, compact_plans, plan_bytes

# By a problem's identity, while it lives: hashing its thousands of numbers takes long.
_COMPACT: dict[int, list[tuple[PlanBytes, Actions]]] = {}
# Every call beside others asks for it; simulating it each time would take as long as a small step.
_SMALLEST: weakref.WeakKeyDictionary[KnownPlans, tuple[PlanBytes, Actions]] = weakref.WeakKeyDictionary()


def search_compact(known: KnownPlans) -> None:
    """Searches for plans that hold little between the halves, once for each problem."""
    problem: Problem = known.problem
    if id(problem) not in _COMPACT and not known.fixed:
        _COMPACT[id(problem)] = [(plan_bytes(problem, a), a) for a in compact_plans(known)]
        weakref.finalize(problem, _COMPACT.pop, id(problem), None)


def least_bytes(known: KnownPlans, n_others: int) -> PlanBytes:
    """Returns what the plan needs by which that many calls beside each other, and one that runs, take least."""
    return least_plans(known, n_others)[0][0]


def least_plans(known: KnownPlans, n_others: int) -> list[tuple[PlanBytes, Actions]]:
    """Returns the plans that were searched for, and the smallest; by which those calls together take least first."""
    if known not in _SMALLEST:
        actions = known.smallest.actions
        _SMALLEST[known] = plan_bytes(known.problem, actions), actions
    plans = [_SMALLEST[known], *_COMPACT.get(id(known.problem), ())]
    return sorted(plans, key=lambda plan: int(plan[0].peak_bytes + n_others * plan[0].held_bytes))
