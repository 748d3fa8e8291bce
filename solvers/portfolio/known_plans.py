"""All plans known for one problem: the frontier's, and what other solvers added for single budgets.

The choice for a budget is the cheapest known plan that fits. Over a fixed set this makes a sweep monotone: as
the budget falls, the added time never falls, and since cheaper plans that fit are always taken, neither does
the peak rise. Plans fitted to single budgets join the set as these are asked for. Where no plan fits, those of
stricter error limits are looked at, and then the smallest reachable peak is looked for, both once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fxhybrid.errors import BudgetError
from fxhybrid.ir.plan import SAVE, Action, Actions, relative_gap
from fxhybrid.ir.problem import Problem, single_techniques
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.simulator import describe_peak, simulate, simulate_actions
from fxhybrid.solvers.base import FrontierPoint, PlanFrontier, SolveResult, Status, default_action, plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.ilp.lp_bound import AddedBound, added_lower_bound
from fxhybrid.solvers.ilp.min_peak import MinPeak, MinPeakSolver
from fxhybrid.solvers.mps.frontier_search import Effort, build_frontier
from fxhybrid.solvers.mps.polish import fitted
from fxhybrid.units import format_bytes

PROVEN = 0.01  # a plan this close to the bound counts as the best
LESS_EFFORT = Effort(moves=(7_500, 0.0))  # for one technique alone: fewer choices
STRICTER = (0.02 / 3, 0.1 / 3)  # what plans aim at for a ``max_grad_error`` of 0.02 and 0.1
LOOK_LOWER_S = 5.0  # half of the recorded problems' smallest peaks are proven in a second, the rest not in 20


@dataclass(frozen=True)
class KnownPlan:
    """One plan with its simulated figures and where it came from.

    Attributes:
        point: actions, peak, added seconds and error.
        solver: which solver found it.
        status: how close to ``lower_bound_s`` it is; set when it is chosen for a budget.
        lower_bound_s: no plan for that budget adds less.
        solve_s: seconds spent on it.
    """

    point: FrontierPoint
    solver: str = "mps"
    status: Status = Status.FEASIBLE
    lower_bound_s: float = 0.0
    solve_s: float = 0.0


class PlanSet:
    """Known plans of one problem.

    Attributes:
        plans: all of them but the reserve.
        reserve: plans that are taken where no other known one fits; their error is above ``max_error``.
        bounds_s: per budget, what every plan for it adds at least.
        lower_bound_bytes: no plan that makes each tensor at most once more peaks below; the cheap
            bound until ``look_lower`` raises it.
        min_peak: what ``look_lower`` found; None before.
        fixed: whether these very plans are to be carried out, and no fitted ones.
        alone: plans of recomputing only and of compressing only, if ``frontier_plans`` made this and there are codecs.
    """

    def __init__(self, problem: Problem, frontier: PlanFrontier, *, max_error: float, solve_s: float = 0.0) -> None:
        self.problem = problem
        self.max_error = max_error
        self.plans: list[KnownPlan] = []
        self.reserve: list[KnownPlan] = []
        self.bounds_s: dict[int, float] = {}
        self.lower_bound_bytes = peak_lower_bound(problem)[0]
        self.min_peak: MinPeak | None = None
        self.alone: tuple[PlanSet, ...] = ()
        self.fixed = False
        self._fitted: dict[int, float] = {}  # limits that the cheapest plan was fitted to, and what it added then
        self._looked_stricter = False
        for point in frontier.points:
            self._take(KnownPlan(point, solve_s=solve_s))

    def _take(self, plan: KnownPlan) -> None:
        """Adds a plan, and the same without masks whose sources are kept anyway if that is faster."""
        self.plans.append(plan)
        actions = without_needless_masks(self.problem, plan.point.actions)
        if len(actions) < len(plan.point.actions):
            point = judged(self.problem, actions)
            if point.overhead_s < plan.point.overhead_s:
                self.plans.append(replace(plan, point=point))

    def add(self, result: SolveResult, budget_bytes: int) -> None:
        """Takes in what a solver found for ``budget_bytes``, judged by the simulator; misses are ignored."""
        if result.status not in (Status.OPTIMAL, Status.FEASIBLE):
            return
        self._bound(budget_bytes, result.lower_bound_s)
        self._take(KnownPlan(judged(self.problem, result.actions), result.solver, solve_s=result.solve_s))

    def join(self, other: PlanSet) -> None:
        """Takes in the plans of a problem that offers less of the same, or of a stricter error limit."""
        self.plans += other.plans
        self.reserve += other.reserve

    def prove(self, budget_bytes: int) -> AddedBound:
        """Bounds what any plan for a budget adds, by linear programming; ``cheapest`` knows it from then on."""
        known = self.cheapest(budget_bytes)
        actions = known.point.actions if known else self.smallest.actions
        bound = added_lower_bound(self.problem, budget_bytes, max_error=self.max_error, known=actions)
        if math.isinf(bound.overhead_s):
            self.lower_bound_bytes = max(self.lower_bound_bytes, budget_bytes + 1)
        else:
            self._bound(budget_bytes, bound.overhead_s)
        return bound

    def _bound(self, budget_bytes: int, overhead_s: float) -> None:
        self.bounds_s[budget_bytes] = max(overhead_s, self.bounds_s.get(budget_bytes, 0.0))

    def checked(self, limit_bytes: int) -> KnownPlan | None:
        """The cheapest plan that the simulator itself finds within the limit; looks for one if none is known.

        Points carry the heuristic's own figures, which tests hold equal to the simulator's. One that differs all
        the same is forgotten here, before it can run.
        """
        if not _within(self.plans, limit_bytes):
            self._look_stricter()
        while (known := self.cheapest(limit_bytes)) is not None:
            if judged(self.problem, known.point.actions).peak_bytes <= limit_bytes:
                return known
            for plans in (self.plans, self.reserve):
                plans[:] = [plan for plan in plans if plan.point.actions is not known.point.actions]
        if self.min_peak is None and limit_bytes >= self.lower_bound_bytes:
            self.look_lower()
            return self.checked(limit_bytes)
        return None

    def fitted(self, limit_bytes: int) -> KnownPlan | None:
        """``checked``, after the cheapest plan was fitted to this very limit; what that gives is known from then on.

        A fit that adds less than what was given for a larger limit is left: sweeps are to be monotone in either order.
        """
        known = self.checked(limit_bytes)
        if known is None or self.fixed or limit_bytes in self._fitted:
            return known
        actions = fitted(self.problem, known.point.actions, limit_bytes, max_error=self.max_error)
        if actions is not None:
            point = judged(self.problem, actions)
            larger = (overhead_s for limit, overhead_s in self._fitted.items() if limit > limit_bytes)
            if point.overhead_s >= max(larger, default=0.0):
                self._take(replace(known, point=point))
                known = self.checked(limit_bytes)
        self._fitted[limit_bytes] = known.point.overhead_s if known else 0.0
        return known

    def _look_stricter(self) -> None:
        """Takes in plans of stricter error limits: each search is a heuristic, and one of these may reach lower."""
        if self._looked_stricter:
            return
        self._looked_stricter = True
        codecs = [codec for tensor in self.problem.tensors for codec in tensor.codecs if not codec.lossless]
        if any(codec.error <= self.max_error for codec in codecs):
            for limit in (limit for limit in STRICTER if limit < self.max_error):
                for point in build_frontier(self.problem, max_error=limit).points:
                    self._take(KnownPlan(point))

    def look_lower(self) -> None:
        """Takes in the smallest reachable peak, as far as that is found and proven in ``LOOK_LOWER_S``."""
        if self.min_peak is not None:
            return
        self._look_stricter()
        solver = MinPeakSolver(time_limit_s=LOOK_LOWER_S)
        found = solver.solve(self.problem, max_error=self.max_error, warm_start=smallest_of(self.plans).actions)
        self.min_peak, self.lower_bound_bytes = found, found.lower_bound_bytes
        if found.peak_bytes < self.smallest.peak_bytes:
            self._take(KnownPlan(judged(self.problem, found.actions), "min peak", solve_s=found.solve_s))

    def unmet(self, limit_bytes: int) -> Status:
        """What is known of a limit that no known plan meets."""
        return Status.INFEASIBLE if limit_bytes < self.lower_bound_bytes else Status.UNKNOWN

    def cheapest(self, limit_bytes: int) -> KnownPlan | None:
        """The cheapest plan that peaks at or under the limit, with the best bound known for that limit."""
        fitting = _within(self.plans, limit_bytes) or _within(self.reserve, limit_bytes)
        if not fitting:
            return None
        # of plans that cost nothing, the one that does nothing
        best = min(
            fitting,
            key=lambda plan: (plan.point.overhead_s, bool(plan.point.actions), plan.point.error, plan.point.peak_bytes),
        )
        # a bound for a larger budget holds for this one, too
        bounds = [bound_s for budget_bytes, bound_s in self.bounds_s.items() if budget_bytes >= limit_bytes]
        bound = min(max(bounds, default=0.0), best.point.overhead_s)
        gap = relative_gap(best.point.overhead_s, bound, self.problem.step_s)
        status = Status.OPTIMAL if gap <= PROVEN else Status.FEASIBLE
        return replace(best, lower_bound_s=bound, status=status)

    def proof(self) -> str:
        """Why no plan peaks lower than ``lower_bound_bytes``, in words."""
        if self.min_peak is not None:
            return str(self.min_peak)
        bound, holder = peak_lower_bound(self.problem)
        return f"no plan peaks below {bound} bytes ({format_bytes(bound)}), held by {holder}"

    @property
    def smallest(self) -> FrontierPoint:
        """The plan with the smallest peak."""
        return smallest_of(self.plans + self.reserve)

    def budget_error(self, budget_bytes: int, beside_bytes: int) -> BudgetError:
        """The error for a budget that no known plan meets.

        Args:
            budget_bytes: what was asked for.
            beside_bytes: older gradients that stand beside the plan; 0 if there are none.
        """
        schedule = lower(self.problem, self.smallest.actions)
        holder = describe_peak(self.problem, schedule, simulate(self.problem, schedule))
        minimum = self.smallest.peak_bytes + beside_bytes
        bound = min(self.lower_bound_bytes + beside_bytes, minimum)  # one in reserve is not bound by it
        state = " while gradients of an earlier backward pass exist" if beside_bytes else ""
        return BudgetError(
            f"the budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) cannot be met{state}: the "
            f"smallest known plan peaks at {minimum} bytes ({format_bytes(minimum)}), held by {holder}; no plan "
            f"that makes each tensor at most once more can go below {format_bytes(bound)}. Raise the budget, shrink "
            "the batch, or allow more: "
            'compression="auto", a larger max_grad_error',
            budget_bytes=budget_bytes,
            minimum_bytes=minimum,
            minimum_lower_bound_bytes=bound,
            holder=holder,
        )


def frontier_plans(problem: Problem, *, max_error: float) -> PlanSet:
    """The plans of the heuristic's frontiers: of all techniques, and of each one alone."""

    def of(offered: Problem, effort: Effort) -> PlanSet:
        start = time.perf_counter()
        frontier = build_frontier(offered, max_error=max_error, effort=effort)
        return PlanSet(offered, frontier, max_error=max_error, solve_s=time.perf_counter() - start)

    plans = of(problem, Effort())
    plans.alone = tuple(of(alone, LESS_EFFORT) for alone in single_techniques(problem))
    for other in plans.alone:  # the heuristic misses some plans of one technique among all the others
        plans.join(other)
    return plans


def _within(plans: Iterable[KnownPlan], limit_bytes: int) -> list[KnownPlan]:
    return [plan for plan in plans if plan.point.peak_bytes <= limit_bytes]


def smallest_of(plans: Iterable[KnownPlan]) -> FrontierPoint:
    """The plan with the smallest peak."""
    return min((plan.point for plan in plans), key=lambda point: point.peak_bytes)


def judged(problem: Problem, actions: Actions) -> FrontierPoint:
    """``actions`` with the figures that the simulator gives them."""
    line = simulate_actions(problem, actions)
    return FrontierPoint(actions, line.peak_bytes, line.overhead_s, plan_error(problem, actions))


def without_needless_masks(problem: Problem, actions: Actions) -> dict[int, Action]:
    """``actions`` less the masks that are kept although all they are made from is kept as it is.

    Solvers count keeping a mask as free; it is the one cost that they do not see.
    """

    def is_saved(t: int) -> bool:
        return t in problem.outputs or actions.get(t, default_action(problem, t)) is SAVE

    masks = (problem.forward[op.fusion.op] for op in problem.backward if op.fusion)
    needless = {t for mask in masks if all(map(is_saved, mask.inputs)) for t in mask.outputs}
    return {t: action for t, action in actions.items() if t not in needless}
