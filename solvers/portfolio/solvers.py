"""The portfolio: the heuristic's plans at once, polished for the budget, and a solver's own where that pays.

The compiler extends the plans that it holds; ``solve`` starts from nothing and does the same, as a ``Solver``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.base import Solver, SolveResult, Status
from fxhybrid.solvers.ilp.solver import IlpSolver
from fxhybrid.solvers.portfolio.extend_plans import frontier_plans, polish_for
from fxhybrid.solvers.portfolio.known_plans import KnownPlans, add_result

ILP_LIMIT_S = 15.0
ILP_PAYS = 2e-3  # share of a step: a smaller overhead is not worth the integer program's seconds


@dataclass(frozen=True)
class Portfolio:
    """The solvers that a user asks for by name, or one of the user's own after the heuristic.

    Attributes:
        solver: ``"mps"`` for the heuristic alone; ``"ilp"`` for the integer program after it, for each budget;
            ``"auto"`` for that where it pays; or a solver of one's own, called after the heuristic.
        ilp_limit_s: seconds that the integer program may take for one budget.
    """

    solver: str | Solver = "auto"
    ilp_limit_s: float = ILP_LIMIT_S

    def extend(self, known: KnownPlans, budget_bytes: int) -> tuple[KnownPlans, float]:
        """Adds the best plans that can be found for a budget.

        Args:
            known: plans to start from.
            budget_bytes: limit of the peak.

        Returns:
            A larger set, whose ``cheapest`` is the answer; and the seconds that the integer program took.
        """
        known = polish_for(known, budget_bytes)
        if not isinstance(self.solver, str):
            own = self.solver.solve(known.problem, budget_bytes, max_error=known.max_error)
            return add_result(known, own, budget_bytes), 0.0
        if not self._ilp_pays(known, budget_bytes):
            return known, 0.0
        plan = known.cheapest(budget_bytes)
        ilp = IlpSolver(time_limit_s=self.ilp_limit_s)
        warm_start = plan.point.actions if plan else None
        result = ilp.solve(known.problem, budget_bytes, max_error=known.max_error, warm_start=warm_start)
        return add_result(known, result, budget_bytes), result.solve_s

    def _ilp_pays(self, known: KnownPlans, budget_bytes: int) -> bool:
        if self.solver == "mps":
            return False
        plan = known.cheapest(budget_bytes)
        if plan is None:
            return known.unmet(budget_bytes) is not Status.INFEASIBLE
        return plan.point.overhead_s > (ILP_PAYS * known.problem.step_s if self.solver == "auto" else 0.0)

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """Returns the best plan found from nothing; see ``Solver``.

        Raises:
            ProblemError: the problem is malformed.
        """
        started = time.perf_counter()
        known, _ = self.extend(frontier_plans(problem, max_error=max_error), budget_bytes)
        return result_for(known, budget_bytes, solve_s=time.perf_counter() - started)


def result_for(known: KnownPlans, budget_bytes: int, *, solve_s: float = 0.0) -> SolveResult:
    """Returns what is known for a budget: the cheapest plan, or the smallest one and why none fits."""
    plan = known.cheapest(budget_bytes)
    status, point = (plan.status, plan.point) if plan else (known.unmet(budget_bytes), known.smallest)
    return SolveResult(
        status,
        point.actions,
        point.peak_bytes,
        point.overhead_s,
        plan.lower_bound_s if plan else 0.0,
        point.error,
        plan.solver if plan else "mps",
        solve_s,
        {"plans": len(known.plans)},
        known.proof() if status is Status.INFEASIBLE else "",
    )
