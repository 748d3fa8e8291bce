"""The planning state of one captured signature as a value, and the functions from one state to the next.

This joins the stages: capture -> canonicalize -> profile -> problem -> solve -> plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from weakref import ReferenceType, ref

from torch import nn

from fxhybrid.accuracy.replan_loop import MeasuredErrors
from fxhybrid.accuracy.verifier import CaptureCheck, Reference, check_capture, memory_shortage, reference
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.compiler.budgets import resolve_budget
from fxhybrid.compiler.call_state import FRESH, CallState
from fxhybrid.compiler.first_plan import keep, learn, plan_within_error
from fxhybrid.compiler.observed_backward import first_expected
from fxhybrid.compiler.plan_transfer import (
    bind_actions,
    expected_by,
    simulate_transferred,
    trace_for,
)
from fxhybrid.errors import InvalidArgument, PlanMismatchError
from fxhybrid.ir.plan import Plan
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.options import Options
from fxhybrid.passes.build_problem import CodecChoices
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.pipeline import Prepared, prepare_traced, trace
from fxhybrid.profiling.state_bytes import gradient_bytes
from fxhybrid.solvers.portfolio.extend_plans import ensure, find_smallest_peak, polish_for
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, KnownPlans, judged_again
from fxhybrid.solvers.portfolio.limited_plans import Limits, cheapest_within, ensure_within
from fxhybrid.solvers.portfolio.solvers import Portfolio
from fxhybrid.units import NamedBudget, format_bytes


@dataclass(frozen=True, eq=False)
class PlanningState:
    """Holds all that is known of one captured signature; functions return a new one.

    Attributes:
        options: what the user asked for.
        prepared: the signature up to the planning problem, with the errors that were planned with.
        initial_choices: codecs before calibration added channel-wise ones.
        plans: the known plans.
        errors: gradient errors that were measured.
        budget_bytes: limit of the peak.
        save_all_bytes: simulated peak of the save-all step.
        gradient_bytes: bytes of one set of parameter gradients.
        capture_check: how the captured graph compares with eager.
        adopted: the plan that was adopted for fresh gradients; None where plans are chosen by the budget.
        model: the user's; None where no calls are made by this state.
        adding: by the gradients that are added to older ones at once, the plans that theirs are made of, and these.
    """

    options: Options
    prepared: Prepared
    initial_choices: CodecChoices
    plans: KnownPlans
    errors: MeasuredErrors
    budget_bytes: int
    save_all_bytes: int
    gradient_bytes: int
    capture_check: CaptureCheck
    adopted: KnownPlan | None = None
    model: ReferenceType[nn.Module] | None = None
    adding: Mapping[frozenset[int], tuple[KnownPlans, KnownPlans]] = field(default_factory=dict)

    @property
    def minimum_bytes(self) -> int:
        """The smallest peak, with fresh gradients, for which a plan is known."""
        return self.plans.smallest.peak_bytes

    @property
    def is_given(self) -> bool:
        """Whether a plan is carried out that came from elsewhere."""
        return self.adopted is not None or self.plans.fixed

    def extra_bytes(self, call: CallState) -> int:
        """Returns what is alive beside the plan's own step: pending calls, and older gradients beside the new set."""
        return call.pending_bytes + (self.gradient_bytes if call.accumulating else 0)

    @property
    def accumulating(self) -> CallState:
        """The state of a call that finds older gradients, where all new ones can be added to them at once."""
        return CallState(accumulating=True, added=self.prepared.parameter_gradients)

    @property
    def least_budget_bytes(self) -> int:
        """The smallest budget for which plans are known, in all states of a call that it is to hold for."""
        least = self.minimum_bytes
        if self.options.accumulate:
            call = self.accumulating
            least = max(least, self.plans_for(call).smallest.peak_bytes + self.extra_bytes(call))
        return least

    def plans_for(self, call: CallState) -> KnownPlans:
        """Returns the plans with the peaks that they have in a state of the call."""
        if not call.added:
            return self.plans
        source, plans = self.adding.get(call.added, (None, None))
        if plans is None or source is not self.plans:
            plans = judged_again(self.plans, self.prepared.adding(call.added).problem)
        return plans

    def with_plans_for(self, call: CallState, plans: KnownPlans) -> PlanningState:
        """Returns the state with more plans for a state of the call."""
        if not call.added:
            return self if plans is self.plans else replace(self, plans=plans)
        if self.adding.get(call.added) == (self.plans, plans):
            return self
        return replace(self, adding={**self.adding, call.added: (self.plans, plans)})


