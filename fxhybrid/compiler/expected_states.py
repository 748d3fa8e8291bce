"""Planning states of one signature for the backward passes that may follow its calls."""

from __future__ import annotations

from dataclasses import replace

from fxhybrid.accuracy.verifier import check_capture, memory_shortage, reference
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.compiler.first_plan import plan_within_error
from fxhybrid.compiler.planner import PlanMaker
from fxhybrid.compiler.planning_state import PlanningState
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.pipeline import prepare_traced
from fxhybrid.solvers.portfolio.extend_plans import ensure
from fxhybrid.solvers.portfolio.known_plans import join, plans_of, simulated


def with_drops(state: PlanningState, dropped: frozenset[int]) -> PlanningState:
    """Plans for a caller that drops other outputs; gradients, and so their errors, stay what they were."""
    prepared = state.prepared.expecting_drops(dropped)
    old = state.plans
    plans = plans_of(prepared.problem, max_error=old.max_error)
    plans = replace(
        plans,
        plans=tuple(replace(p, point=simulated(prepared.problem, p.point.actions)) for p in old.plans),
        fallback=tuple(replace(p, point=simulated(prepared.problem, p.point.actions)) for p in old.fallback),
        fixed=old.fixed,
        from_other_sizes=old.from_other_sizes,
    )
    if plans.from_other_sizes:
        plans = ensure(plans, state.budget_bytes)
    cheapest = plans.cheapest(state.budget_bytes)
    is_slow = cheapest is None or (cheapest.point.overhead_s > 0 and not old.from_other_sizes)
    if is_slow and not plans.fixed:
        plans = join(PlanMaker(state.options, state.budget_bytes)(prepared.problem), plans)
    return replace(
        state,
        prepared=prepared,
        plans=plans,
        save_all_bytes=simulate_actions(prepared.problem, {}).peak_bytes,
        adopted=None,
    )


def plan_expected(state: PlanningState, expected: ExpectedBackward, step: Step, call: StepCall | None) -> PlanningState:
    """Plans the same signature for a backward pass in which other tangents arrive.

    Args:
        state: for any expected backward pass.
        expected: the other one.
        step: model and loss.
        call: a batch on which gradient errors are measured, and the captured graph is compared with eager; None, or
            where memory does not allow it, for estimates.

    Raises:
        CaptureError: the captured graph computes something else than the model.
    """
    prepared = prepare_traced(state.prepared.traced, expected)
    save_all_bytes = simulate_actions(prepared.problem, {}).peak_bytes
    compared = None if call is None or memory_shortage(save_all_bytes) else reference(prepared, step, call.detached())
    result = plan_within_error(prepared, compared, state.options, state.budget_bytes)
    return replace(
        state,
        prepared=result.prepared,
        initial_choices=prepared.choices,
        plans=result.plans,
        errors=result.errors,
        save_all_bytes=save_all_bytes,
        capture_check=check_capture(compared) if compared else state.capture_check,
        adopted=None,
    )
