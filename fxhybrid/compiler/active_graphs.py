"""The graphs that run: built when a state of the call first needs them, and kept while their plan may come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.compiler.call_state import CallState
from fxhybrid.compiler.planning_state import PlanningState, choose, describe
from fxhybrid.ir.plan import Plan
from fxhybrid.pipeline import build_graphs
from fxhybrid.runtime import StepFunction

MAX_ADOPTED = 128  # adopted plans whose graphs are kept, for a client that moves between plans from step to step

PlanKey = tuple[int, frozenset[tuple[str, str]]]


@dataclass(frozen=True, eq=False)
class ActiveGraph:
    """Holds a plan at work.

    Attributes:
        plan: what is carried out.
        joint: the rewritten joint graph.
        function: the step over the graph's flat inputs.
        call: the step over the module's own arguments.
    """

    plan: Plan
    joint: JointGraph
    function: StepFunction
    call: Callable[..., Any]


def build_active(state: PlanningState, call: CallState) -> ActiveGraph:
    """Chooses a known plan for a state of the call, and builds its graphs.

    Raises:
        BudgetError: no known plan fits in this state of the call.
    """
    known = choose(state, call)
    joint, graphs = build_graphs(state.prepared, known.point.actions)
    captured = state.prepared.capture
    function = StepFunction(graphs, state.prepared.joint, captured.metadata)
    return ActiveGraph(describe(state, known, call), joint, function, captured.bind(function))


@dataclass(frozen=True, eq=False)
class ActiveGraphs:
    """Caches the graphs of one planning state by state of the call, and those of plans that were adopted before.

    Attributes:
        active: what runs now.
        adopted: the same of each adopted plan; the one adopted longest ago comes first.
    """

    active: dict[CallState, ActiveGraph] = field(default_factory=dict)
    adopted: dict[PlanKey, dict[CallState, ActiveGraph]] = field(default_factory=dict)

    def for_budget(self) -> ActiveGraphs:
        """Returns an empty cache for the plans of another budget; adopted plans' graphs stay."""
        return ActiveGraphs(adopted=self.adopted)

    def for_adopted(self, plan: Plan) -> ActiveGraphs:
        """Returns the cache of a plan that is adopted now; that of the plan adopted longest ago may be dropped."""
        key = plan.budget_bytes, frozenset((name, str(action)) for name, action in plan.actions.items())
        active = self.adopted.pop(key, {})
        while len(self.adopted) >= MAX_ADOPTED:
            del self.adopted[next(iter(self.adopted))]
        self.adopted[key] = active
        return ActiveGraphs(active, self.adopted)
