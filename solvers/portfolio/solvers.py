"""The portfolio: the heuristic at once, the integer program while it pays, always the better of the two."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

from fxhybrid.ir.plan import GAP_FLOOR_SHARE
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.base import FrontierPoint, SolveResult, Status
from fxhybrid.solvers.ilp.solver import IlpSolver
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.solvers.portfolio.known_plans import PlanSet


class AutoSolver:
    """``MpsSolver`` first, then ``IlpSolver`` from its plan.

    Args:
        time_limit_s: seconds for the integer program.
        gap: stop when the proven gap is at most this.
        backend: ``"highs"`` or ``"cbc"``.
        pays: share of a step; a plan that adds less is not worth improving. By default what the gap ignores.
    """

    def __init__(
        self, *, time_limit_s: float = 15.0, gap: float = 0.01, backend: str = "highs", pays: float | None = None
    ) -> None:
        self.pays = gap * GAP_FLOOR_SHARE if pays is None else pays
        self.mps = MpsSolver()
        self.ilp = IlpSolver(time_limit_s=time_limit_s, gap=gap, backend=backend)

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """The better of both plans, with the integer program's bound."""
        started = time.perf_counter()
        quick = self.mps.solve(problem, budget_bytes, max_error=max_error)
        if quick.status is Status.FEASIBLE and quick.overhead_s <= self.ilp.gap * GAP_FLOOR_SHARE * problem.step_s:
            quick = dataclasses.replace(quick, status=Status.OPTIMAL)
        settled = quick.status in (Status.OPTIMAL, Status.INFEASIBLE)
        known = None if quick.status is Status.UNKNOWN else quick
        exact = None if settled else self.improve(problem, budget_bytes, known, max_error=max_error)
        if exact is None:
            return dataclasses.replace(quick, solver="auto: mps")
        return dataclasses.replace(_better(quick, exact), solve_s=time.perf_counter() - started)

    def improve(
        self, problem: Problem, budget_bytes: int, known: SolveResult | FrontierPoint | None, *, max_error: float
    ) -> SolveResult | None:
        """What the integer program makes of the best plan known; None where looking for a better one does not pay."""
        if known is None:
            return self.ilp.solve(problem, budget_bytes, max_error=max_error)
        if known.overhead_s <= self.pays * problem.step_s:
            return None
        return self.ilp.solve(problem, budget_bytes, max_error=max_error, warm_start=known.actions)


def _better(quick: SolveResult, exact: SolveResult) -> SolveResult:
    """The plan that adds less, or without any the one with the smaller peak, with the better bound."""
    fits = [r.status in (Status.OPTIMAL, Status.FEASIBLE) for r in (quick, exact)]
    if fits[0] and fits[1]:
        use_exact = exact.overhead_s < quick.overhead_s
    elif fits[0] or fits[1]:
        use_exact = fits[1]
    else:
        use_exact = exact.peak_bytes <= quick.peak_bytes
    if use_exact:
        return dataclasses.replace(exact, solver="auto: ilp")
    return dataclasses.replace(
        quick,
        solver="auto: mps",
        status=exact.status if fits[0] and fits[1] else quick.status,
        lower_bound_s=max(quick.lower_bound_s, exact.lower_bound_s),
        details={**quick.details, **exact.details},
    )


@dataclass
class MpsSolver:
    """The cheapest plan of the frontier, fitted to the budget; below the frontier, of the smallest reachable peak."""

    _plans: dict[tuple[int, float], PlanSet] = field(default_factory=dict, repr=False)

    def plans(self, problem: Problem, max_error: float) -> PlanSet:
        """All plans known for the problem, the same set at every call."""
        key = (id(problem), max_error)
        if key not in self._plans:  # the set keeps the problem, so that its id stays taken
            self._plans[key] = PlanSet(problem, build_frontier(problem, max_error=max_error), max_error=max_error)
        return self._plans[key]

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """The cheapest known plan within the budget; see ``Solver``."""
        started = time.perf_counter()
        plans = self.plans(problem, max_error)
        known = plans.fitted(budget_bytes)
        status, point = (known.status, known.point) if known else (plans.unmet(budget_bytes), plans.smallest)
        return SolveResult(
            status,
            point.actions,
            point.peak_bytes,
            point.overhead_s,
            known.lower_bound_s if known else 0.0,
            point.error,
            "mps",
            time.perf_counter() - started,
            {"plans": len(plans.plans)},
            plans.proof() if status is Status.INFEASIBLE else "",
        )
