"""Which plans are made for a problem, by which solver, and how much error they may add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fxhybrid.errors import PlanError, PlanMismatchError
from fxhybrid.ir.plan import Actions, Plan
from fxhybrid.ir.problem import Problem
from fxhybrid.options import Options
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.portfolio.extend_plans import frontier_plans
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, KnownPlans, simulated
from fxhybrid.solvers.portfolio.solvers import ILP_LIMIT_S, Portfolio

ILP_LEAST_S = 2.0  # of a round that comes when all of ``ILP_LIMIT_S`` is used up
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
    ilp_s: float = ILP_LIMIT_S

    def __call__(
        self, problem: Problem, accepted: Iterable[FrontierPoint] = (), fallback: Iterable[FrontierPoint] = ()
    ) -> KnownPlans:
        """The frontiers' plans, the ``accepted``, the solver's own for the budget, and a ``fallback`` if none fits."""
        known = frontier_plans(problem, max_error=error_target(self.options))
        known = replace(
            known,
            plans=(*known.plans, *map(KnownPlan, accepted)),
            fallback=(*known.fallback, *map(KnownPlan, fallback)),
        )
        portfolio = Portfolio(self.options.solver, max(self.ilp_s, ILP_LEAST_S))
        known, ilp_s = portfolio.extend(known, self.budget_bytes)
        self.ilp_s -= ilp_s
        return known


def carried_plan(problem: Problem, plan: Plan, actions: Actions) -> KnownPlan:
    """A plan made elsewhere, with the figures that its ``actions`` have here.

    Raises:
        PlanMismatchError: an action cannot be carried out here.
    """
    try:
        point = simulated(problem, actions)
    except PlanError as error:
        raise PlanMismatchError(
            f"the plan cannot be carried out here: {error}; plan again with fxhybrid.plan"
        ) from error
    return KnownPlan(point, plan.solver, solve_s=plan.solve_s)
