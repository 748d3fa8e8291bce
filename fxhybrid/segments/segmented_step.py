"""A step of several graphs under one budget: recorded on a batch, planned as one sequence, and run."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx

from fxhybrid.accuracy.step_result import relative_difference
from fxhybrid.capture.planning_lock import PLANNING
from fxhybrid.capture.python_state import UndoOfRuns, undo_of_step
from fxhybrid.capture.step import Step, StepCall, check_call
from fxhybrid.compiler.budgets import auto_bytes
from fxhybrid.compiler.call_shape import CallShape
from fxhybrid.compiler.pending_calls import PendingCall, PlannedCall, pending_calls, storages_of
from fxhybrid.compiler.report import Report
from fxhybrid.errors import BudgetError, GraphBreakError, InvalidArgument
from fxhybrid.ir.plan import Plan
from fxhybrid.options import Options
from fxhybrid.profiling.collector import without_older_objects
from fxhybrid.profiling.state_bytes import gradient_bytes
from fxhybrid.segments.calls_together import CallsTogether, Together
from fxhybrid.segments.describe import plan_of, report_of
from fxhybrid.segments.graph_runner import in_graphs
from fxhybrid.segments.images import HandedImages
from fxhybrid.segments.part_errors import PartActions
from fxhybrid.segments.path import Path
from fxhybrid.segments.path_planner import PathPlanner
from fxhybrid.segments.planned_run import PlannedPart, PlannedRun, before_tracing
from fxhybrid.segments.room import Neighbours, Room
from fxhybrid.segments.same_graph import identity_of
from fxhybrid.segments.segment import NOTHING, Segment, under_way
from fxhybrid.segments.sequence_plans import SequencePlan
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes
from fxhybrid.units import Budget, NamedBudget, check_budget

IN_BACKWARD = (
    "step_in_backward=True updates parameters within the backward pass of one graph, and this step takes several; "
    "leave it out, or leave out what Python decides by values in the model's forward pass"
)
OF_ANOTHER_LAYOUT = "view size is not compatible with input tensor's size and stride"  # torch's words
IN_CHANNELS_LAST = (
    "fxhybrid handed on an image in channels_last, and Python between two graphs took a view of it, as it had not "
    "before. From now on images are handed on in the usual layout: zero the gradients and run the step again"
)
MOST_PATHS = 8  # through the model that are planned for one kind of call; others run part by part
MOST_KINDS = 16  # kinds of calls whose paths are kept
STRAIGHT = 4  # calls in a row on a planned path, after which no copies are kept to begin a step again


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
        self._neighbours = Neighbours(step.model)
        self._left_to_eager: list[str] = []
        self.segments: list[Segment] = []
        self.paths: dict[Hashable, list[Path]] = {}
        self.last: Hashable = None
        self._run = in_graphs(
            step.forward, self._traced, before_tracing, self._left_to_eager.append, any_layout=options.reordered
        )
        self._planner = PathPlanner(self._run, step, options, reason)
        self._is_compared = False  # whether a path has been compared with eager as a whole
        self._left: set[Hashable] = set()  # kinds of calls whose last one left all planned paths
        self._together = CallsTogether()
        self._known: dict[Hashable, Segment] = {}  # by what is the same for graphs that are traced again
        self._straight: dict[Hashable, int] = {}  # how many calls of a kind have stayed on the planned path in a row

    def _traced(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Segment:
        identity = identity_of(graph)
        segment = self._known.get(identity)
        if segment is None:
            own = {id(t) for t in (*self.step.parameters(), *self.step.buffers())}
            segment = Segment.of(graph, example_inputs, self.options, own)
            self.segments.append(segment)
        if identity is not None:
            self._known[identity] = segment
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
        """Runs the forward pass of a training step.

        It is planned and begun again where a new path finds no room, or where Python between graphs does not take an
        image in channels_last.
        """
        with PLANNING:
            self.find(call)
            undo = self._undo(call)
        try:
            return self._forward(call, undo)
        except BudgetError:
            self._straight[self.last] = 0
            self._left.add(self.last)
            if undo is None:
                raise
        except RuntimeError as error:
            if not self.path.crosses or OF_ANOTHER_LAYOUT not in str(error):
                raise
            self._end_crossing()
            if undo is None:
                error.add_note(IN_CHANNELS_LAST)
                raise
        undo()
        undo = None  # it holds copies
        with PLANNING:
            self.find(call)
        return self._forward(call, None)

    def _undo(self, call: StepCall) -> UndoOfRuns | None:
        """Returns what puts the model back to where it is now, if the call may take a new path and has room for it."""
        if self._straight.get(self.last, 0) >= STRAIGHT:
            return None
        assert self.budget_bytes is not None
        undo = undo_of_step(self.step.model, self._planner.recorder.changed(call))
        fits = self.path.within(self.budget_bytes - self._neighbours.beside_bytes(call) - undo.n_bytes) is not None
        return undo if fits else None

    def _forward(self, call: StepCall, undo: UndoOfRuns | None) -> Any:
        with PLANNING:
            path = self.path
            run = self._admitted(path, call, 0 if undo is None else undo.n_bytes)
        with under_way(run):
            result = self.step.check_result(self._run(*call))
        self._note(path, run)
        return result

    def find(self, call: StepCall) -> None:
        """Makes sure that a path is planned for a kind of call.

        Raises:
            BudgetError: no plan fits the budget.
            CaptureError: the step cannot be recorded.
        """
        shape = CallShape.of(call)
        self.last = shape.kind, tuple(shape.sizes.items())
        known = self.paths.setdefault(self.last, [])
        known[:] = [path for path in known if self._planner.crosses or not path.crosses]
        if not known or self.last in self._left:
            self._left.discard(self.last)
            check_call(call, self.step.model)
            path = self._planned(call.detached(), known)
            known[:] = [path, *(other for other in known if other is not path)][:MOST_PATHS]
            while len(self.paths) > MOST_KINDS:
                kind = next(iter(self.paths))
                self.paths.pop(kind)
                self._straight.pop(kind, None)
                self._together.most.pop(kind, None)
            try:
                self.fitting(path, 0)
            except BudgetError:
                known[:] = [*known[1:], path]  # calls that take one of the others are planned
                raise

    @without_older_objects()
    def _planned(self, call: StepCall, known: Sequence[Path]) -> Path:
        """Returns the path of a call, planned if it is new."""
        if self.budget_bytes is not None and self._is_compared:
            return self._planner.another(call, known, self.budget_bytes - self._neighbours.beside_bytes(call))
        path = self._planner.first(call)
        if self.budget_bytes is None:
            self.budget_bytes = self._resolved(check_budget(self.options.budget), path)
        path.within(self.budget_bytes)
        path.plans.measure, self._is_compared = None, True
        return path

    def _resolved(self, budget: Any, path: Path) -> int:
        if budget is NamedBudget.SMALLEST:
            return path.plans.smallest.needed_bytes
        if budget is NamedBudget.AUTO:
            return auto_bytes(self.step.model, self.options.optimizer)
        return budget if isinstance(budget, int) else int(budget * path.plans.save_all.needed_bytes)

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

    def _admitted(self, path: Path, call: StepCall, undo_bytes: int) -> PlannedRun:
        """Chooses a plan beside what is pending; a step that broke off may be held by a cycle."""
        try:
            return self._planned_run(path, call, undo_bytes)
        except BudgetError:
            if not pending_calls():
                raise
        gc.collect()
        return self._planned_run(path, call, undo_bytes)

    def _beside_own(self, path: Path, call: StepCall, extra: int) -> tuple[SequencePlan, list[PlannedPart]]:
        """Returns the plan of a call beside earlier ones of this model, and with room for those that usually follow."""
        assert self.budget_bytes is not None
        model = self.step.model
        n_waiting = sum(each.planned.model() is model for each in pending_calls())
        n_others = self._together.note(self.last, n_waiting)
        if n_others == 0:
            return self.fitting(path, extra)
        outputs = sum(shared.size_bytes for shared in path.trial.sequence.shared if shared.held)
        each = sum(storages_of(call.tensors).values()) + outputs
        together = Together(n_others, each, gradient_bytes(model) + self._neighbours.older_bytes())
        found = self._together.fitting(path, self.budget_bytes, together)
        if found is None or found[0].needed_bytes + extra > self.budget_bytes:
            found = path.within(self.budget_bytes - extra)
        if found is None:
            raise self._together.error(path, self.budget_bytes, together, extra)
        return found

    def _planned_run(self, path: Path, call: StepCall, undo_bytes: int) -> PlannedRun:
        extra = self._neighbours.beside_bytes(call) + undo_bytes
        plan, parts = self._beside_own(path, call, extra)
        assert self.budget_bytes is not None
        resident = path.trial.sequence.resident_bytes
        gradients = sum(needs.gradient_bytes for needs in plan.needs)
        own = partial(self._neighbours.own_storages, call)
        room = Room(self.budget_bytes - extra, resident, own, gradients, path.least_bytes)
        pending = self._pending_call(path, plan, extra, call.tensors)
        images = HandedImages(self._end_crossing)
        return PlannedRun(parts, room, self._planner.solo, pending, self._expect_all, images)

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
        return planned.opened(tensors)

    def _expect_all(self) -> None:
        """Plans for gradients of all outputs from now on."""
        self._planner.recorder.all_outputs = True
        self.paths.clear()

    def _end_crossing(self) -> None:
        """Plans for images in the usual layout from now on."""
        self._planner.crosses = False

    def _note(self, path: Path, run: PlannedRun) -> None:
        """Remembers which path was taken."""
        if run.path == path.segments:
            self._straight[self.last] = self._straight.get(self.last, 0) + 1
            return
        known = self.paths.get(self.last, [])
        taken = next((other for other in known if other.segments == run.path), None)
        self._straight[self.last] = 0
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
        return report_of(self.path, found, self.budget_bytes, more, (*unplanned, *self._left_to_eager))

    def measure_error(self, call: StepCall) -> float:
        """Measures the relative gradient error of the plan that a batch is run by."""
        self.find(call)
        path = self.path
        actions = self.fitting(path, 0)[0].actions
        save_all: PartActions = tuple({} for _ in actions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found, expected = (
                self._planner.trial_run(path.trial, each, call).gradients for each in (actions, save_all)
            )
        return relative_difference(found, expected)
