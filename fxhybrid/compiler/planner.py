"""Which plans are made for a problem, by which solver, and how much error they may add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fxhybrid.ir.problem import Problem
from fxhybrid.options import Options
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.portfolio.extend_plans import frontier_plans
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, KnownPlans, smallest_of
from fxhybrid.solvers.portfolio.solvers import ILP_LIMIT_S, Portfolio

ILP_LEAST_S = 2.0  # of a round that comes when all of ``ILP_LIMIT_S`` is used up
# Plans aim lower than the limit: the error is measured on one batch, and later ones differ.
ERROR_MARGIN = 1 / 3


def error_target(options: Options, more_error: float = 0.0) -> float:
    """Returns the estimated error that plans aim at, for ``max_grad_error`` or for a limit higher by ``more_error``."""
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
        self, problem: Problem, accepted: Iterable[FrontierPoint] = (), near_feasible: Iterable[FrontierPoint] = ()
    ) -> KnownPlans:
        """Makes the frontiers' plans and the solver's own for the budget.

        Args:
            problem: with the errors to plan by.
            accepted: plans that join them.
            near_feasible: plans that are fallbacks where no other one fits.
        """
        known = frontier_plans(problem, max_error=error_target(self.options))
        known = replace(
            known,
            plans=(*known.plans, *map(KnownPlan, accepted)),
            fallback=(*known.fallback, *map(KnownPlan, near_feasible)),
        )
        portfolio = Portfolio(self.options.solver, max(self.ilp_s, ILP_LEAST_S))
        known, ilp_s = portfolio.extend(known, self.budget_bytes)
        self.ilp_s -= ilp_s
        return known


def plans_to_validate(known: KnownPlans, budget_bytes: int) -> list[FrontierPoint]:
    """Returns the smallest plan, and the one for the budget."""
    chosen = known.cheapest(budget_bytes)
    return [smallest_of(known.plans), *([chosen.point] if chosen else [])]