def plan_signature(
    step: Step,
    call: StepCall,
    options: Options,
    budget_bytes: int | None,
    transferred: Plan | None,
    *,
    is_share: bool = False,
) -> PlanningState:
    """Captures a step and plans it.

    Args:
        step: model and loss.
        call: example arguments; not kept.
        options: what the user asked for.
        budget_bytes: the budget if it is resolved already.
        transferred: a plan to carry out if it fits here.
        is_share: whether the resolved budget is a share of another signature's peak: inputs that stand for Python
            numbers, which were constants there, come on top of it.

    Raises:
        PlanMismatchError: ``transferred`` was made for another graph or version.
        CaptureError: the step cannot be traced, or the trace computes something else.
    """
    traced = trace(step, call, options) if transferred is None else trace_for(transferred, step, call, options)
    expected = expected_by(traced, transferred) if transferred else first_expected(traced)
    prepared = prepare_traced(traced, expected)
    if transferred is not None:
        prepared = prepared.offering(bind_actions(transferred, prepared.problem, prepared.fingerprint))
    save_all_bytes = simulate_actions(prepared.problem, {}).peak_bytes
    asked = options.budget
    is_open = budget_bytes is None
    if budget_bytes is not None and is_share:
        budget_bytes += traced.capture.float_bytes
    if budget_bytes is None:
        budget_bytes = resolve_budget(asked, step.model, options.optimizer, save_all_bytes, prepared.problem)
    if transferred is not None:
        budget_bytes = min(budget_bytes, transferred.budget_bytes)
    learnt = learn(prepared, step, call, options, budget_bytes, transferred)
    result = learnt.result
    state = PlanningState(
        options=options,
        prepared=result.prepared,
        initial_choices=prepared.choices,
        plans=result.plans,
        errors=result.errors,
        budget_bytes=budget_bytes,
        save_all_bytes=save_all_bytes,
        gradient_bytes=gradient_bytes(step.model),
        capture_check=learnt.check,
        model=ref(step.model),
    )
    if is_open and asked is NamedBudget.SMALLEST:
        state = with_smallest(state)
        state = replace(state, budget_bytes=state.least_budget_bytes)
    state = search(state, FRESH)
    keep(learnt, state.plans)
    return state


def with_smallest(state: PlanningState) -> PlanningState:
    """Adds the plan of the smallest peak that can be found, in all states of a call that the budget is to hold for."""
    state = replace(state, plans=find_smallest_peak(state.plans))
    if not state.options.accumulate:
        return state
    return state.with_plans_for(state.accumulating, find_smallest_peak(state.plans_for(state.accumulating)))


def recalibrate(state: PlanningState, step: Step, call: StepCall) -> PlanningState:
    """Measures errors and chooses channel widths on another batch, and re-plans by them.

    Raises:
        InvalidArgument: memory does not allow the save-all step.
    """
    state, compared = _reference(state, step, call)
    prepared = state.prepared.with_choices(state.initial_choices)
    result = plan_within_error(prepared, compared, state.options, state.budget_bytes)
    state = replace(state, prepared=result.prepared, plans=result.plans, errors=result.errors, adopted=None)
    return search(state, FRESH)


def extend(state: PlanningState, budget_bytes: int) -> PlanningState:
    """Searches plans for another budget and adds them to the known ones; the state's own budget stays."""
    if state.options.solver == "ilp" or not isinstance(state.options.solver, str):
        plans, _ = Portfolio(state.options.solver).extend(state.plans, budget_bytes)
    else:
        plans = polish_for(state.plans, budget_bytes)
    return replace(state, plans=plans)


def set_budget(state: PlanningState, budget_bytes: int) -> PlanningState:
    """Moves to another budget, for which ``extend`` searched plans.

    Raises:
        BudgetError: no known plan fits.
    """
    state = replace(state, budget_bytes=budget_bytes, adopted=None)
    choose(state, FRESH)
    return state


