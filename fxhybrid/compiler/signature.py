"""One planned call signature: its planning state, and the graphs that run, for the backward pass that is expected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fxhybrid.capture.step import Step, StepCall
from fxhybrid.compiler.active_graphs import ActiveGraph, ActiveGraphs
from fxhybrid.compiler.call_state import FRESH, CallState
from fxhybrid.compiler.expected_states import plan_expected, with_drops
from fxhybrid.compiler.observed_backward import ObservedBackward
from fxhybrid.compiler.planning_state import PlanningState, choose, extend, search, set_budget
from fxhybrid.errors import BudgetError
from fxhybrid.passes.expected_backward import ExpectedBackward

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Signature:
    """Joins a planning state and the graphs built for it.

    Attributes:
        state: what is known, for one expected backward pass.
        graphs: what was built for it.
        observed: what backward passes showed; changes as they run.
        others: states and graphs for other backward passes that were expected before.
    """

    state: PlanningState
    graphs: ActiveGraphs = field(default_factory=ActiveGraphs)
    observed: ObservedBackward = field(default_factory=ObservedBackward)
    others: Mapping[ExpectedBackward, tuple[PlanningState, ActiveGraphs]] = field(default_factory=dict)

    def holds(self, step: Step, call: StepCall) -> bool:
        """Says whether the capture is valid for a call."""
        return self.state.prepared.capture.holds(step, *call)

    def searched(self, call: CallState) -> Signature:
        """Returns the signature with a plan for a state of the call among the known ones, if any can be found."""
        if self.graphs.active.get(call) is not None:
            return self
        state = search(self.state, call)
        return self if state is self.state else replace(self, state=state)

    def active(self, call: CallState = FRESH) -> ActiveGraph:
        """Returns what runs in a state of the call; built when first needed.

        Raises:
            BudgetError: no known plan fits in this state of the call.
        """
        return self.graphs.find(call) or self.graphs.build(self.state, call, self.observed)

    def ready(self) -> Signature:
        """Returns the signature with graphs for fresh gradients.

        Raises:
            BudgetError: no known plan fits, for fresh gradients or where older ones are to be expected.
        """
        self.active()
        return _accumulating(self)

    def outlooks(self) -> list[ExpectedBackward]:
        """Returns the backward passes to plan for, each where the budget has no room for those before it."""
        prepared, arrived = self.state.prepared, self.observed.arrived
        now = prepared.expected
        if self.state.is_given and now.absent <= prepared.traced.without(arrived):
            return [now]
        return self.observed.outlooks(prepared.traced, now, self._is_free)

    @property
    def _is_free(self) -> bool:
        """Whether the plan for fresh gradients adds no time."""
        graph = self.graphs.active.get(FRESH)
        return graph is not None and graph.point.overhead_s == 0

    def expecting(self, expected: ExpectedBackward, step: Step, call: StepCall | None = None) -> Signature:
        """Returns the signature planned for an expected backward pass.

        Args:
            expected: the backward pass.
            step: model and loss.
            call: a batch to measure gradient errors on; None to estimate them.
        """
        now = self.state.prepared.expected
        if expected == now:
            return self
        others = {**self.others, now: (self.state, self.graphs)}
        known = others.pop(expected, None)
        if known is not None:
            state, graphs = known
            if state.budget_bytes != self.state.budget_bytes:
                state, graphs = replace(state, budget_bytes=self.state.budget_bytes, adopted=None), graphs.for_budget()
        else:
            graphs = ActiveGraphs()
            drops_only = expected.absent == now.absent
            state = (
                with_drops(self.state, expected.dropped)
                if drops_only
                else plan_expected(self.state, expected, step, call)
            )
        return replace(self, state=state, graphs=graphs, others=others)

    def with_budget(self, budget_bytes: int, step: Step) -> Signature:
        """Returns the signature planned for another budget.

        Raises:
            BudgetError: no known plan fits.
        """
        return first_fitting(
            self.outlooks(), lambda expected: _for_budget(self.expecting(expected, step), budget_bytes)
        )


def first_fitting(outlooks: Sequence[ExpectedBackward], attempt: Callable[[ExpectedBackward], T]) -> T:
    """Returns what an attempt gives for the first expected backward pass for which the budget has room.

    Raises:
        BudgetError: of the last attempt.
    """
    for expected in outlooks[:-1]:
        with contextlib.suppress(BudgetError):
            return attempt(expected)
    return attempt(outlooks[-1])


def _for_budget(signature: Signature, budget_bytes: int) -> Signature:
    state = set_budget(extend(signature.state, budget_bytes), budget_bytes)
    return _accumulating(replace(signature, state=state, graphs=signature.graphs.for_budget()))


def _accumulating(signature: Signature) -> Signature:
    """Makes sure that there is a plan for calls that find older gradients, if such calls are announced."""
    state = signature.state
    if not state.options.accumulate:
        return signature
    state = search(state, state.accumulating)
    choose(state, state.accumulating)
    return replace(signature, state=state)
