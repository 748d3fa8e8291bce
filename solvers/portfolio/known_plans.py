"""All plans known for one problem, and what is proven about those that are not.

The choice for a budget is the cheapest known plan that fits. Over a fixed set this makes a sweep monotone: as the
budget falls, the overhead never falls, and since cheaper plans that fit are always taken, neither does the peak rise. A
set is never changed: ``add``, ``join`` and the functions of ``extend_plans`` return a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fxhybrid.errors import BudgetError
from fxhybrid.ir.plan import SAVE, Action, Actions, relative_gap
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.simulator import describe_peak, simulate, simulate_actions
from fxhybrid.solvers.base import FrontierPoint, SolveResult, Status, default_action, plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.ilp.min_peak import MinPeak
from fxhybrid.units import format_bytes

WAYS_OUT = (
    'Raise the budget, shrink the batch, or allow more: compression="auto" (the default), a larger max_grad_error'
)
PROVEN = 0.01  # a plan whose relative gap is at most this counts as optimal


@dataclass(frozen=True)
class KnownPlan:
    """One plan with its simulated figures and where it came from.

    Attributes:
        point: actions, peak, overhead and error.
        solver: which solver found it.
        status: how close to ``lower_bound_s`` it is; set when it is chosen for a budget.
        lower_bound_s: no plan for that budget has a smaller overhead.
        solve_s: seconds spent on it.
    """

    point: FrontierPoint
    solver: str = "mps"
    status: Status = Status.FEASIBLE
    lower_bound_s: float = 0.0
    solve_s: float = 0.0


@dataclass(frozen=True, eq=False)
class KnownPlans:
    """The plans and bounds known for one problem.

    Attributes:
        problem: the step.
        max_error: limit of the root of the sum of squared lossy errors.
        plans: plans within ``max_error``.
        fallback: plans above ``max_error``, chosen where no other known one fits.
        bounds_s: per budget in bytes, a lower bound of the overhead of every plan for it.
        lower_bound_bytes: no plan that makes each tensor at most once more peaks below; a cheap bound until
            ``min_peak`` is known.
        min_peak: the smallest peak as far as it is found and proven; None before the search for it.
        alone: plans of recomputing only and of compressing only, where the problem offers both.
        fixed: whether these very plans are to be carried out, and no polished ones.
        polished_s: limits in bytes that the cheapest plan was polished for, with the overhead that it had then.
        has_stricter: whether plans of stricter error limits are among ``plans``.
        from_other_sizes: plans of the same step in another form, with the figures that they have there, the cheapest
            first; ``ensure`` simulates those that a limit needs, which join ``plans`` then.
        searched: limits of several kinds (``limited_plans``) that plans were searched for.
    """

    problem: Problem
    max_error: float
    plans: tuple[KnownPlan, ...] = ()
    fallback: tuple[KnownPlan, ...] = ()
    bounds_s: Mapping[int, float] = field(default_factory=dict)
    lower_bound_bytes: int = 0
    min_peak: MinPeak | None = None
    alone: tuple[KnownPlans, ...] = ()
    fixed: bool = False
    polished_s: Mapping[int, float] = field(default_factory=dict)
    has_stricter: bool = False
    from_other_sizes: tuple[KnownPlan, ...] = ()
    searched: frozenset[object] = frozenset()

    def cheapest(self, limit_bytes: int) -> KnownPlan | None:
        """Returns the cheapest plan that peaks at or under the limit, with the best bound known for that limit."""
        fitting = within(self.plans, limit_bytes) or within(self.fallback, limit_bytes)
        if not fitting:
            return None
        # of plans that cost nothing, the one that does nothing
        best = min(
            fitting,
            key=lambda plan: (plan.point.overhead_s, bool(plan.point.actions), plan.point.error, plan.point.peak_bytes),
        )
        # a bound for a larger budget holds for this one, too
        bounds = [bound_s for budget_bytes, bound_s in self.bounds_s.items() if budget_bytes >= limit_bytes]
        bound_s = min(max(bounds, default=0.0), best.point.overhead_s)
        gap = relative_gap(best.point.overhead_s, bound_s, self.problem.step_s)
        status = Status.OPTIMAL if gap <= PROVEN else Status.FEASIBLE
        return replace(best, lower_bound_s=bound_s, status=status)

    @property
    def smallest(self) -> FrontierPoint:
        """The plan with the smallest peak."""
        return smallest_of(self.plans + self.fallback)

    def unmet(self, limit_bytes: int) -> Status:
        """Returns what is known of a limit that no known plan meets."""
        return Status.INFEASIBLE if limit_bytes < self.lower_bound_bytes else Status.UNKNOWN

    def proof(self) -> str:
        """Says why no plan peaks lower than ``lower_bound_bytes``."""
        if self.min_peak is not None:
            return str(self.min_peak)
        bound, holder = peak_lower_bound(self.problem)
        return f"no plan peaks below {bound} bytes ({format_bytes(bound)}), held by {holder}"

    def budget_error(self, budget_bytes: int, accumulated_bytes: int) -> BudgetError:
        """Builds the error for a budget that no known plan meets.

        Args:
            budget_bytes: what was asked for.
            accumulated_bytes: older gradients that are held in addition to the plan's peak; 0 if there are none.
        """
        schedule = lower(self.problem, self.smallest.actions)
        holder = describe_peak(self.problem, schedule, simulate(self.problem, schedule))
        minimum = self.smallest.peak_bytes + accumulated_bytes
        bound = min(self.lower_bound_bytes + accumulated_bytes, minimum)  # a fallback is not bound by it
        state = " while gradients of an earlier backward pass exist" if accumulated_bytes else ""
        return BudgetError(
            f"the budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) cannot be met{state}: the "
            f"smallest known plan peaks at {minimum} bytes ({format_bytes(minimum)}), held by {holder}; no plan "
            f"that makes each tensor at most once more can go below {format_bytes(bound)}. {WAYS_OUT}",
            budget_bytes=budget_bytes,
            minimum_bytes=minimum,
            minimum_lower_bound_bytes=bound,
            holder=holder,
        )


def plans_of(
    problem: Problem, points: Iterable[FrontierPoint] = (), *, max_error: float, solve_s: float = 0.0
) -> KnownPlans:
    """Builds the set of the plans of a frontier.

    Args:
        problem: the step.
        points: the plans; all within ``max_error``.
        max_error: limit of the root of the sum of squared lossy errors.
        solve_s: seconds spent on the frontier.
    """
    empty = KnownPlans(problem, max_error, lower_bound_bytes=peak_lower_bound(problem)[0])
    return add(empty, *(KnownPlan(point, solve_s=solve_s) for point in points))


def add(known: KnownPlans, *plans: KnownPlan) -> KnownPlans:
    """Adds plans, and the same without masks whose sources are saved anyway where that is faster."""
    taken: list[KnownPlan] = []
    for plan in plans:
        taken.append(plan)
        actions = without_needless_masks(known.problem, plan.point.actions)
        if len(actions) < len(plan.point.actions):
            point = simulated(known.problem, actions)
            if point.overhead_s < plan.point.overhead_s:
                taken.append(replace(plan, point=point))
    return replace(known, plans=(*known.plans, *taken))


def add_bound(known: KnownPlans, budget_bytes: int, overhead_s: float) -> KnownPlans:
    """Adds a lower bound of the overhead of every plan for a budget."""
    bound_s = max(overhead_s, known.bounds_s.get(budget_bytes, 0.0))
    return replace(known, bounds_s={**known.bounds_s, budget_bytes: bound_s})


def add_result(known: KnownPlans, result: SolveResult, budget_bytes: int) -> KnownPlans:
    """Adds a solver's plan for a budget, with the simulator's figures, and its bound; misses add nothing."""
    if result.status not in (Status.OPTIMAL, Status.FEASIBLE):
        return known
    plan = KnownPlan(simulated(known.problem, result.actions), result.solver, solve_s=result.solve_s)
    return add(add_bound(known, budget_bytes, result.lower_bound_s), plan)


def join(known: KnownPlans, other: KnownPlans) -> KnownPlans:
    """Adds the plans of a problem that offers less of the same, or of a stricter error limit."""
    return replace(known, plans=known.plans + other.plans, fallback=known.fallback + other.fallback)


def forget(known: KnownPlans, refuted: KnownPlan) -> KnownPlans:
    """Leaves out a plan whose figures the simulator does not confirm."""

    def others(plans: Iterable[KnownPlan]) -> tuple[KnownPlan, ...]:
        return tuple(plan for plan in plans if plan.point.actions is not refuted.point.actions)

    return replace(known, plans=others(known.plans), fallback=others(known.fallback))


def pareto(plans: Iterable[KnownPlan]) -> tuple[KnownPlan, ...]:
    """Returns the plans that no cheaper one beats in its peak, the cheapest first."""
    found: list[KnownPlan] = []
    for plan in sorted(plans, key=lambda plan: (plan.point.overhead_s, plan.point.peak_bytes)):
        if not found or plan.point.peak_bytes < found[-1].point.peak_bytes:
            found.append(plan)
    return tuple(found)


def within(plans: Iterable[KnownPlan], limit_bytes: int) -> list[KnownPlan]:
    """Returns the plans that peak at or under a limit."""
    return [plan for plan in plans if plan.point.peak_bytes <= limit_bytes]


def smallest_of(plans: Iterable[KnownPlan]) -> FrontierPoint:
    """Returns the plan with the smallest peak."""
    return min((plan.point for plan in plans), key=lambda point: point.peak_bytes)


def judged_again(known: KnownPlans, problem: Problem) -> KnownPlans:
    """Returns the plans of a step for another problem of the same tensors: of other sizes, or with other lifetimes.

    The save-all plan, the one of the smallest peak and the fallbacks are simulated at once, others when a limit needs
    them.
    """

    def judged(plan: KnownPlan) -> KnownPlan:
        return replace(plan, point=simulated(problem, plan.point.actions))

    empty = plans_of(problem, max_error=known.max_error)
    fallback = tuple(map(judged, known.fallback))
    if known.fixed:
        return replace(empty, plans=tuple(map(judged, known.plans)), fallback=fallback, fixed=True)
    others = pareto((*known.plans, *known.from_other_sizes))
    return replace(
        empty,
        plans=(KnownPlan(simulated(problem, {})), *map(judged, others[-1:])),
        fallback=fallback,
        from_other_sizes=others[:-1],
    )


def simulated(problem: Problem, actions: Actions) -> FrontierPoint:
    """Returns ``actions`` with the figures that the simulator gives them."""
    timeline = simulate_actions(problem, actions)
    return FrontierPoint(actions, timeline.peak_bytes, timeline.overhead_s, plan_error(problem, actions))


def without_needless_masks(problem: Problem, actions: Actions) -> dict[int, Action]:
    """Returns ``actions`` less the masks that are saved although all their sources are saved, too.

    Solvers count saving a mask as free; it is the one cost that they do not see.
    """

    def is_saved(t: int) -> bool:
        return t in problem.outputs or actions.get(t, default_action(problem, t)) is SAVE

    masks = (problem.forward[op.fusion.op] for op in problem.backward if op.fusion)
    needless = {t for mask in masks if all(map(is_saved, mask.inputs)) for t in mask.outputs}
    return {t: action for t, action in actions.items() if t not in needless}
