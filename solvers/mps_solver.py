"""The heuristic as a solver: looks budgets up in a problem's plans, which are made at the first call."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.base import SolveResult, Status
from fxhybrid.solvers.mps import build_ladder
from fxhybrid.solvers.planset import PlanSet


@dataclass
class MpsSolver:
    """The cheapest plan of the ladder, fitted to the budget; below the ladder, of the smallest reachable peak."""

    _plans: dict[tuple[int, float], PlanSet] = field(default_factory=dict, repr=False)

    def plans(self, problem: Problem, max_error: float) -> PlanSet:
        """All plans known for the problem, the same set at every call."""
        key = (id(problem), max_error)
        if key not in self._plans:  # the set keeps the problem, so that its id stays taken
            self._plans[key] = PlanSet(problem, build_ladder(problem, max_error=max_error), max_error=max_error)
        return self._plans[key]

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """The cheapest known plan within the budget; see ``Solver``."""
        started = time.perf_counter()
        plans = self.plans(problem, max_error)
        known = plans.fitted(budget_bytes)
        status, rung = (known.status, known.rung) if known else (plans.unmet(budget_bytes), plans.smallest)
        return SolveResult(
            status,
            rung.actions,
            rung.peak_bytes,
            rung.added_s,
            known.lower_bound_s if known else 0.0,
            rung.error,
            "mps",
            time.perf_counter() - started,
            {"plans": len(plans.plans)},
            plans.proof() if status is Status.INFEASIBLE else "",
        )
