"""All plans known for one problem: the ladder's, and what other solvers added for single budgets.

The choice for a budget is the cheapest known plan that fits. Over a fixed set this makes a sweep monotone: as
the budget falls, the added time never falls, and since cheaper plans that fit are always taken, neither does
the peak rise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxhybrid.errors import BudgetError, format_bytes
from fxhybrid.plan import SAVE, Action, Actions
from fxhybrid.problem import Problem
from fxhybrid.schedule import lower
from fxhybrid.solvers.base import SolveResult, Status, default_action, plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.mps import Ladder, Rung
from fxhybrid.timeline import describe_peak, simulate, simulate_actions

PROVEN = 0.01  # a plan this close to the bound counts as the best


@dataclass(frozen=True)
class KnownPlan:
    """One plan with its simulated figures and where it came from.

    Attributes:
        rung: actions, peak, added seconds and error.
        solver: which solver found it.
        status: what that solver claims for the budget it was found for.
        found_for_bytes: that budget; 0 for the ladder's.
        lower_bound_s: no plan for that budget adds less.
        solve_s: seconds spent on it.
    """

    rung: Rung
    solver: str = "mps"
    status: Status = Status.FEASIBLE
    found_for_bytes: int = 0
    lower_bound_s: float = 0.0
    solve_s: float = 0.0


class PlanSet:
    """Known plans of one problem."""

    def __init__(self, problem: Problem, ladder: Ladder, solve_s: float = 0.0) -> None:
        self.problem = problem
        self.plans: list[KnownPlan] = []
        for rung in ladder.rungs:
            self._take(KnownPlan(rung, solve_s=solve_s))

    def _take(self, plan: KnownPlan) -> None:
        """Adds a plan, and the same without masks whose sources are kept anyway if that is faster."""
        self.plans.append(plan)
        actions = without_needless_masks(self.problem, plan.rung.actions)
        if len(actions) < len(plan.rung.actions):
            rung = judged(self.problem, actions)
            if rung.added_s < plan.rung.added_s:
                self.plans.append(replace(plan, rung=rung))

    def add(self, result: SolveResult, budget_bytes: int) -> None:
        """Takes in what a solver found for ``budget_bytes``, judged by the simulator; misses are ignored."""
        if result.status not in (Status.OPTIMAL, Status.FEASIBLE):
            return
        rung = judged(self.problem, result.actions)
        self._take(KnownPlan(rung, result.solver, result.status, budget_bytes, result.lower_bound_s, result.solve_s))

    def checked(self, limit_bytes: int) -> KnownPlan | None:
        """The cheapest plan that the simulator itself finds within the limit.

        Rungs carry the heuristic's own figures, which tests hold equal to the simulator's. One that differs all
        the same is forgotten here, before it can run.
        """
        while (known := self.cheapest(limit_bytes)) is not None:
            if judged(self.problem, known.rung.actions).peak_bytes <= limit_bytes:
                return known
            self.plans = [plan for plan in self.plans if plan.rung.actions is not known.rung.actions]
        return None

    def cheapest(self, limit_bytes: int) -> KnownPlan | None:
        """The cheapest plan that peaks at or under the limit, with the best bound known for that limit."""
        fitting = [plan for plan in self.plans if plan.rung.peak_bytes <= limit_bytes]
        if not fitting:
            return None
        best = min(fitting, key=lambda plan: (plan.rung.added_s, plan.rung.peak_bytes))
        # a bound for a larger budget holds for this one, too
        bounds = [p.lower_bound_s for p in self.plans if p.found_for_bytes >= limit_bytes]
        bound = min(max(bounds, default=0.0), best.rung.added_s)
        gap = (best.rung.added_s - bound) / max(best.rung.added_s, 1e-3 * self.problem.step_s, 1e-12)
        status = Status.OPTIMAL if gap <= PROVEN else Status.FEASIBLE
        return replace(best, lower_bound_s=bound, status=status)

    @property
    def smallest(self) -> Rung:
        """The plan with the smallest peak."""
        return min((plan.rung for plan in self.plans), key=lambda rung: rung.peak_bytes)

    def budget_error(self, budget_bytes: int, beside_bytes: int) -> BudgetError:
        """The error for a budget that no known plan meets.

        Args:
            budget_bytes: what was asked for.
            beside_bytes: older gradients that stand beside the plan; 0 if there are none.
        """
        schedule = lower(self.problem, self.smallest.actions)
        holder = describe_peak(self.problem, schedule, simulate(self.problem, schedule))
        minimum = self.smallest.peak_bytes + beside_bytes
        bound = peak_lower_bound(self.problem)[0] + beside_bytes
        state = " while gradients of an earlier backward pass exist" if beside_bytes else ""
        return BudgetError(
            f"the budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) cannot be met{state}: the "
            f"smallest known plan peaks at {minimum} bytes ({format_bytes(minimum)}), held by {holder}; no plan "
            f"can go below {format_bytes(bound)}. Raise the budget, shrink the batch, or allow more: "
            'compression="auto", a larger max_grad_error',
            budget_bytes=budget_bytes,
            minimum_bytes=minimum,
            minimum_lower_bound_bytes=bound,
            holder=holder,
        )


def judged(problem: Problem, actions: Actions) -> Rung:
    """``actions`` with the figures that the simulator gives them."""
    line = simulate_actions(problem, actions)
    return Rung(actions, line.peak_bytes, line.added_s, plan_error(problem, actions))


def without_needless_masks(problem: Problem, actions: Actions) -> dict[int, Action]:
    """``actions`` less the masks that are kept although all they are made from is kept as it is.

    Solvers count keeping a mask as free; it is the one cost that they do not see.
    """

    def is_saved(t: int) -> bool:
        return t in problem.outputs or actions.get(t, default_action(problem, t)) is SAVE

    masks = (problem.forward[op.fusion.op] for op in problem.backward if op.fusion)
    needless = {t for mask in masks if all(map(is_saved, mask.inputs)) for t in mask.outputs}
    return {t: action for t, action in actions.items() if t not in needless}
