"""Polishes a known plan for one budget.

Problem
    Given a plan within a budget, find one with less overhead, or as much and a smaller error, that keeps the budget.

Method
    The plans of a frontier lie between budgets. What one leaves of a budget pays for storing or saving what costs most,
    and for more exact codecs where they cost no time: moves that never leave the budget (``LocalSearch.trim``).
"""

from __future__ import annotations

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.mps.move_table import MoveTable
from fxhybrid.solvers.mps.neighbourhood import Neighbourhood
from fxhybrid.solvers.mps.plan_state import PlanState
from fxhybrid.solvers.mps.problem_tables import ProblemTables
from fxhybrid.solvers.mps.search import LocalSearch

ERROR_SHARE = 1e-5  # share of a step that a plan's own squared error is worth: enough to choose among equals
MAX_MOVES = 1_000


def polish(problem: Problem, actions: Actions, budget_bytes: int, *, max_error: float) -> Actions | None:
    """Improves a plan by moves that never leave the budget.

    Args:
        problem: the step.
        actions: a plan for it.
        budget_bytes: limit of the peak; the plan must keep it.
        max_error: limit of the root of the sum of squared lossy errors.

    Returns:
        A plan with less overhead, or as much and a smaller error; None if none was found.
    """
    tables = ProblemTables(problem)
    codes = tables.codes_of(actions)
    state = PlanState(tables)
    search = LocalSearch(state, MoveTable(Neighbourhood(state, max_error)), max_error**2)
    if codes is None or not search.go_to(codes):
        return None
    before = state.cost()
    search.error_multiplier_s = ERROR_SHARE * problem.step_s / before.error2 if before.error2 else 0.0
    search.table.refresh()
    search.move_limit = state.n_applied + MAX_MOVES
    search.trim(budget_bytes)
    after = state.cost()
    better = (after.overhead_s, after.error2) < (before.overhead_s, before.error2)
    return state.actions() if better else None
