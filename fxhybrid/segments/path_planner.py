"""Plans paths through a model of several graphs: the first one by trial steps, others within the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fxhybrid.accuracy.step_result import StepResult, observe_step, relative_difference
from fxhybrid.accuracy.verifier import CaptureCheck, compare_with_eager, runs_in_low_precision
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.errors import CaptureError, FxHybridError, GraphBreakError
from fxhybrid.ir.part import PartTimeline, part_timeline
from fxhybrid.ir.sequence import sequence_peak
from fxhybrid.options import Options
from fxhybrid.passes.channels_last import USUAL_LAYOUT
from fxhybrid.pipeline import Prepared
from fxhybrid.segments.images import HandedImages
from fxhybrid.segments.part_errors import PartActions
from fxhybrid.segments.path import Path, parts_of
from fxhybrid.segments.planned_run import PlannedPart, PlannedRun, planned_part
from fxhybrid.segments.room import NothingPending, Room
from fxhybrid.segments.segment import Segment, under_way
from fxhybrid.segments.sequence_plans import SequencePlans, estimated_plans, measured_plans
from fxhybrid.segments.solo_plans import SoloPlans
from fxhybrid.segments.step_recording import StepRecording
from fxhybrid.segments.trial import CHANGES, NothingToPlan, Recorder, Run, Trial

_ENDLESS = Room(1 << 62, 0, dict, 0, list)


class PathPlanner:
    """Plans paths.

    Attributes:
        run: runs the step by graphs.
        step: model and loss.
        options: what the user asked for.
        reason: why the model does not trace into one graph.
        recorder: records steps.
        solo: plans of single parts.
        crosses: whether images may go from graph to graph in channels_last.
    """

    def __init__(self, run: Run, step: Step, options: Options, reason: GraphBreakError) -> None:
        self.run, self.step, self.options, self.reason = run, step, options, reason
        self.recorder = Recorder(run, step, options)
        self.solo = SoloPlans(options, self.recorder.calibration)
        self.crosses = True
        self._error_scale = 1.0

    def first(self, call: StepCall) -> Path:
        """Records a call, compares it with eager and plans it; gradient errors are measured by trial steps.

        That takes what save-all and eager steps take, whatever the budget.

        Raises:
            CaptureError: the step cannot be recorded, or computes something else than the model.
        """
        try:
            recording = self.recorder.record(call)
            found = self._with_images_that_cross(recording, call)
            if found is None:
                trial = self.recorder.prepare(recording, call, None)
                found = trial, *self._compared_with_eager(trial, call)
        except NothingToPlan as error:
            raise self.reason from error
        except FxHybridError:
            raise
        except Exception as error:  # the model's own, which may be of any kind: it does not run in eager mode either
            raise self.reason from error
        trial, result, check = found

        def measure(actions: PartActions) -> float:
            return relative_difference(self.trial_run(trial, actions, call).gradients, result.gradients)

        if self.options.lossy:
            plans = measured_plans(trial.sequence, self.options, measure)
        else:
            plans = SequencePlans(trial.sequence, self.options, None)
        self._error_scale = plans.error_scale
        return self._path(trial, plans, check, call)

    def _with_images_that_cross(
        self, recording: StepRecording, call: StepCall
    ) -> tuple[Trial, StepResult, CaptureCheck] | None:
        """Prepares and compares a step whose images go from graph to graph in channels_last.

        Returns:
            None where none do, or where Python between the graphs does not take that.
        """
        if not self.crosses or not self.recorder.lay_out(recording, call):
            return None
        try:
            trial = self.recorder.prepare(recording, call, None)
            return trial, *self._compared_with_eager(trial, call)
        except Exception:  # noqa: BLE001  of the user's code, of any kind: ``view`` does not take all layouts
            self.crosses = False
            recording.cross([USUAL_LAYOUT] * len(recording.calls))
            return None

    def another(self, call: StepCall, known: Sequence[Path], limit_bytes: int) -> Path:
        """Returns the path of a call: a known one, or a new one, planned without going over a limit.

        Args:
            call: the batch.
            known: paths.
            limit_bytes: what memory may rise to.

        Raises:
            CaptureError: a graph computes something else than the model.
        """
        recording = self.recorder.record(call)
        taken = [recorded.segment for recorded in recording.calls]
        for path in known:
            if path.segments == taken:
                return path
        copies_bytes = sum(t.nbytes for t in self.recorder.changed(call))
        trial = self.recorder.prepare(recording, call, limit_bytes - copies_bytes)
        plans = estimated_plans(trial.sequence, self.options, self._error_scale)
        left_out = sum(not segment.is_compared for segment in set(taken))
        note = "its graphs compared with eager one by one"
        check = CaptureCheck(None, f"{note}, but for {left_out}: no room within the budget" if left_out else note)
        return self._path(trial, plans, check, call)

    def _path(self, trial: Trial, plans: SequencePlans, check: CaptureCheck, call: StepCall) -> Path:
        return Path(trial, plans, check, _inputs_text(call), self.step.loss_fn is not None)

    def _compared_with_eager(self, trial: Trial, call: StepCall) -> tuple[StepResult, CaptureCheck]:
        found = self.trial_run(trial, tuple({} for _ in trial.calls), call)
        eager = partial(self._observed, lambda: self.step.check_result(self.step(*call)), trial, call)
        check = compare_with_eager(
            found,
            partial(self._plain_run, trial, call),
            eager,
            another_order=" and ".join(dict.fromkeys(p.another_order for p in trial.prepared if p.another_order)),
            is_low_precision=runs_in_low_precision(self.step),
        )
        return found, check

    def trial_run(self, trial: Trial, actions: PartActions, call: StepCall) -> StepResult:
        """Runs a plan on a batch, from the present state of the generator; the model stays as it was."""
        needs = [part_timeline(part, chosen) for part, chosen in zip(trial.sequence.parts, actions, strict=True)]
        headroom = sequence_peak(trial.sequence, needs).headroom
        return self._run_parts(parts_of(trial, actions, needs, headroom), trial, call)

    def _plain_run(self, trial: Trial, call: StepCall) -> StepResult:
        """Runs the graphs as they were captured, in eager's order.

        Images that are planned to cross in channels_last do so, too: what Python makes of them must be the same.
        """
        needs = [part_timeline(part, {}) for part in trial.sequence.parts]
        calls = zip(trial.calls, trial.prepared, needs, strict=True)
        parts = [_AsCaptured.of(each.segment, prepared, need) for each, prepared, need in calls]
        return self._run_parts(parts, trial, call)

    def _run_parts(self, parts: Sequence[PlannedPart], trial: Trial, call: StepCall) -> StepResult:
        run = PlannedRun(parts, _ENDLESS, self.solo, NothingPending(), _ignore, HandedImages(_refuse))
        call = call.detached()

        def forward() -> Any:
            with under_way(run):
                return self.step.check_result(self.run(*call))

        return self._observed(forward, trial, call)

    def _observed(self, forward: Callable[[], Any], trial: Trial, call: StepCall) -> StepResult:
        return observe_step(
            forward,
            self.step.model,
            has_loss=self.step.loss_fn is not None,
            weighed=trial.weighed,
            changed=self.recorder.changed(call),
            seed=None,
        )


def _inputs_text(call: StepCall) -> str:
    shapes = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in call.tensors)
    return ", ".join(shapes) or "no tensors"


@dataclass(frozen=True, eq=False)
class _AsCaptured(PlannedPart):
    """Runs a part in eager's layouts, but for the images that it takes and returns."""

    @classmethod
    def of(cls, segment: Segment, prepared: Prepared, needs: PartTimeline) -> _AsCaptured:
        in_eagers_layouts = replace(prepared, traced=prepared.traced.in_layout(()))
        function = planned_part(segment, in_eagers_layouts, prepared.plain_graphs(), needs).function
        return cls(segment, prepared, needs, function, needs.stored_bytes)

    def call(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        results = list(super().call(self.segment.as_traced(arguments)))
        for i in self.prepared.traced.crossing.outputs:
            results[i] = results[i].contiguous(memory_format=torch.channels_last)
        return tuple(results)


def _refuse() -> None:
    """Ends a trial run in which an image in channels_last came to where it was not expected.

    Raises:
        CaptureError: always.
    """
    raise CaptureError(CHANGES)


def _ignore() -> None:
    """Stands for what a trial run is not told."""