def adopt(state: PlanningState, plan: Plan) -> PlanningState:
    """Takes over this very plan, and its budget, for fresh gradients.

    Raises:
        PlanMismatchError: it was made for another graph or version, or peaks above its own budget here.
    """
    actions = bind_actions(plan, state.prepared.problem, state.prepared.fingerprint)
    prepared = state.prepared.offering(actions)
    known = simulate_transferred(prepared.problem, plan, actions)
    peak_bytes = known.point.peak_bytes
    if peak_bytes > plan.budget_bytes:
        raise PlanMismatchError(
            f"the plan peaks at {peak_bytes} bytes ({format_bytes(peak_bytes)}) here, above its "
            f"budget of {plan.budget_bytes}; plan again with fxhybrid.plan"
        )
    plans = replace(state.plans, problem=prepared.problem)
    return replace(state, prepared=prepared, plans=plans, budget_bytes=plan.budget_bytes, adopted=known)


def search(state: PlanningState, call: CallState) -> PlanningState:
    """Makes sure that ``choose`` finds a plan in this state of the call, if any can be found."""
    if state.adopted is not None and call == FRESH:
        return state
    wanted = _limits(state, call)
    plans = ensure(state.plans_for(call), wanted[-1].peak_bytes)
    for limits in (wanted[0], wanted[-1]):
        plans = ensure_within(plans, limits)
        if cheapest_within(plans, limits) is not None:
            break
    return state.with_plans_for(call, plans)


def _limits(state: PlanningState, call: CallState) -> list[Limits]:
    """Returns the limits that a plan for the call is to keep, each given up for the next where no plan does."""
    limit_bytes, hard = state.budget_bytes - state.extra_bytes(call), call.held_limit_bytes
    wanted = call.wanted_held_bytes
    if wanted is None:
        return [Limits(limit_bytes, hard)]
    held = wanted if hard is None else min(wanted, hard)
    smallest = min(limit_bytes, state.minimum_bytes)  # where no plan leaves what is wanted, this one leaves most
    return [Limits(limit_bytes, held, call.wanted_backward_bytes), Limits(smallest, hard), Limits(limit_bytes, hard)]


def choose(state: PlanningState, call: CallState) -> KnownPlan:
    """Chooses the adopted plan, or else the cheapest known one within the budget and the limits of the call.

    Raises:
        BudgetError: none fits in this state of the call.
    """
    known = _chosen(state, call)
    if known is None:
        raise state.plans_for(call).budget_error(state.budget_bytes, state.extra_bytes(call))
    return known


def fits(state: PlanningState, call: CallState) -> bool:
    """Says whether a known plan fits in this state of the call."""
    return _chosen(state, call) is not None


def _chosen(state: PlanningState, call: CallState) -> KnownPlan | None:
    if state.adopted is not None and call == FRESH:
        return state.adopted
    offered = [state.plans_for(call)]
    if state.adopted is not None and not call.accumulating:  # an adopted plan is one for fresh gradients
        offered.insert(0, replace(state.plans, plans=(state.adopted,), fallback=()))
    attempts = ((plans, limits) for limits in _limits(state, call) for plans in offered)
    found = (cheapest_within(plans, limits) for plans, limits in attempts)
    return next((known for known in found if known is not None), None)


def measure_error(state: PlanningState, step: Step, call: StepCall, graphs: SplitGraphs) -> tuple[PlanningState, float]:
    """Measures the relative gradient error of a plan's graphs on another batch.

    Raises:
        InvalidArgument: memory does not allow the save-all step, with which it is compared.
    """
    state, compared = _reference(state, step, call)
    return state, compared.gradient_error(graphs)


def _reference(state: PlanningState, step: Step, call: StepCall) -> tuple[PlanningState, Reference]:
    """Runs the save-all step on a batch, and compares the capture with eager unless that was done before."""
    shortage = memory_shortage(state.save_all_bytes)
    if shortage is not None:
        raise InvalidArgument(f"the gradient error cannot be measured: {shortage}; free some, or take a smaller batch")
    compared = reference(state.prepared, step, call)
    if state.capture_check.difference is None:
        state = replace(state, capture_check=check_capture(compared))
    return state, compared
