"""One planned call signature: its planning state, and the graphs that run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fxhybrid.capture.step import Step, StepCall
from fxhybrid.compiler.active_graphs import ActiveGraph, ActiveGraphs
from fxhybrid.compiler.call_state import FRESH, CallState
from fxhybrid.compiler.planning_state import PlanningState, search


@dataclass(frozen=True, eq=False)
class Signature:
    """Joins a planning state and the graphs built for it.

    Attributes:
        state: what is known.
        graphs: what was built.
    """

    state: PlanningState
    graphs: ActiveGraphs = field(default_factory=ActiveGraphs)

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
        return self.graphs.find(call) or self.graphs.build(self.state, call)
