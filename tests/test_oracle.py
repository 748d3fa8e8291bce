"""The oracle against plain enumeration, and its refusals."""

from __future__ import annotations

import itertools

import pytest

from fxhybrid.errors import InvalidArgument, PlanError
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import Status, plan_error
from fxhybrid.solvers.exhaustive import OracleSolver
from fxhybrid.solvers.ilp.solver import IlpSolver
from tests.problems import choices, random_problem, small_problems


def optimum_of_all(problem: Problem, budget_bytes: int, max_error: float) -> float | None:
    """Least added seconds over the full product of all actions; None where none fits."""
    best: float | None = None
    for combination in itertools.product(*(choices(problem, t) for t in problem.candidates)):
        actions = dict(zip(problem.candidates, combination, strict=True))
        try:
            timeline = simulate_actions(problem, actions)
        except PlanError:
            continue
        # an unread tensor's codec costs nothing and errs nothing; the plain sum would count it
        if plan_error(problem, actions) <= max_error and timeline.peak_bytes <= budget_bytes:
            best = timeline.overhead_s if best is None else min(best, timeline.overhead_s)
    return best


def test_leaves_no_plan_out() -> None:
    for number, problem in enumerate(small_problems(25, 5, 7000)):
        high = simulate_actions(problem, {}).peak_bytes
        max_error = (0.0, 0.03, 0.1)[number % 3]
        for share in (0.5, 0.7, 0.9):
            result = OracleSolver().solve(problem, int(share * high), max_error=max_error)
            optimum = optimum_of_all(problem, int(share * high), max_error)
            assert result.status is (Status.INFEASIBLE if optimum is None else Status.OPTIMAL)
            if optimum is not None:
                assert result.overhead_s == pytest.approx(optimum, abs=1e-12)
                assert result.peak_bytes <= share * high
                assert plan_error(problem, result.actions) <= max_error
            else:
                assert str(result.peak_bytes) in result.proof
                assert result.peak_bytes > share * high


def test_refuses_large_problems() -> None:
    problem = random_problem(1, 30)
    with pytest.raises(InvalidArgument, match=f"{len(problem.candidates)} candidate"):
        OracleSolver().solve(problem, 0, max_error=0.0)


@pytest.mark.fuzz
@pytest.mark.parametrize("first_seed", range(100_000, 600_000, 100_000))
def test_the_integer_program_equals_the_oracle(first_seed: int) -> None:
    # 100 problems each, at the smallest peak, one byte below it and two thirds of the way up
    for number, problem in enumerate(small_problems(100, 10, first_seed)):
        max_error = (0.0, 0.03, 0.1)[number % 3]
        plans, _ = OracleSolver().best_plans(problem, max_error=max_error)
        low, high = plans[-1].peak_bytes, plans[0].peak_bytes
        for budget_bytes in (low - 1, low, low + 2 * (high - low) // 3):
            optimum = min((plan.overhead_s for plan in plans if plan.peak_bytes <= budget_bytes), default=None)
            result = IlpSolver(gap=0.0).solve(problem, budget_bytes, max_error=max_error)
            assert result.status is (Status.INFEASIBLE if optimum is None else Status.OPTIMAL)
            if optimum is None:
                assert result.peak_bytes == low
            else:
                assert result.peak_bytes <= budget_bytes
                assert result.lower_bound_s <= optimum + 1e-9 * problem.step_s
                assert result.overhead_s == pytest.approx(optimum, rel=1e-6, abs=1e-12 * problem.step_s)
