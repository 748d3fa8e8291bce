"""A known plan fitted to one budget.

The plans of a frontier lie between budgets. What one leaves of a budget pays for taking back what costs most, and for
more exact codecs where they cost no time.
"""

from __future__ import annotations

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.mps.move_table import MoveTable
from fxhybrid.solvers.mps.neighbourhood import Choices
from fxhybrid.solvers.mps.plan_state import Footprints
from fxhybrid.solvers.mps.search import Descent

ERROR_PAYS = 1e-5  # share of a step that a plan's own squared error is worth: enough to choose among equals
MOVES = 1_000


def fitted(problem: Problem, actions: Actions, budget_bytes: int, *, max_error: float) -> Actions | None:
    """What moves that never leave the budget make of a plan.

    Args:
        problem: the step.
        actions: a plan for it.
        budget_bytes: limit of the peak; the plan must keep it.
        max_error: limit of the root of the sum of squared lossy errors.

    Returns:
        A plan that adds less, or as much with a smaller error; None if none was found.
    """
    base = Footprints(problem)
    search = Descent(base, MoveTable(Choices(base, max_error)), max_error**2)
    codes = base.codes(actions)
    if codes is None or not search.stand_at(codes):
        return None
    before = base.footprint()
    search.error_price_s = ERROR_PAYS * problem.step_s / before.error2 if before.error2 else 0.0
    search.table.refresh()
    search.stop_at = base.moves + MOVES
    search.trim(budget_bytes)
    after = base.footprint()
    better = (after.overhead_s, after.error2) < (before.overhead_s, before.error2)
    return base.actions() if better else None
