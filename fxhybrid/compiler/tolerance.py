"""What a higher error tolerance would be worth."""

from __future__ import annotations

from dataclasses import dataclass

from fxhybrid.compiler.planner import error_target
from fxhybrid.compiler.planning_state import PlanningState
from fxhybrid.ir.plan import Plan
from fxhybrid.solvers.portfolio.extend_plans import frontier_plans, polish_for
from fxhybrid.solvers.portfolio.known_plans import join
from fxhybrid.units import format_bytes


@dataclass(frozen=True)
class ToleranceValue:
    """Says what a higher limit of the gradient error would save, as far as the heuristic finds it.

    Attributes:
        more_error: by how much ``max_grad_error`` would be higher.
        saved_bytes: how much smaller the smallest peak would be.
        saved_s: how much less the plan for the present budget would add.
    """

    more_error: float
    saved_bytes: int
    saved_s: float

    def __str__(self) -> str:
        return (
            f"saves {format_bytes(self.saved_bytes)} of the smallest peak, {self.saved_s * 1e3:.1f} ms at this budget"
        )


def tolerance_value(state: PlanningState, plan: Plan, more_error: float) -> ToleranceValue:
    """Plans once more with ``max_grad_error`` higher by ``more_error``, and compares with ``plan``."""
    looser = frontier_plans(state.prepared.problem, max_error=error_target(state.options, more_error))
    # the known plans are within the looser limit too; fallbacks were measured
    looser = polish_for(join(looser, state.plans), state.budget_bytes)
    cheapest = looser.cheapest(state.budget_bytes)
    overhead_s = cheapest.point.overhead_s if cheapest else plan.added_s
    saved_bytes = state.minimum_bytes - looser.smallest.peak_bytes
    return ToleranceValue(more_error, saved_bytes, plan.added_s - overhead_s)
