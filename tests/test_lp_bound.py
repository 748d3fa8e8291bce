"""The linear bound never passes the optimum, and says something where seconds must be added."""

from __future__ import annotations

import math

import pytest

from fxhybrid.ir.plan import RECOMPUTE
from fxhybrid.solvers.exhaustive import OracleSolver
from fxhybrid.solvers.ilp.lp_bound import added_lower_bound
from tests.problems import small_problems
from tests.test_corpus import independent


def test_never_passes_the_optimum() -> None:
    for number, problem in enumerate(small_problems(25, 8, 12_000)):
        max_error = (0.0, 0.03, 0.1)[number % 3]
        plans, _ = OracleSolver().best_plans(problem, max_error=max_error)
        low, high = plans[-1].peak_bytes, plans[0].peak_bytes
        for budget_bytes in (low, (low + high) // 2, high):
            best = next(plan for plan in plans if plan.peak_bytes <= budget_bytes)
            for known in (best.actions, plans[-1].actions, None):
                bound_s = added_lower_bound(problem, budget_bytes, max_error=max_error, known=known).overhead_s
                assert 0.0 <= bound_s <= best.overhead_s + 1e-7 * problem.step_s


def test_is_the_cheapest_part_of_what_must_go() -> None:
    # Keep all: b0 holds a + b + c + g0 = 220, all of it but a and b for certain. For 190, 30 bytes of these must go:
    # of a at 4 s / 100 bytes or of b at 2 s / 60, so 30 / 60 x 2 s = 1 s. (The optimum drops all of b: 2 s.)
    bound = added_lower_bound(independent(), 190, max_error=0.0, known={1: RECOMPUTE})
    assert bound.overhead_s == pytest.approx(1.0)
    # each byte more is one of b that need not go: 2 s / 60
    assert bound.saved_s_per_byte == pytest.approx(2 / 60)


def test_memory_is_free_where_everything_fits() -> None:
    bound = added_lower_bound(independent(), 220, max_error=0.0)
    assert (bound.overhead_s, bound.saved_s_per_byte) == (0.0, 0.0)


def test_no_plan_at_all() -> None:
    # b2 alone holds a + g1 + g2 = 120
    assert added_lower_bound(independent(), 119, max_error=0.0).overhead_s == math.inf
