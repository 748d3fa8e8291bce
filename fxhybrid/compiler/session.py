"""What a compiled module knows besides its model: one signature per kind of call, and the budget of all."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from typing import Any
from weakref import ref

from torch import nn

from fxhybrid.accuracy.drift_monitor import DriftMonitor
from fxhybrid.capture.outer_context import refuse_parallel, refuse_sharded
from fxhybrid.capture.planning_lock import PLANNING
from fxhybrid.capture.step import Step, StepCall, check_call
from fxhybrid.compiler.active_graphs import ActiveGraph, ActiveGraphs
from fxhybrid.compiler.addable_inputs import addable_inputs
from fxhybrid.compiler.admission import admit
from fxhybrid.compiler.budgets import resolve_budget
from fxhybrid.compiler.call_state import FRESH, CallState
from fxhybrid.compiler.expected_states import plan_expected
from fxhybrid.compiler.largest_call import largest_call
from fxhybrid.compiler.model_parameters import has_gradients
from fxhybrid.compiler.pending_calls import pending_calls
from fxhybrid.compiler.plan_transfer import expected_by, in_layout_of
from fxhybrid.compiler.planning_state import (
    PlanningState,
    adopt,
    measure_error,
    plan_signature,
    recalibrate,
    with_smallest,
)
from fxhybrid.compiler.repeated_call import RepeatedCall, is_first_of_step
from fxhybrid.compiler.signature import Signature, first_fitting
from fxhybrid.compiler.signature_cache import SignatureCache
from fxhybrid.errors import BudgetError, InvalidArgument
from fxhybrid.ir.plan import Plan
from fxhybrid.options import Options
from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.profiling.collector import paused_collector, without_older_objects
from fxhybrid.solvers.portfolio.known_plans import KnownPlan
from fxhybrid.units import Budget, NamedBudget, check_budget

MANY_SIGNATURES = 32  # more than a real model has shapes; a Python counter makes one a step


class Session:
    """Holds what a HybridModule knows besides its model.

    Attributes:
        model: the user's.
        options: what the user asked for.
        transferred: a plan to begin with; None to make one.
        step: model and loss.
        budget_bytes: limit of the peak; None while a share is not resolved.
        is_share: whether that was asked for as a share, which Python numbers that become inputs later do not count in.
        monitor: checks of the gradient error.
        cache: the signatures, one for each kind and size of call; each is a value that is replaced as a whole.
        base: the state that a relative budget is resolved by, that of the first planned call; None before it.
    """

    def __init__(self, model: nn.Module, options: Options, plan: Plan | None) -> None:
        self.model = model
        self.options = options
        self.transferred = plan
        self.step = Step(model, options.loss_fn, options.return_outputs)
        self.budget_bytes = options.budget if isinstance(options.budget, int) else None
        self.is_share = isinstance(options.budget, float)
        self.monitor = DriftMonitor(options.check_error_every, options.max_grad_error)
        self.cache = SignatureCache()
        self.base: PlanningState | None = None
        self._found: ref[StepCall] | None = None  # the call that the first signature was found for
        self._repeated: RepeatedCall | None = None
        self._adopted: tuple[Plan, KnownPlan | None] | None = None  # the last one, and what became of it here

    @property
    def signatures(self) -> list[Signature]:
        """One for each kind and size of call, the last called first."""
        return self.cache.signatures

    @property
    def first(self) -> Signature:
        """The last called signature.

        Raises:
            InvalidArgument: nothing is planned yet.
        """
        if not self.signatures:
            raise InvalidArgument("nothing is planned yet: call the module once, or pass example_inputs to compile")
        return self.signatures[0]

    def knows(self, call: StepCall) -> bool:
        """Says whether there is a signature for ``call``, which becomes the first one."""
        is_known = self.cache.find(self.step, call)
        self._found = ref(call) if is_known else None
        return is_known

    def find(self, call: StepCall) -> None:
        """Makes the signature that holds for ``call`` the first one; captures and plans if there is none yet."""
        if self.knows(call):
            return
        if self.options.dynamic is not None and self.base is None:
            self._plan(largest_call(call, self.model, self.options.dynamic))
            if self.knows(call):
                return
        self._plan(call)

    @without_older_objects()
    def _plan(self, call: StepCall) -> None:
        """Captures and plans a kind of call, which becomes the first signature."""
        refuse_sharded(self.model)
        check_call(call, self.model)
        signature = self._planned(call)
        self.cache.add(self._ready(signature), call)
        if self.budget_bytes is None or self.transferred is not None:
            self.budget_bytes = signature.state.budget_bytes
        self.base = self.base or signature.state
        if len(self.cache.captured) == MANY_SIGNATURES:
            warnings.warn(
                f"{MANY_SIGNATURES} kinds of calls are planned by now, each traced anew; does the model count in a "
                "Python attribute (make it a buffer), or do input shapes keep changing (pad them)?",
                stacklevel=7,
            )

    def _planned(self, call: StepCall) -> Signature:
        """Plans a call of a new kind or size, by what is known of other sizes if that is possible."""
        derived = None
        if self.transferred is None and self.budget_bytes is not None:
            with paused_collector():
                derived = self.cache.derive(self.step, call, self.budget_bytes)
        if derived is not None:
            return derived
        given = call.detached(), self.options, self.budget_bytes, self.transferred
        return Signature(plan_signature(self.step, *given, is_share=self.is_share))

    def active(self, call: CallState = FRESH) -> ActiveGraph:
        """Returns what the first signature runs in a state of the call."""
        self.signatures[0] = self.first.searched(call)  # what was found stays known, even if none fits
        return self.signatures[0].active(call)

    def run(self, call: StepCall) -> Any:
        """Runs one forward pass of a training step."""
        with PLANNING:  # of two threads, each must run what it has found
            if self.options.step_in_backward:
                refuse_parallel()
            if self._found is None or self._found() is not call:  # guards take long beside a short step
                self.find(call)
            self.monitor.before_step(self, call)
            active = self._active_for(call)
        return self.step.check_result(active.call(self.step, *call))

    def _active_for(self, call: StepCall) -> ActiveGraph:
        """Returns what runs a call; a step that broke off may be held by a cycle, so garbage goes before a refusal."""
        try:
            return self._fitting(call)
        except BudgetError:
            if not pending_calls():
                raise
        gc.collect()
        return self._fitting(call)

    def _fitting(self, call: StepCall) -> ActiveGraph:
        """Returns what runs a call, for the backward pass that is expected to follow."""
        before, is_alone = self.first, is_first_of_step(self.model)
        if is_alone and self._repeated is not None and self._repeated.chosen_by(before):
            return self._repeated.active
        try:
            active = first_fitting(before.outlooks(), lambda expected: self._active_expecting(expected, call))
        except BudgetError:
            self.signatures[0] = self.first.expecting(before.state.prepared.expected, self.step)
            raise
        self._repeated = RepeatedCall.of(self.first, active) if is_alone else None
        return active

    def _active_expecting(self, expected: ExpectedBackward, call: StepCall) -> ActiveGraph:
        self.signatures[0] = self.first.expecting(expected, self.step, call)
        older = has_gradients(self.model)
        added = addable_inputs(self.step, self.first.state.prepared, self.first.observed) if older else frozenset()
        state, found = admit(self.first.state, self.model, call.tensors, CallState(older, added=added))
        self.signatures[0] = replace(self.first, state=state)
        return self.active(found)

    def _ready(self, signature: Signature) -> Signature:
        """Returns a signature with graphs for fresh gradients, or raises ``BudgetError`` if no plan fits."""
        return first_fitting(signature.outlooks(), lambda expected: signature.expecting(expected, self.step).ready())

    def set_budget(self, budget: Budget) -> None:
        """Plans all signatures for another budget, or changes nothing and raises."""
        checked = check_budget(budget)
        if not isinstance(checked, int):
            checked = self._budget_bytes(checked)
        self.cache.signatures = [s.with_budget(checked, self.step) for s in self.cache.without_derived()]
        self.budget_bytes, self.is_share = checked, False

    def _budget_bytes(self, budget: float | NamedBudget) -> int:
        """Returns a budget in bytes that depends on the first signature; the smallest one holds for all signatures."""
        if self.base is None:
            raise InvalidArgument(f"a budget of {budget!r} needs a first call; pass bytes instead")
        if budget is NamedBudget.SMALLEST:
            kept = self.cache.without_derived()
            self.cache.signatures = [replace(s, state=with_smallest(s.state)) for s in kept]
            return max(signature.state.least_budget_bytes for signature in self.signatures)
        save_all_bytes, problem = self.base.save_all_bytes, self.base.prepared.problem
        return resolve_budget(budget, self.model, self.options.optimizer, save_all_bytes, problem)

    def adopt(self, plan: Plan) -> None:
        """Carries out this very plan in the first signature."""
        if self._adopted is not None and self._adopted[0] is plan and self.first.state.adopted is self._adopted[1]:
            return  # a client adopts a plan before each step
        expected = expected_by(self.first.state.prepared.traced, plan)
        found = self._laid_out_by(plan, expected).expecting(expected, self.step)
        found = replace(found, state=adopt(found.state, plan), graphs=found.graphs.for_adopted(plan))
        self.signatures[0] = found.ready()
        self._adopted = plan, self.first.state.adopted

    def _laid_out_by(self, plan: Plan, expected: ExpectedBackward) -> Signature:
        """Returns the first signature in the layouts that a plan was made for; planned anew where it has others."""
        found = self.first
        traced = in_layout_of(plan, found.state.prepared.traced, self.options)
        if traced is found.state.prepared.traced:
            return found
        prepared = replace(found.state.prepared, traced=traced)
        state = plan_expected(replace(found.state, prepared=prepared), expected, self.step, None)
        return Signature(state, observed=found.observed)

    def measure_error(self, call: StepCall) -> float:
        """Measures the gradient error of the first signature's plan on a batch."""
        graphs = self.active().function.graphs
        state, error = measure_error(self.first.state, self.step, call.detached(), graphs)
        self.signatures[0] = replace(self.first, state=state)
        return error

    def recalibrate(self, call: StepCall) -> None:
        """Re-plans the first signature by the errors on a batch, or changes nothing and raises."""
        state = recalibrate(self.first.state, self.step, call.detached())
        self.signatures[0] = replace(self.first, state=state, graphs=ActiveGraphs(), others={}).ready()
        self.cache.renew()
