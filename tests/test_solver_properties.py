"""What holds for every problem: budgets order plans, bounds order statuses, names and neighbours mean nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxhybrid.errors import ProblemError
from fxhybrid.ir.problem import Op, Problem, Tensor
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import Status
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.exhaustive import OracleSolver
from fxhybrid.solvers.ilp.lp_bound import added_lower_bound
from fxhybrid.solvers.ilp.min_peak import MinPeakSolver
from fxhybrid.solvers.ilp.solver import IlpSolver
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.solvers.portfolio.extend_plans import frontier_plans
from fxhybrid.solvers.portfolio.solvers import Portfolio, result_for
from tests.problems import problems

MAX_ERROR = 0.1
FITS = (Status.OPTIMAL, Status.FEASIBLE)


def save_all_bytes(problem: Problem) -> int:
    return simulate_actions(problem, {}).peak_bytes


@settings(max_examples=15, deadline=None)
@given(problems(2, 14, fused=True), st.lists(st.floats(0.0, 1.1), min_size=2, max_size=5))
def test_a_larger_budget_never_gives_a_slower_plan(problem: Problem, shares: list[float]) -> None:
    top, known, results = save_all_bytes(problem), frontier_plans(problem, max_error=MAX_ERROR), []
    for budget in (int(top * share) for share in sorted(shares)):
        known, _ = Portfolio("mps").extend(known, budget)
        results.append(result_for(known, budget))
    reached = [result.overhead_s for result in results if result.status in FITS]
    assert reached == sorted(reached, reverse=True)
    # what fits a budget fits every larger one
    fits = [result.status in FITS for result in results]
    assert fits == sorted(fits)


@settings(max_examples=15, deadline=None)
@given(problems(2, 14, fused=True), st.integers(0, 1000))
def test_the_save_all_peak_is_enough_to_save_all(problem: Problem, more: int) -> None:
    for solver in (Portfolio("mps"), Portfolio("auto", ilp_limit_s=5.0)):
        result = solver.solve(problem, save_all_bytes(problem) + more, max_error=MAX_ERROR)
        assert (result.status, dict(result.actions), result.overhead_s) == (Status.OPTIMAL, {}, 0.0)


@settings(max_examples=7, deadline=None)
@given(problems(2, 14, fused=True), st.floats(0.0, 1.0))
def test_a_budget_is_met_or_proven_too_small_and_never_left_unknown(problem: Problem, share: float) -> None:
    low, high = peak_lower_bound(problem)[0], save_all_bytes(problem)
    # between what no plan goes below and what the simplest plan reaches: where it can be hard to say
    budget = int(low + share * (high - low))
    for solver in (Portfolio("mps"), Portfolio("auto", ilp_limit_s=10.0), IlpSolver(time_limit_s=10.0)):
        result = solver.solve(problem, budget, max_error=MAX_ERROR)
        assert result.status is not Status.UNKNOWN
        if result.status in FITS:
            assert simulate_actions(problem, result.actions).peak_bytes <= budget
        else:
            assert budget < MinPeakSolver().solve(problem, max_error=MAX_ERROR).lower_bound_bytes
            assert result.proof
        assert solver.solve(problem, low - 1, max_error=MAX_ERROR).status is Status.INFEASIBLE


@settings(max_examples=10, deadline=None)
@given(problems(2, 14, fused=True), st.floats(0.2, 1.0))
def test_the_same_input_gives_the_same_plan(problem: Problem, share: float) -> None:
    budget = int(save_all_bytes(problem) * share)
    for solver in (Portfolio("mps"), IlpSolver(time_limit_s=10.0)):
        results = [solver.solve(problem, budget, max_error=MAX_ERROR) for _ in range(2)]
        first, again = (dataclasses.replace(result, solve_s=0.0) for result in results)
        assert first == again


def renamed(problem: Problem) -> Problem:
    tensors = tuple(Tensor(f"other{i}", t.size_bytes, t.codecs) for i, t in enumerate(problem.tensors))
    return dataclasses.replace(problem, tensors=tensors)


def renumbered(problem: Problem) -> Problem:
    """The same problem with its tensors listed the other way round."""
    last = len(problem.tensors) - 1

    def turned(tensors: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(last - t for t in tensors)

    def op(old: Op) -> Op:
        return dataclasses.replace(old, inputs=turned(old.inputs), outputs=turned(old.outputs))

    return dataclasses.replace(
        problem,
        tensors=problem.tensors[::-1],
        forward=tuple(map(op, problem.forward)),
        backward=tuple(map(op, problem.backward)),
        outputs=turned(problem.outputs),
        mutations=turned(problem.mutations),
        gradients=turned(problem.gradients),
    )


@settings(max_examples=15, deadline=None)
@given(problems(2, 5, fused=True), st.floats(0.0, 1.0))
def test_names_and_numbers_do_not_change_the_best_plan(problem: Problem, share: float) -> None:
    """The order of ops is the order of execution, and part of the problem; that of the tensors is not."""
    assume(2 <= len(problem.candidates) <= 6)
    low = MinPeakSolver().solve(problem, max_error=MAX_ERROR).peak_bytes
    budget = int(low + share * (save_all_bytes(problem) - low))
    for solver in (OracleSolver(), IlpSolver(gap=0.0, time_limit_s=10.0)):
        first, *others = (
            solver.solve(p, budget, max_error=MAX_ERROR) for p in (problem, renamed(problem), renumbered(problem))
        )
        for other in others:
            assert other.status is first.status is Status.OPTIMAL
            assert other.overhead_s == pytest.approx(first.overhead_s, rel=1e-6, abs=1e-6 * problem.step_s)


@settings(max_examples=5, deadline=None)
@given(problems(2, 14, fused=True))
def test_names_do_not_change_the_frontier(problem: Problem) -> None:
    """Numbers may: of moves that look equally good, the heuristic tries the one first that is listed first."""
    assert build_frontier(renamed(problem), max_error=MAX_ERROR) == build_frontier(problem, max_error=MAX_ERROR)


ENTRIES: tuple[Callable[[Problem], object], ...] = (
    *(
        partial(s.solve, budget_bytes=1 << 40, max_error=0.1)
        for s in (Portfolio("mps"), IlpSolver(), Portfolio("auto"))
    ),
    partial(OracleSolver().solve, budget_bytes=1 << 40, max_error=0.1),
    partial(MinPeakSolver().solve, max_error=0.1),
    partial(build_frontier, max_error=0.1),
    partial(added_lower_bound, budget_bytes=1 << 40, max_error=0.1),
)


def is_refused_everywhere(problem: Problem, match: str | None = None) -> None:
    for entry in ENTRIES:
        with pytest.raises(ProblemError, match=match):
            entry(problem)


@settings(max_examples=20, deadline=None)
@given(problems(2, 8), st.sampled_from(("size", "seconds", "name", "reference", "cycle")), st.data())
def test_hostile_problems_are_refused(problem: Problem, how: str, data: st.DataObject) -> None:
    tensors, forward = list(problem.tensors), list(problem.forward)
    at = data.draw(st.integers(0, len(tensors) - 1))
    op = data.draw(st.integers(0, len(forward) - 1))
    if how == "size":
        tensors[at] = dataclasses.replace(tensors[at], size_bytes=data.draw(st.integers(max_value=-1)))
    elif how == "seconds":
        seconds = data.draw(st.sampled_from((math.nan, math.inf, -1.0)))
        forward[op] = dataclasses.replace(forward[op], seconds=seconds)
    elif how == "name":
        assume(len(tensors) > 1)
        tensors[at] = dataclasses.replace(tensors[at], name=tensors[at - 1].name)
    elif how == "reference":
        forward[op] = dataclasses.replace(forward[op], inputs=(len(tensors) + at,))
    else:
        forward[op] = dataclasses.replace(forward[op], inputs=forward[-1].outputs)
    hostile = dataclasses.replace(problem, tensors=tuple(tensors), forward=tuple(forward))
    is_refused_everywhere(hostile)


def test_the_empty_problem_is_refused() -> None:
    is_refused_everywhere(Problem((), (), (), (), (), (), resident_bytes=7), "the problem is empty")


def test_a_million_tensors_are_refused_at_once() -> None:
    huge = Problem((Tensor("t", 1),) * 1_000_000, (), (), (), (), (), resident_bytes=0)
    is_refused_everywhere(huge, "1000000 tensors")
