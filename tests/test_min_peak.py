"""The smallest reachable peak against trying every plan."""

from __future__ import annotations

import pytest

from fxhybrid.ir.plan import RECOMPUTE
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.exhaustive import OracleSolver
from fxhybrid.solvers.ilp.min_peak import MinPeakSolver
from tests.problems import random_problem, small_problems
from tests.test_corpus import independent


def compare_with_the_oracle(count: int, max_tensors: int, first_seed: int) -> None:
    for number, problem in enumerate(small_problems(count, max_tensors, first_seed)):
        max_error = (0.0, 0.03, 0.1)[number % 3]
        plans, _ = OracleSolver().best_plans(problem, max_error=max_error)
        found = MinPeakSolver().solve(problem, max_error=max_error)
        assert found.peak_bytes == plans[-1].peak_bytes
        assert found.proven
        assert simulate_actions(problem, found.actions).peak_bytes == found.peak_bytes
        assert plan_error(problem, found.actions) <= max_error


def test_names_step_and_tensors() -> None:
    # b2 needs a (100) and g1 (10) and makes g2 (10): no plan is below 120, and dropping a reaches it.
    found = MinPeakSolver().solve(independent(), max_error=0.0)
    assert (found.peak_bytes, found.lower_bound_bytes) == (120, 120)
    assert found.actions[0] is RECOMPUTE
    assert str(found) == "the smallest reachable peak is 120 bytes (120 B), held by " + found.holder


def test_equals_the_oracle() -> None:
    compare_with_the_oracle(40, 8, 9000)


def test_a_bound_is_given_where_time_is_up() -> None:
    found = MinPeakSolver(time_limit_s=0.0).solve(independent(), max_error=0.0)
    assert found.lower_bound_bytes <= 120 <= found.peak_bytes


@pytest.mark.fuzz
def test_equals_the_oracle_at_length() -> None:
    compare_with_the_oracle(500, 10, 70_000)


def test_the_cheap_bound_knows_fused_masks() -> None:
    """Fused 5,892 B, plain 7,856 B and the mask's 871 B: a bound of 16,794 B was above the smallest peak."""
    problem = random_problem(481, 2, fused=True)
    assert peak_lower_bound(problem)[0] <= MinPeakSolver().solve(problem, max_error=0.1).peak_bytes == 15_378
