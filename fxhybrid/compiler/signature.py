"""The one place that joins the stages: capture -> canonicalize -> profile -> problem -> solve -> plan -> rewrite
-> split -> run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fxhybrid.accuracy.replan_loop import WithinError, measured_plan, plans_within_error
from fxhybrid.accuracy.verifier import CaptureCheck, Verifier
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.compiler.plan_transfer import carried_actions, named_actions, versions
from fxhybrid.compiler.planner import PlanMaker, carried_plan, error_target
from fxhybrid.devices.op_work import StepWork, work_of
from fxhybrid.errors import BudgetError, InvalidArgument, PlanMismatchError
from fxhybrid.ir.plan import Actions, GradientError, Plan
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.options import Options
from fxhybrid.pipeline import build_graphs, prepare
from fxhybrid.profiling.state_bytes import gradient_bytes
from fxhybrid.runtime import StepFunction
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.portfolio.extend_plans import ensure, frontier_plans, polish_for
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, KnownPlans, join, plans_of, smallest_of
from fxhybrid.solvers.portfolio.solvers import Portfolio
from fxhybrid.units import format_bytes

CARRIED_PLANS = 128  # whose graphs are kept, for a client that moves between plans from step to step


@dataclass(frozen=True, eq=False)
class Active:
    """A plan at work: its rewritten graph, the function over flat inputs, and the one over the step's own."""

    plan: Plan
    joint: JointGraph
    function: StepFunction
    call: Callable[..., Any]


