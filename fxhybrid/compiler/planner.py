"""Which plans are made for a problem, by which solver, and how much error they may add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fxhybrid.errors import PlanError, PlanMismatchError
from fxhybrid.ir.plan import Actions, Plan
from fxhybrid.ir.problem import Problem
from fxhybrid.options import Options
from fxhybrid.solvers.base import FrontierPoint, Status
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, PlanSet, frontier_plans, judged
from fxhybrid.solvers.portfolio.solvers import AutoSolver

ILP_SECONDS = 15.0
ILP_LEAST_SECONDS = 2.0  # of a round that comes when these are used up
ILP_PAYS = 2e-3  # share of a step below which looking for a better plan is not worth it
# Plans aim lower than the limit: the error is measured on one batch, and later ones differ.
ERROR_MARGIN = 1 / 3


def error_target(options: Options, more_error: float = 0.0) -> float:
    """The estimated error that plans aim at, for ``max_grad_error`` or for a limit higher by ``more_error``."""
    return ERROR_MARGIN * (options.max_grad_error + more_error)


@dataclass
class PlanMaker:
    """Makes plans for one budget, in several rounds where measured errors are not the estimated ones.

    Attributes:
        options: what the user asked for.
        budget_bytes: the budget.
        ilp_s: seconds that are left of those that the integer program may take in all rounds.
    """

    options: Options
    budget_bytes: int
    ilp_s: float = ILP_SECONDS

    def __call__(
        self, problem: Problem, kept: Iterable[FrontierPoint] = (), reserve: Iterable[FrontierPoint] = ()
    ) -> PlanSet:
        """The frontiers' plans, those ``kept``, the solver's own for the budget, and a ``reserve`` if no other fits."""
        plans = frontier_plans(problem, max_error=error_target(self.options))
        plans.plans += map(KnownPlan, kept)
        plans.reserve += map(KnownPlan, reserve)
        self.ilp_s -= solve_for(plans, self.options, self.budget_bytes, self.ilp_s)
        return plans


def solve_for(plans: PlanSet, options: Options, budget_bytes: int, ilp_s: float = ILP_SECONDS) -> float:
    """Fits the known plans to a budget, and adds the solver's own plan for it.

    Args:
        plans: what is known; the new plan joins them.
        options: which solver, and how much error is allowed.
        budget_bytes: limit of the peak.
        ilp_s: seconds that the integer program may take, but ``ILP_LEAST_SECONDS`` in any case.

    Returns:
        Seconds that it took.
    """
    solver, problem, limit = options.solver, plans.problem, error_target(options)
    known = plans.fitted(budget_bytes)
    if not isinstance(solver, str):
        plans.add(solver.solve(problem, budget_bytes, max_error=limit), budget_bytes)
    elif solver != "mps" and (known is not None or plans.unmet(budget_bytes) is not Status.INFEASIBLE):
        time_limit_s = max(ilp_s, ILP_LEAST_SECONDS)
        auto = AutoSolver(time_limit_s=time_limit_s, pays=ILP_PAYS if solver == "auto" else 0.0)
        result = auto.improve(problem, budget_bytes, known.point if known else None, max_error=limit)
        if result is not None:
            plans.add(result, budget_bytes)
            return result.solve_s
    return 0.0


def carried_plan(problem: Problem, plan: Plan, actions: Actions) -> KnownPlan:
    """A plan made elsewhere, with the figures that its ``actions`` have here.

    Raises:
        PlanMismatchError: an action cannot be carried out here.
    """
    try:
        point = judged(problem, actions)
    except PlanError as error:
        raise PlanMismatchError(
            f"the plan cannot be carried out here: {error}; plan again with fxhybrid.plan"
        ) from error
    return KnownPlan(point, plan.solver, solve_s=plan.solve_s)
