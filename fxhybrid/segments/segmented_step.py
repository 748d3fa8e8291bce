"""A step of several graphs under one budget: recorded on a batch, planned as one sequence, and run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx

from fxhybrid.accuracy.step_result import StepResult, observe_step, relative_difference
from fxhybrid.capture.python_state import undo_of_runs
from fxhybrid.capture.step import Step, StepCall, check_call
from fxhybrid.compiler.budgets import auto_bytes
from fxhybrid.compiler.bytes_beside import Participant, beside_bytes, model_storages
from fxhybrid.compiler.call_shape import CallShape
from fxhybrid.compiler.pending_calls import PendingCall, PlannedCall, pending_calls, storages_of
from fxhybrid.compiler.planning_lock import PLANNING
from fxhybrid.compiler.report import Report
from fxhybrid.errors import BudgetError, FxHybridError, GraphBreakError, InvalidArgument
from fxhybrid.ir.plan import Plan
from fxhybrid.ir.sequence import part_timeline
from fxhybrid.options import Options
from fxhybrid.pipeline import Prepared
from fxhybrid.profiling.state_bytes import gradient_bytes
from fxhybrid.segments.describe import plan_of, report_of
from fxhybrid.segments.graph_runner import in_graphs
from fxhybrid.segments.path import Path, parts_of
from fxhybrid.segments.planned_run import NothingPending, PlannedPart, PlannedRun, Room
from fxhybrid.segments.segment import NOTHING, Segment, under_way
from fxhybrid.segments.sequence_plans import PartActions, SequencePlan, SequencePlans, measured_plans
from fxhybrid.segments.solo_plans import SoloPlans
from fxhybrid.segments.trial import NothingToPlan, Trial, record
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes
from fxhybrid.units import Budget, NamedBudget, check_budget

IN_BACKWARD = (
    "step_in_backward=True updates parameters within the backward pass of one graph, and this step takes several; "
    "leave it out, or leave out what Python decides by values in the model's forward pass"
)
MOST_PATHS = 8  # through the model that are planned for one kind of call; others run part by part
MOST_KINDS = 16  # kinds of calls whose paths are kept


class SegmentedStep:
    """Trains a model that traces into several graphs only.

    Attributes:
        step: model and loss.
        options: what the user asked for.
        budget_bytes: limit of the peak; None before the first plan.
        segments: all graphs, in the order in which they were traced.
        paths: those that are planned, by kind of call, the last one taken first.
        last: kind of the last call.
        reason: why the model does not trace into one graph.
    """

    def __init__(self, step: Step, options: Options, budget_bytes: int | None, reason: GraphBreakError) -> None:
        """Prepares; nothing is traced before the first call.

        Args:
            step: model and loss.
            options: what the user asked for.
            budget_bytes: limit of the peak; None while it is not resolved.
            reason: why it does not trace into one graph.

        Raises:
            InvalidArgument: an option that needs one graph.
        """
        if options.step_in_backward:
            raise InvalidArgument(IN_BACKWARD)
        self.step, self.options, self.budget_bytes = step, options, budget_bytes
        self.reason = reason
        self.segments: list[Segment] = []
        self.paths: dict[Hashable, list[Path]] = {}
        self.last: Hashable = None
        self._run = in_graphs(step.forward, self._traced)
        self._calibrated: dict[int, Prepared] = {}
        self._left: set[Hashable] = set()  # kinds of calls whose last one left all planned paths
        self._branching: set[Hashable] = set()  # kinds of calls with more than one path
        self._all_outputs = False
        self._solo = SoloPlans(options, self._calibrated)

    def _traced(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Segment:
        segment = Segment.of(graph, example_inputs, self.options)
        self.segments.append(segment)
        return segment

    @property
    def is_planned(self) -> bool:
        """Whether any path is planned."""
        return any(self.paths.values())

    @property
    def path(self) -> Path:
        """The last one taken.

        Raises:
            InvalidArgument: nothing is planned yet.
        """
        if not self.paths.get(self.last):
            raise InvalidArgument("nothing is planned yet: call the module once, or pass example_inputs to compile")
        return self.paths[self.last][0]

    def run(self, call: StepCall) -> Any:
        """Runs the forward pass of a training step; where a new path finds no room, it is planned and begun again."""
        with PLANNING:
            self.find(call)
            undo = self._undo() if self.last in self._branching else None
        try:
            return self._forward(call)
        except BudgetError:
            self._branching.add(self.last)
            self._left.add(self.last)
            if undo is None:
                raise
        undo()
        with PLANNING:
            self.find(call)
        return self._forward(call)

    def _forward(self, call: StepCall) -> Any:
        with PLANNING:
            path = self.path
            run = self._admitted(path, call)
        with under_way(run):
            result = self.step.check_result(self._run(*call))
        self._note(path, run)
        return result

    def _undo(self) -> Callable[[], None]:
        """Returns what puts buffers, generators and Python state back to where they are now."""
        model = self.step.model
        undo_runs, generator = undo_of_runs(model), torch.get_rng_state()
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

        def undo() -> None:
            undo_runs()
            torch.set_rng_state(generator)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

        return undo

    def find(self, call: StepCall) -> None:
        """Makes sure that a path is planned for a kind of call.

        Raises:
            BudgetError: no plan fits the budget.
            CaptureError: the step cannot be recorded.
        """
        shape = CallShape.of(call)
        self.last = shape.kind, tuple(shape.sizes.items())
        known = self.paths.setdefault(self.last, [])
        if not known or self.last in self._left:
            self._left.discard(self.last)
            check_call(call, self.step.model)
            path = self._planned(call)
            known.insert(0, path)
            del known[MOST_PATHS:]
            while len(self.paths) > MOST_KINDS:
                del self.paths[next(iter(self.paths))]
            self.fitting(path, 0)

    def _planned(self, call: StepCall) -> Path:
        """Records a call and plans it; gradient errors are measured now, while the batch is at hand."""
        try:
            trial, result = record(
                self._run, self.step, call, self.options, self._calibrated, all_outputs=self._all_outputs
            )
        except NothingToPlan as error:
            raise self.reason from error
        except FxHybridError:
            raise
        except Exception as error:  # the model's own, which may be of any kind: it does not run in eager mode either
            raise self.reason from error

        def measure(actions: PartActions) -> float:
            return relative_difference(self._trial_run(trial, actions, call).gradients, result.gradients)

        if self.options.lossy:
            plans = measured_plans(trial.sequence, self.options, measure)
        else:
            plans = SequencePlans(trial.sequence, self.options, None)
        path = Path(trial, plans, _inputs_text(call), self.step.loss_fn is not None)
        if self.budget_bytes is None:
            self.budget_bytes = self._resolved(check_budget(self.options.budget), path)
        path.within(self.budget_bytes)
        path.plans.measure = None
        return path

    def _resolved(self, budget: Any, path: Path) -> int:
        if budget is NamedBudget.SMALLEST:
            return path.plans.smallest.peak.peak_bytes
        if budget is NamedBudget.AUTO:
            return auto_bytes(self.step.model, self.options.optimizer)
        return budget if isinstance(budget, int) else int(budget * path.plans.save_all.peak.peak_bytes)

    def _trial_run(self, trial: Trial, actions: PartActions, call: StepCall) -> StepResult:
        """Runs a plan on a batch, from the present state of the generator; the model stays as it was."""
        needs = [part_timeline(part, chosen) for part, chosen in zip(trial.sequence.parts, actions, strict=True)]
        run = PlannedRun(parts_of(trial, actions, needs), _ENDLESS, self._solo, NothingPending(), _ignore)
        call = call.detached()

        def forward() -> Any:
            with under_way(run):
                return self.step.check_result(self._run(*call))

        has_loss = self.step.loss_fn is not None
        return observe_step(forward, self.step.model, has_loss=has_loss, weighed=trial.weighed, seed=None)

    def fitting(self, path: Path, extra_bytes: int) -> tuple[SequencePlan, list[PlannedPart]]:
        """Returns the plan of a path beside what else is alive.

        Raises:
            BudgetError: none fits.
        """
        assert self.budget_bytes is not None
        found = path.within(self.budget_bytes - extra_bytes)
        if found is None:
            raise path.plans.budget_error(self.budget_bytes, extra_bytes)
        return found

    def _admitted(self, path: Path, call: StepCall) -> PlannedRun:
        """Chooses a plan beside what is pending; a step that broke off may be held by a cycle."""
        try:
            return self._planned_run(path, call)
        except BudgetError:
            if not pending_calls():
                raise
        gc.collect()
        return self._planned_run(path, call)

    def _planned_run(self, path: Path, call: StepCall) -> PlannedRun:
        model = self.step.model
        extra = gradient_bytes(model) if any(p.grad is not None for p in model.parameters()) else 0
        others = pending_calls(next((p.device for p in model.parameters()), None))
        if others:
            extra += beside_bytes(Participant(model, model_storages(model) | storages_of(call.tensors)), others)
        plan, parts = self.fitting(path, extra)
        assert self.budget_bytes is not None
        resident = path.trial.sequence.resident_bytes
        gradients = sum(needs.gradient_bytes for needs in plan.needs)
        room = Room(self.budget_bytes - extra, resident, gradients, path.least_bytes)
        pending = self._pending_call(path, plan, extra, call.tensors)
        return PlannedRun(parts, room, self._solo, pending, self._expect_all)

    def _pending_call(self, path: Path, plan: SequencePlan, extra: int, tensors: Sequence[Tensor]) -> PendingCall:
        assert self.budget_bytes is not None
        needs = PlanBytes(plan.peak.peak_bytes, plan.held_bytes, max(plan.peak.backward_bytes))
        planned = PlannedCall(
            ref(self.step.model),
            self.options.optimizer,
            path.trial.prepared[0].capture,
            self.budget_bytes,
            extra,
            0,
            needs,
            path.plans.known,
        )
        return planned.opened([], [], tensors)

    def _expect_all(self) -> None:
        """Plans for gradients of all outputs from now on."""
        self._all_outputs = True
        self.paths.clear()

    def _note(self, path: Path, run: PlannedRun) -> None:
        """Remembers which path was taken."""
        if run.path == path.segments:
            return
        known = self.paths.get(self.last, [])
        taken = next((other for other in known if other.segments == run.path), None)
        self._branching.add(self.last)
        if taken is None and len(known) < MOST_PATHS:
            self._left.add(self.last)
        elif taken is not None and taken is not known[0]:
            known.remove(taken)
            known.insert(0, taken)

    def set_budget(self, budget: Budget) -> None:
        """Moves to another budget, or changes nothing and raises.

        Raises:
            BudgetError: no known plan of the last path fits.
        """
        path, before = self.path, self.budget_bytes
        self.budget_bytes = self._resolved(check_budget(budget), path)
        try:
            self.fitting(path, 0)
        except BudgetError:
            self.budget_bytes = before
            raise

    def plan(self) -> Plan:
        """Returns the plan of the last path."""
        assert self.budget_bytes is not None
        return plan_of(self.path, self.fitting(self.path, 0)[0], self.budget_bytes)

    def report(self) -> Report:
        """Reports the last path."""
        assert self.budget_bytes is not None
        found, more = self.fitting(self.path, 0)[0], gradient_bytes(self.step.model)
        unplanned = (f"{s.refusal} ({s.line})" for s in self.segments if s.refusal and s.refusal != NOTHING)
        return report_of(self.path, found, self.budget_bytes, more, unplanned)

    def measure_error(self, call: StepCall) -> float:
        """Measures the relative gradient error of the plan that a batch is run by."""
        self.find(call)
        path = self.path
        actions = self.fitting(path, 0)[0].actions
        save_all: PartActions = tuple({} for _ in actions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found, expected = (self._trial_run(path.trial, each, call).gradients for each in (actions, save_all))
        return relative_difference(found, expected)


def _inputs_text(call: StepCall) -> str:
    shapes = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in call.tensors)
    return ", ".join(shapes) or "no tensors"


_ENDLESS = Room(1 << 62, 0, 0, list)


def _ignore() -> None:
    """Stands for what a trial run is not told."""