class Signature:
    """One captured signature: its problem, all plans known for it, and the graphs that run now."""

    def __init__(
        self, step: Step, call: StepCall, options: Options, budget_bytes: int | None, carried: Plan | None
    ) -> None:
        """Captures and plans.

        Args:
            step: model and loss.
            call: example arguments; not kept.
            options: what the user asked for.
            budget_bytes: the budget if it is resolved already.
            carried: a plan to carry out if it fits here.

        Raises:
            PlanMismatchError: ``carried`` was made for another graph or version.
            CaptureError: the step cannot be traced, or the trace computes something else.
            BudgetError: no known plan fits.
        """
        self.options = options
        self.gradient_bytes = gradient_bytes(step.model)
        self.prepared = prepare(step, call, options)
        if carried is not None:
            actions = carried_actions(carried, self.prepared.problem, self.prepared.fingerprint)
            self.prepared = self.prepared.offering(actions)
        self.save_all_bytes = simulate_actions(self.prepared.problem, {}).peak_bytes
        share = options.budget
        self.budget_bytes = budget_bytes or (share if isinstance(share, int) else int(share * self.save_all_bytes))
        self.states: dict[bool, Active] = {}
        self.carried: dict[str, dict[bool, Active]] = {}
        self.choices = self.prepared.choices  # before calibration adds channel-wise codecs
        self.check = CaptureCheck(None, "not compared with eager")
        self._plan_on(self._verifier(step, call), carried)

    def _plan_on(self, verifier: Verifier, carried: Plan | None) -> None:
        """Plans by the errors on the verifier's batch, where memory allows to measure them, or takes a plan over."""
        options = self.options
        found = self._carried_over(verifier, carried) if carried else None
        make_plans = PlanMaker(options, self.budget_bytes)
        if found is None and verifier.reference is None:
            found = WithinError(self.prepared, make_plans(self.prepared.problem))
        self.found = found or plans_within_error(
            self.prepared,
            verifier,
            options.max_grad_error,
            error_target(options),
            lambda prepared, kept, near: make_plans(prepared.problem, kept, near),
            self._that_matter,
        )
        self.prepared, self.plans = self.found.prepared, self.found.plans
        self.active(accumulating=False)

    def recalibrate(self, step: Step, call: StepCall) -> None:
        """Measures errors and chooses channel widths anew on another batch, and plans by them.

        Raises:
            InvalidArgument: memory does not allow the step that keeps everything.
            BudgetError: no plan fits any more; the old one stays.
        """
        verifier = self._verifier(step, call)
        if verifier.reference is None:
            raise InvalidArgument(verifier.check.note)
        before = dict(vars(self))
        self.prepared = self.prepared.with_choices(self.choices)
        self.states, self.carried = {}, {}
        try:
            self._plan_on(verifier, None)
        except BudgetError:
            vars(self).update(before)
            raise

    # -- planning -----------------------------------------------------------------------------------------

    def _that_matter(self, plans: KnownPlans) -> list[FrontierPoint]:
        """The smallest plan, and the one for the budget."""
        chosen = plans.cheapest(self.budget_bytes)
        return [smallest_of(plans.plans), *([chosen.point] if chosen else [])]

    def _carried_over(self, verifier: Verifier, plan: Plan) -> WithinError[KnownPlans] | None:
        """A plan made elsewhere, as the only one known; None if it peaks above its (smaller) budget on this device."""
        problem = self.prepared.problem
        self.budget_bytes = min(self.budget_bytes, plan.budget_bytes)
        known = carried_plan(problem, plan, carried_actions(plan, problem, self.prepared.fingerprint))
        if known.point.peak_bytes > self.budget_bytes:
            return None
        plans = replace(plans_of(problem, max_error=error_target(self.options)), plans=(known,), fixed=True)
        if verifier.reference is None:
            return WithinError(self.prepared, plans)
        return measured_plan(self.prepared, verifier, plans, known.point)

    def choose(self, budget_bytes: int, *, accumulating: bool) -> KnownPlan:
        """The cheapest known plan within the budget, in the given gradient state.

        Raises:
            BudgetError: none fits.
        """
        beside = self._beside(accumulating)
        self.plans = ensure(self.plans, budget_bytes - beside)
        known = self.plans.cheapest(budget_bytes - beside)
        if known is None:
            raise self.plans.budget_error(budget_bytes, beside)
        return known

    def _beside(self, accumulating: bool) -> int:
        """Bytes of older gradients: a full new set appears beside them."""
        return self.gradient_bytes if accumulating else 0

    # -- running ------------------------------------------------------------------------------------------

    def active(self, accumulating: bool) -> Active:
        """What runs in this gradient state; planned when first needed.

        Raises:
            BudgetError: no known plan fits in this state.
        """
        if accumulating not in self.states:
            known = self.choose(self.budget_bytes, accumulating=accumulating)
            self.states[accumulating] = self._activate(known, accumulating)
        return self.states[accumulating]

    def _activate(self, known: KnownPlan, accumulating: bool) -> Active:
        joint, graphs = build_graphs(self.prepared, known.point.actions)
        captured = self.prepared.capture
        function = StepFunction(graphs, self.prepared.joint, captured.metadata)
        return Active(self._plan(known, accumulating), joint, function, captured.bind(function))

    def use_plan(self, plan: Plan) -> None:
        """Carries out this very plan while gradients are fresh; the graphs of the last few are kept.

        Raises:
            PlanMismatchError: it was made for another graph or version, or peaks above its own budget here.
        """
        actions = carried_actions(plan, self.prepared.problem, self.prepared.fingerprint)
        self.prepared = self.prepared.offering(actions)
        self.plans = replace(self.plans, problem=self.prepared.problem)
        key = f"{plan.budget_bytes} {sorted((name, str(action)) for name, action in plan.actions.items())}"
        known = None if key in self.carried else self._fitting(plan, actions)
        self.budget_bytes = plan.budget_bytes  # part of the active plan
        states = self.carried.pop(key) if known is None else {False: self._activate(known, False)}
        while len(self.carried) >= CARRIED_PLANS:
            del self.carried[next(iter(self.carried))]
        self.carried[key] = self.states = states

    def _fitting(self, plan: Plan, actions: Actions) -> KnownPlan:
        known = carried_plan(self.prepared.problem, plan, actions)
        peak_bytes = known.point.peak_bytes
        if peak_bytes > plan.budget_bytes:
            raise PlanMismatchError(
                f"the plan peaks at {peak_bytes} bytes ({format_bytes(peak_bytes)}) here, above its "
                f"budget of {plan.budget_bytes}; plan again with fxhybrid.plan"
            )
        return known

    @property
    def work(self) -> StepWork:
        """What each op of the problem computes and moves, for devices that it was not measured on."""
        return work_of(self.prepared.layout)

    def _plan(self, known: KnownPlan, accumulating: bool) -> Plan:
        problem = self.prepared.problem
        return Plan(
            budget_bytes=self.budget_bytes,
            peak_bytes=known.point.peak_bytes + self._beside(accumulating),
            added_s=known.point.overhead_s,
            lower_bound_s=known.lower_bound_s,
            step_s=problem.step_s,
            gradient_error=self._error_of(known.point),
            status=known.status.value,
            solver=known.solver,
            solve_s=known.solve_s,
            actions=named_actions(problem, known.point.actions),
            graph_fingerprint=self.prepared.fingerprint,
            versions=versions(),
            device=self.prepared.profile.device,
        )

    def _error_of(self, point: FrontierPoint) -> GradientError:
        if point.error == 0:
            return GradientError(0.0, "exact")
        measured = self.found.error_of(point.actions)
        return GradientError(point.error, "estimated") if measured is None else GradientError(measured, "measured")

    def set_budget(self, budget_bytes: int) -> Callable[[], None]:
        """Plans for another budget; calling the result makes it so.

        Raises:
            BudgetError: no known plan fits; nothing has changed then.
        """
        if self.options.solver == "ilp" or not isinstance(self.options.solver, str):
            self.plans, _ = Portfolio(self.options.solver).extend(self.plans, budget_bytes)
        else:
            self.plans = polish_for(self.plans, budget_bytes)
        self.choose(budget_bytes, accumulating=False)

        def commit() -> None:
            self.budget_bytes = budget_bytes
            self.states = {}

        return commit

    @property
    def minimum_bytes(self) -> int:
        """The smallest peak, with fresh gradients, for which a plan is known."""
        return self.plans.smallest.peak_bytes

    def accumulating_note(self) -> str:
        """Whether the budget holds while gradients of an earlier backward pass exist, in words."""
        needed = self.minimum_bytes + self.gradient_bytes
        if needed <= self.budget_bytes:
            return "fits too while older gradients exist"
        return f"does not fit while older gradients exist: that takes {format_bytes(needed)}"

    def error_price(self, more_error: float) -> ErrorPrice:
        """What ``max_grad_error`` higher by ``more_error`` would save."""
        problem, limit = self.prepared.problem, error_target(self.options, more_error)
        looser = frontier_plans(problem, max_error=limit)
        # the plans are within the looser limit too; the fallback ones were measured
        looser = polish_for(join(looser, self.plans), self.budget_bytes)
        cheapest = looser.cheapest(self.budget_bytes)
        overhead_s = cheapest.point.overhead_s if cheapest else self.plan.added_s
        saved_bytes = self.minimum_bytes - looser.smallest.peak_bytes
        return ErrorPrice(more_error, saved_bytes, self.plan.added_s - overhead_s)

    @property
    def plan(self) -> Plan:
        """The plan for fresh gradients."""
        return self.active(accumulating=False).plan

    def measure_error(self, step: Step, call: StepCall) -> float:
        """Relative gradient error of the active plan on another batch.

        Raises:
            InvalidArgument: memory does not allow the step that keeps everything, which it is compared with.
        """
        verifier = self._verifier(step, call)
        if verifier.reference is None:
            raise InvalidArgument(verifier.check.note)
        return verifier.gradient_error(self.active(accumulating=False).function.graphs)

    def _verifier(self, step: Step, call: StepCall) -> Verifier:
        """A verifier on one batch; the first that memory allows compares the capture with eager."""
        compared = self.check.difference is not None
        verifier = Verifier(
            self.prepared.capture,
            self.prepared.joint,
            step,
            call,
            save_all=lambda: self.prepared.save_all_graphs,
            save_all_bytes=self.save_all_bytes,
            against_eager=not compared,
        )
        if not compared:
            self.check = verifier.check
        return verifier


@dataclass(frozen=True)
class ErrorPrice:
    """What a higher limit of the gradient error would save, as far as the heuristic finds it.

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
