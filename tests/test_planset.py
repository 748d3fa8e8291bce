"""Known plans: what is done where none fits, and what bounds know of each other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lib import record_corpus as corpus
from fxhybrid.compiler.planner import PlanMaker
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Compress
from fxhybrid.ir.problem import CodecOption, Problem
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.options import Options
from fxhybrid.solvers.base import SolveResult, Status
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.solvers.portfolio.extend_plans import ensure, frontier_plans, polish_for, prove_bound
from fxhybrid.solvers.portfolio.known_plans import KnownPlans, join, plans_of, simulated
from fxhybrid.solvers.portfolio.solvers import ILP_LIMIT_S, Portfolio
from tests.problems import problems
from tests.test_corpus import independent
from tests.test_mps import chain_with_wide_backward


def keep_all_only() -> KnownPlans:
    """The set of ``independent`` with nothing but the plan that keeps everything, which peaks at 220 bytes."""
    return plans_of(independent(), build_frontier(independent(), max_error=0.0).points[:1], max_error=0.0)


def whole_frontier() -> KnownPlans:
    """The set of ``independent`` with the heuristic's frontier."""
    return plans_of(independent(), build_frontier(independent(), max_error=0.0).points, max_error=0.0)


def test_wrong_figures_leave_the_plan_that_keeps_everything() -> None:
    """Which peaks at 220 bytes; a file may say something else, if it was written for other sizes."""
    known = keep_all_only()
    wrong = replace(known.plans[0], point=replace(known.plans[0].point, peak_bytes=150))
    plans = ensure(replace(known, plans=(wrong,)), 200)
    assert plans.cheapest(220) is not None
    assert all(p.point.peak_bytes == simulated(plans.problem, p.point.actions).peak_bytes for p in plans.plans)


def test_looks_lower_only_where_no_known_plan_fits() -> None:
    plans = ensure(keep_all_only(), 220)
    assert plans.cheapest(220) is not None
    assert plans.min_peak is None
    # b2 needs a (100) and g1 (10) and makes g2 (10): 120 is the smallest peak of all plans, by making a again
    plans = ensure(plans, 120)
    known = plans.cheapest(120)
    assert known is not None
    assert (known.point.peak_bytes, known.solver) == (120, "min peak")
    assert known.point.actions[0] is RECOMPUTE
    assert plans.smallest.peak_bytes == 120


def test_below_the_smallest_peak_is_infeasible_with_the_same_number_in_the_error() -> None:
    plans = ensure(keep_all_only(), 119)
    assert plans.cheapest(119) is None
    assert plans.unmet(119) is Status.INFEASIBLE
    error = plans.budget_error(119, 0)
    assert error.minimum_lower_bound_bytes == 120


def test_a_bound_for_a_larger_budget_holds_for_a_smaller_one() -> None:
    # for 190 of 220 bytes, half of b (60 bytes, 2 s) must go: 1 s, while every plan drops it or more as a whole
    plans, bound = prove_bound(whole_frontier(), 190)
    assert abs(bound.overhead_s - 1.0) < 1e-6
    for budget_bytes in (190, 180):
        known = plans.cheapest(budget_bytes)
        assert known is not None
        assert known.point.overhead_s >= 2.0
        assert (known.lower_bound_s, known.status) == (bound.overhead_s, Status.FEASIBLE)
    loose = plans.cheapest(191)
    assert loose is not None
    assert loose.lower_bound_s == 0.0


def test_joined_plans_are_chosen_from() -> None:
    plans, other = keep_all_only(), whole_frontier()
    assert plans.cheapest(180) is None
    assert join(plans, other).cheapest(180) == other.cheapest(180)
    assert plans.cheapest(180) is None, "a set never changes"


def test_a_plan_is_polished_for_the_budget() -> None:
    # Only the plan that makes a (4 s) and b (2 s) again is known. 180 bytes suffice to keep a, 179 to keep b.
    for budget_bytes, actions, overhead_s in ((180, {1: RECOMPUTE}, 2.0), (179, {0: RECOMPUTE}, 4.0)):
        points = [simulated(independent(), {0: RECOMPUTE, 1: RECOMPUTE})]
        plans = polish_for(plans_of(independent(), points, max_error=0.0), budget_bytes)
        known = plans.cheapest(budget_bytes)
        assert known is not None
        assert (known.point.actions, known.point.overhead_s) == (actions, overhead_s)
        assert len(plans.plans) == 2  # the other one stays, for smaller budgets


class FindsNothing:
    """A solver of a user's own, on a bad day."""

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        return SolveResult(Status.UNKNOWN, {}, 0, 0.0, 0.0, 0.0, "own", 0.0)


