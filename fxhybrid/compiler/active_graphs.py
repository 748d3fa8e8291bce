"""The graphs that run: built when a state of the call first needs them, and kept while their plan may come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.compiler.backward_watch import BackwardWatch
from fxhybrid.compiler.call_state import CallState
from fxhybrid.compiler.described_plan import describe
from fxhybrid.compiler.observed_backward import ObservedBackward
from fxhybrid.compiler.pending_calls import PlannedCall
from fxhybrid.compiler.planning_state import PlanningState, choose
from fxhybrid.ir.plan import Actions, Plan
from fxhybrid.pipeline import build_graphs
from fxhybrid.runtime import StepFunction
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.portfolio.limited_plans import plan_bytes

MAX_STATES = 24  # states of the call whose graphs are kept; they share graphs where plans are the same
MAX_ADOPTED = 128  # adopted plans whose graphs are kept, for a client that moves between plans from step to step

PlanKey = tuple[int, frozenset[tuple[str, str]]]


@dataclass(frozen=True, eq=False)
class ActiveGraph:
    """Holds a plan at work.

    Attributes:
        point: what is carried out, with its figures.
        describe: makes the plan that a user sees.
        function: the step over the graph's flat inputs.
        call: the step over the module's own arguments.
    """

    point: FrontierPoint
    describe: Callable[[], Plan]
    function: StepFunction
    call: Callable[..., Any]

    @property
    def actions(self) -> Actions:
        """What is carried out, by tensor index."""
        return self.point.actions

    @property
    def joint(self) -> JointGraph:
        """The rewritten joint graph."""
        return self.function.graphs.joint

    @cached_property
    def plan(self) -> Plan:
        """What is carried out, by tensor name."""
        return self.describe()


def build_active(
    state: PlanningState, call: CallState, observed: ObservedBackward, built: Iterable[ActiveGraph] = ()
) -> ActiveGraph:
    """Chooses a known plan for a state of the call, and builds its graphs unless they are among the ``built`` ones.

    Raises:
        BudgetError: no known plan fits in this state of the call.
    """
    known = choose(state, call)
    actions = known.point.actions
    twin = next((graph for graph in built if graph.actions == actions), None)
    graphs = twin.function.graphs if twin else build_graphs(state.prepared, actions)
    prepared, captured = state.prepared, state.prepared.capture
    planned = _planned_call(state, call, actions)
    watch = None
    if planned is not None:
        watch = BackwardWatch(prepared, actions, graphs, planned, observed, call.added, state.extra_bytes(call))
    function = StepFunction(
        graphs,
        prepared.traced.interface,
        captured.metadata,
        absent=prepared.expected.absent,
        adding=call.added,
        updates=prepared.traced.updates,
        enter=watch.opened if watch else None,
    )
    bound = captured.bind(function)
    return ActiveGraph(known.point, partial(describe, state, known, call), function, bound)


def _planned_call(state: PlanningState, call: CallState, actions: Actions) -> PlannedCall | None:
    """Returns what other calls of the same step must know of a plan."""
    if state.model is None:
        return None
    plans = state.plans_for(call)
    return PlannedCall(
        state.model,
        state.options.optimizer,
        state.prepared.capture,
        state.budget_bytes,
        call.pending_bytes,
        plans.problem.tangent_bytes,
        plan_bytes(plans.problem, actions),
        plans,
    )


@dataclass(frozen=True, eq=False)
class ActiveGraphs:
    """Caches the graphs of one planning state by state of the call, and those of plans that were adopted before.

    Attributes:
        active: what runs now.
        adopted: the same of each adopted plan; the one adopted longest ago comes first.
    """

    active: dict[CallState, ActiveGraph] = field(default_factory=dict)
    adopted: dict[PlanKey, dict[CallState, ActiveGraph]] = field(default_factory=dict)

    def find(self, call: CallState) -> ActiveGraph | None:
        """Returns the graphs for a state of the call, which becomes the last used one."""
        graph = self.active.pop(call, None)
        if graph is not None:
            self.active[call] = graph
        return graph

    def build(self, state: PlanningState, call: CallState, observed: ObservedBackward) -> ActiveGraph:
        """Builds the graphs for a state of the call; those of the state used longest ago may be dropped.

        Raises:
            BudgetError: no known plan fits in this state of the call.
        """
        graph = build_active(state, call, observed, self.active.values())
        while len(self.active) >= MAX_STATES:
            del self.active[next(iter(self.active))]
        self.active[call] = graph
        return graph

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
