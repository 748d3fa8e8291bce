"""Makes the plan that a user sees of what is known of a signature."""

from __future__ import annotations

from fxhybrid.compiler.call_state import CallState
from fxhybrid.compiler.plan_transfer import named_actions, versions
from fxhybrid.compiler.planning_state import PlanningState
from fxhybrid.ir.plan import GradientError, Plan, Tier
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.portfolio.known_plans import KnownPlan


def describe(state: PlanningState, known: KnownPlan, call: CallState) -> Plan:
    """Returns the plan that a user sees."""
    problem, point = state.prepared.problem, known.point
    return Plan(
        budget_bytes=state.budget_bytes,
        peak_bytes=point.peak_bytes + state.extra_bytes(call),
        added_s=point.overhead_s,
        lower_bound_s=known.lower_bound_s,
        step_s=problem.step_s,
        gradient_error=_error_of(state, point),
        status=known.status.value,
        solver=known.solver,
        solve_s=known.solve_s,
        actions=named_actions(problem, point.actions),
        graph_fingerprint=state.prepared.fingerprint,
        versions=versions(),
        device=state.prepared.profile.device,
        without_gradient=state.prepared.without_gradient,
        dropped=tuple(sorted(state.prepared.expected.dropped)),
        channels_last=state.prepared.traced.channels_last,
        exactness=_tier_of(state, point),
    )


def _error_of(state: PlanningState, point: FrontierPoint) -> GradientError:
    if point.error == 0:
        return GradientError(0.0, "exact")
    measured = state.errors.error_of(point.actions)
    return GradientError(point.error, "estimated") if measured is None else GradientError(measured, "measured")


def _tier_of(state: PlanningState, point: FrontierPoint) -> Tier:
    if point.error > 0:
        return Tier.LOSSY
    return Tier.REORDERED if state.prepared.reordered else Tier.LOSSLESS