def test_plans_are_polished_beside_a_solver_of_ones_own() -> None:
    points = [simulated(independent(), {0: RECOMPUTE, 1: RECOMPUTE})]
    plans, _ = Portfolio(FindsNothing()).extend(plans_of(independent(), points, max_error=0.0), 180)
    known = plans.cheapest(180)
    assert known is not None
    assert (known.point.actions, known.solver) == ({1: RECOMPUTE}, "mps")


def test_rounds_share_the_integer_programs_seconds() -> None:
    problem = independent()
    make_plans = PlanMaker(Options.checked(budget=180, solver="ilp"), 180)
    assert make_plans.ilp_s == ILP_LIMIT_S
    left_s = [make_plans.ilp_s]
    for _ in range(2):
        assert any(plan.solver == "ilp" for plan in make_plans(problem).plans)
        left_s.append(make_plans.ilp_s)
    assert left_s[0] > left_s[1] > left_s[2]
    make_plans.ilp_s = -1.0
    assert any(plan.solver == "ilp" for plan in make_plans(problem).plans), "a late round gets some, too"


def test_a_plan_that_names_a_backward_tensor_is_not_polished() -> None:
    points = [simulated(independent(), {3: SAVE})]
    known = polish_for(plans_of(independent(), points, max_error=0.0), 220).cheapest(220)
    assert known is not None
    assert known.point.actions == {3: SAVE}


def test_fits_at_falling_budgets_never_add_less() -> None:
    """Without a floor, 2 of these 99 steps down came to a cheaper plan."""
    problem = corpus.load("unet")
    frontier = build_frontier(problem, max_error=0.05)
    plans = plans_of(problem, frontier.points, max_error=0.05)
    high, low = frontier.points[0].peak_bytes, frontier.points[-1].peak_bytes
    points = []
    for budget_bytes in (high - (high - low) * i // 99 for i in range(100)):
        plans = polish_for(plans, budget_bytes)
        known = plans.cheapest(budget_bytes)
        points += [known.point] if known is not None else []
    assert len(points) == 100
    for larger, smaller in pairwise(points):
        assert smaller.overhead_s >= larger.overhead_s
        assert smaller.peak_bytes <= larger.peak_bytes
    assert sum(point not in frontier.points for point in points) > 20


def test_room_that_is_left_makes_codecs_more_exact() -> None:
    # Two tensors of 100 bytes are kept in 25 bytes each, with an error of 0.05, or for the same 1 s in 50 with 0.01.
    # Beside them are 400 bytes and the loss's 4: 454 bytes, 479 with one of them more exact, 504 with both.
    coarse = CodecOption("q2", 25, 0.5, 0.5, 25, 100, False, 0.05)
    fine = CodecOption("q4", 50, 0.5, 0.5, 50, 100, False, 0.01)
    chain = chain_with_wide_backward(0.05)
    problem = replace(
        chain, tensors=tuple(replace(t, codecs=(coarse, fine) if t.codecs else ()) for t in chain.tensors)
    )
    start = simulated(problem, {0: Compress("q2"), 1: Compress("q2")})
    for budget_bytes, squares in ((454, (25, 25)), (479, (25, 1)), (504, (1, 1))):
        known = polish_for(plans_of(problem, [start], max_error=0.08), budget_bytes).cheapest(budget_bytes)
        assert known is not None
        assert (known.point.peak_bytes, known.point.overhead_s) == (budget_bytes, 2.0)
        assert known.point.error == pytest.approx(0.01 * sum(squares) ** 0.5)


def test_the_smallest_peak_falls_as_the_error_limit_grows() -> None:
    """On U-Net the search at a limit of 0.1 / 3 alone ends 0.3 % above that at 0.02 / 3."""
    problem, smallest = corpus.load("unet"), []
    for limit in (0.02 / 3, 0.1 / 3):
        plans = plans_of(problem, build_frontier(problem, max_error=limit).points, max_error=limit)
        plans = ensure(plans, 1)
        assert plans.cheapest(1) is None
        smallest.append(plans.smallest.peak_bytes)
        assert all(plan.point.error <= limit for plan in plans.plans)
    assert smallest == sorted(smallest, reverse=True)


@settings(max_examples=10, deadline=None)
@given(problems(2, 14), st.floats(0.0, 1.0))
def test_frontiers_together_are_never_slower_than_one_technique_alone(problem: Problem, share: float) -> None:
    plans = frontier_plans(problem, max_error=0.1)
    assert len(plans.alone) == 2 * any(tensor.codecs for tensor in problem.tensors)
    budget_bytes = int(share * simulate_actions(problem, {}).peak_bytes)
    found = plans.cheapest(budget_bytes)
    for known in (other.cheapest(budget_bytes) for other in plans.alone):
        assert known is None or (found is not None and found.point.overhead_s <= known.point.overhead_s)
    for plan in plans.plans:  # plans of one technique mean the same among all
        assert simulate_actions(problem, plan.point.actions).peak_bytes == plan.point.peak_bytes
