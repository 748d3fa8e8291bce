"""Searches for more plans and bounds of one problem; each function returns a larger set of known plans.

Plans polished for single budgets join the set as these are asked for. Where no plan fits, those of stricter error
limits are searched for, and then the smallest reachable peak, both once.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from fxhybrid.ir.problem import Problem, single_techniques
from fxhybrid.solvers.base import FrontierPoint, Status
from fxhybrid.solvers.ilp.lp_bound import AddedBound, added_lower_bound
from fxhybrid.solvers.ilp.min_peak import MinPeakSolver
from fxhybrid.solvers.mps.frontier_search import Effort, build_frontier
from fxhybrid.solvers.mps.polish import polish
from fxhybrid.solvers.portfolio.known_plans import (
    KnownPlan,
    KnownPlans,
    add,
    add_bound,
    forget,
    join,
    plans_of,
    simulated,
    smallest_of,
    within,
)

LESS_EFFORT = Effort(moves=7_500)  # for one technique alone: fewer choices
NEIGHBOURS = 3  # plans of other sizes that are simulated on either side of the one that fits
STRICTER_ERRORS = (0.02 / 3, 0.1 / 3)  # what plans aim at for a ``max_grad_error`` of 0.02 and 0.1
# Half of the recorded problems' smallest peaks are proven in a second, the rest not in 20.
MIN_PEAK_LIMIT_S = 5.0


def frontier_plans(problem: Problem, *, max_error: float) -> KnownPlans:
    """Builds the set of the heuristic's plans: the frontier of all techniques, and that of each one alone."""

    def frontier_of(offered: Problem, effort: Effort) -> KnownPlans:
        start = time.perf_counter()
        points = build_frontier(offered, max_error=max_error, effort=effort).points
        return plans_of(offered, points, max_error=max_error, solve_s=time.perf_counter() - start)

    known = frontier_of(problem, Effort())
    alone = tuple(frontier_of(offered, LESS_EFFORT) for offered in single_techniques(problem))
    for other in alone:  # the heuristic misses some plans of one technique among all the others
        known = join(known, other)
    return replace(known, alone=alone)


def ensure(known: KnownPlans, limit_bytes: int) -> KnownPlans:
    """Makes sure that ``cheapest`` finds a plan for the limit that the simulator confirms, if any can be found.

    Points carry the heuristic's own figures, which tests hold equal to the simulator's. One that differs all the same
    is left out here, before it can run.
    """
    known = simulate_from_other_sizes(known, limit_bytes)
    if not within(known.plans, limit_bytes):
        known = take_stricter(known)
    while (plan := known.cheapest(limit_bytes)) is not None:
        if simulated(known.problem, plan.point.actions).peak_bytes <= limit_bytes:
            return known
        known = forget(known, plan)
    if not known.plans:  # all came from a file of figures that are wrong by now
        known = add(known, KnownPlan(simulated(known.problem, {})))
    if known.min_peak is None and limit_bytes >= known.lower_bound_bytes:
        return ensure(find_smallest_peak(known), limit_bytes)
    return known


def simulate_from_other_sizes(known: KnownPlans, limit_bytes: int) -> KnownPlans:
    """Adds the plans of other sizes around the cheapest one that fits here, found by bisection.

    At other sizes they are in the order of overhead and peak; here they nearly are, so neighbours are looked at, too.
    """
    plans = known.from_other_sizes
    if not plans:
        return known
    points: dict[int, FrontierPoint] = {}

    def fits(position: int) -> bool:
        if position not in points:
            points[position] = simulated(known.problem, plans[position].point.actions)
        return points[position].peak_bytes <= limit_bytes

    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    for position in range(max(low - NEIGHBOURS, 0), min(low + NEIGHBOURS, len(plans))):
        fits(position)
    judged = (replace(plans[i], point=point, status=Status.FEASIBLE) for i, point in sorted(points.items()))
    rest = tuple(plan for i, plan in enumerate(plans) if i not in points)
    return replace(known, plans=(*known.plans, *judged), from_other_sizes=rest)


def polish_for(known: KnownPlans, limit_bytes: int) -> KnownPlans:
    """``ensure``, and adds what polishing makes of the cheapest plan for this very limit.

    A polished plan with less overhead than the one for a larger limit is left out: sweeps are to be monotone in either
    order.
    """
    known = ensure(known, limit_bytes)
    plan = known.cheapest(limit_bytes)
    if plan is None or known.fixed or limit_bytes in known.polished_s:
        return known
    actions = polish(known.problem, plan.point.actions, limit_bytes, max_error=known.max_error)
    if actions is not None:
        point = simulated(known.problem, actions)
        larger = (overhead_s for limit, overhead_s in known.polished_s.items() if limit > limit_bytes)
        if point.overhead_s >= max(larger, default=0.0):
            known = ensure(add(known, replace(plan, point=point)), limit_bytes)
            plan = known.cheapest(limit_bytes)
    overhead_s = plan.point.overhead_s if plan else 0.0
    return replace(known, polished_s={**known.polished_s, limit_bytes: overhead_s})


def take_stricter(known: KnownPlans) -> KnownPlans:
    """Adds plans of stricter error limits, once: each search is a heuristic, and one of these may reach lower."""
    if known.has_stricter:
        return known
    problem, found = known.problem, list[FrontierPoint]()
    codecs = [codec for tensor in problem.tensors for codec in tensor.codecs if not codec.lossless]
    if any(codec.error <= known.max_error for codec in codecs):
        for limit in (limit for limit in STRICTER_ERRORS if limit < known.max_error):
            found += build_frontier(problem, max_error=limit).points
    return replace(add(known, *map(KnownPlan, found)), has_stricter=True)


def find_smallest_peak(known: KnownPlans) -> KnownPlans:
    """Adds the smallest reachable peak, as far as it is found and proven in ``MIN_PEAK_LIMIT_S``, once."""
    if known.min_peak is not None:
        return known
    known = take_stricter(known)
    solver = MinPeakSolver(time_limit_s=MIN_PEAK_LIMIT_S)
    warm_start = smallest_of(known.plans).actions
    found = solver.solve(known.problem, max_error=known.max_error, warm_start=warm_start)
    known = replace(known, min_peak=found, lower_bound_bytes=found.lower_bound_bytes)
    if found.peak_bytes < known.smallest.peak_bytes:
        known = add(known, KnownPlan(simulated(known.problem, found.actions), "min peak", solve_s=found.solve_s))
    return known


def prove_bound(known: KnownPlans, budget_bytes: int) -> tuple[KnownPlans, AddedBound]:
    """Bounds the overhead of any plan for a budget by linear programming, and adds the bound."""
    plan = known.cheapest(budget_bytes)
    actions = plan.point.actions if plan else known.smallest.actions
    bound = added_lower_bound(known.problem, budget_bytes, max_error=known.max_error, known=actions)
    if math.isinf(bound.overhead_s):
        return replace(known, lower_bound_bytes=max(known.lower_bound_bytes, budget_bytes + 1)), bound
    return add_bound(known, budget_bytes, bound.overhead_s), bound
