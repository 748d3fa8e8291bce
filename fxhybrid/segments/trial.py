"""Records a step of several graphs on a batch and prepares its parts for planning; the model is left as it was.

No more is taken than a forward pass that stores nothing, and, within a limit, single graphs one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fxhybrid.accuracy.calibration import Calibration, calibrate
from fxhybrid.accuracy.step_result import trial_run
from fxhybrid.accuracy.verifier import check_capture, reference
from fxhybrid.capture.output_structure import output_tensors
from fxhybrid.capture.python_state import generator_state_bytes
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import get_codec
from fxhybrid.console import stage
from fxhybrid.errors import CaptureError
from fxhybrid.ir.part import part_timeline
from fxhybrid.ir.sequence import PartSequence
from fxhybrid.options import Options
from fxhybrid.passes.traced import Traced
from fxhybrid.pipeline import Prepared, resident_bytes_of
from fxhybrid.profiling.optimizer_step import optimizer_bytes
from fxhybrid.segments.crossings import crossings
from fxhybrid.segments.handed_storages import version_of
from fxhybrid.segments.parts import own_part, sequence_of
from fxhybrid.segments.segment import Form, Segment, under_way
from fxhybrid.segments.step_recording import RecordedCall, StepRecording, run_forward

Run = Callable[..., Any]
WRITES = (
    "the call changes an argument in place, which no call before it did: it has run once to be planned, and the "
    "argument holds what that left. Pass the argument as it was again: from now on it is put back. Or compile with "
    "such a call as example_inputs"
)
CHANGES = "the model takes another path each time it runs on the same batch and seed; no step of it can be planned"


class NothingToPlan(CaptureError):
    """None of the step's graphs can be captured."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Holds what forward passes of a step showed.

    Attributes:
        calls: of segments, in order.
        prepared: each one up to the planning problem.
        sequence: the same as numbers.
        weighed: positions of the outputs that get gradients, among the tensors that a call returns; None for all.
    """

    calls: tuple[RecordedCall, ...]
    prepared: tuple[Prepared, ...]
    sequence: PartSequence
    weighed: Collection[int] | None


@dataclass(eq=False)
class PartCalibration:
    """Measures the gradient errors of parts, and compares them with eager, each by itself.

    Attributes:
        options: what the user asked for.
    """

    options: Options
    _measured: dict[tuple[str, frozenset[int]], Calibration] = field(default_factory=dict)  # by graph and form

    def of(self, segment: Segment, form: Form, call: StepCall, room_bytes: int | None) -> Prepared:
        """Returns a part up to the planning problem.

        Within a limit, errors are taken from a part with the same graph where there is one; lossy codecs are left out
        where errors are neither known nor can be measured.

        Args:
            segment: the part.
            form: how it is called.
            call: its arguments.
            room_bytes: what measuring may take; None where the whole step is compared with eager anyway.

        Raises:
            CaptureError: the graph computes something else than the model.
        """
        if form in segment.calibrated:
            return segment.calibrated[form]
        prepared = segment.prepare(form, call)
        has_gradient = bool(prepared.traced.without(prepared.expected.absent))
        has_room = room_bytes is None or _trial_bytes(prepared) <= room_bytes
        segment.is_compared |= room_bytes is None
        is_lossy = self.options.lossy and has_gradient and any(prepared.choices.values())
        key = prepared.fingerprint, prepared.expected.absent
        measured = None if room_bytes is None else self._measured.get(key)
        is_measured_now = is_lossy and measured is None
        if has_room and has_gradient and (is_measured_now or not segment.is_compared):
            compared = reference(prepared, segment.step, call, with_inputs=True)
            if not segment.is_compared:
                check_capture(compared)
                segment.is_compared = True
            if is_measured_now:
                measured = self._measured[key] = calibrate(prepared, compared)
        segment.calibrated[form] = _with_errors(prepared, measured) if is_lossy else prepared
        return segment.calibrated[form]


def _with_errors(prepared: Prepared, measured: Calibration | None) -> Prepared:
    """Returns a part with measured errors; without lossy codecs where there are none."""
    if measured is not None:
        return prepared.with_choices(measured.choices).with_errors(measured.errors)
    exact = {t: tuple(s for s in specs if get_codec(s).lossless) for t, specs in prepared.choices.items()}
    return prepared.with_choices(exact).with_errors({})


def _trial_bytes(prepared: Prepared) -> int:
    """Estimates what comparing a part takes: a save-all step of its own beside the results of two others."""
    needs = part_timeline(own_part(prepared), {})
    return 3 * (max(needs.forward_bytes, needs.backward_bytes) + generator_state_bytes())


@dataclass(eq=False)
class _Again:
    """Runs the graphs of a recorded forward pass again.

    Attributes:
        calls: as recorded.
        reached: is called when each of them is reached, with its position and arguments.
        n_reached: how many were.
    """

    calls: Sequence[RecordedCall]
    reached: Callable[[int, Sequence[Any]], None]
    n_reached: int = 0

    def call(self, segment: Segment, arguments: Sequence[Any]) -> Any:
        """Runs a graph."""
        if segment.capture is None:
            return segment.plain(arguments)
        position = self.n_reached
        if position == len(self.calls) or self.calls[position].segment is not segment:
            raise CaptureError(CHANGES)
        self.n_reached += 1
        arguments = segment.as_traced(arguments)
        self.reached(position, arguments)
        return run_forward(segment, arguments)[1]


class Recorder:
    """Records steps.

    Attributes:
        run: runs the step by graphs.
        step: model and loss.
        options: what the user asked for.
        calibration: of parts by themselves.
        all_outputs: whether all outputs get gradients, even beside a loss.
        changes_call: whether steps have changed their arguments in place; None while no step is recorded.
    """

    def __init__(self, run: Run, step: Step, options: Options) -> None:
        self.run, self.step, self.options = run, step, options
        self.calibration = PartCalibration(options)
        self.all_outputs = False
        self.changes_call: bool | None = None

    def changed(self, call: StepCall) -> list[Tensor]:
        """Returns the tensors of a call that a step may write to, and that are to be put back after trial runs."""
        return [] if self.changes_call is False else call.tensors

    def record(self, call: StepCall) -> StepRecording:
        """Records the graphs of a step.

        Args:
            call: the batch, cut off from what computed it.

        Raises:
            NothingToPlan: no graph can be planned.
            CaptureError: a graph cannot be traced, a custom autograd function runs between the graphs, or this step is
                the first one that changes its arguments in place.
        """
        existing = [*self.step.parameters(), *self.step.buffers(), *call.tensors]
        changed = self.changed(call)
        for _ in range(2):  # tracing holds tensors for longer than running does
            recording = StepRecording(existing)
            with stage("record"), trial_run(self.step.model, changed, seed=None):
                before = _versions(call)
                recording.run(lambda: self.run(*call), self._weighed)
                is_changed = before != _versions(call)
            self.changes_call = self.changes_call or is_changed
            if is_changed and not changed:
                raise CaptureError(WRITES)
        if not recording.calls:
            raise NothingToPlan("no part of the step can be planned: none of its graphs has a gradient")
        return recording

    def lay_out(self, recording: StepRecording, call: StepCall) -> bool:
        """Lets images go from graph to graph in channels_last where that saves conversions; says whether any do.

        Args:
            recording: of the step, whose calls are changed.
            call: its batch.

        Raises:
            CaptureError: the step differs from run to run.
        """
        if not self.options.reordered or not any(call.segment.images for call in recording.calls):
            return False
        traced: list[Traced] = []

        def lay_out(position: int, arguments: Sequence[Any]) -> None:
            recorded = recording.calls[position]
            traced.append(recorded.segment.trace(recorded.form, recorded.segment.call_of(arguments)))

        self._run_again(recording, call, lay_out)
        found = crossings(recording, traced)
        recording.cross(found)
        return any(crossing.outputs for crossing in found)

    def prepare(self, recording: StepRecording, call: StepCall, limit_bytes: int | None) -> Trial:
        """Prepares the parts of a recorded step for planning.

        Args:
            recording: of the step.
            call: its batch.
            limit_bytes: what memory may rise to; None where the whole step is compared with eager anyway.

        Raises:
            CaptureError: a graph computes something else than the model, or the step differs from run to run.
        """
        resident = resident_bytes_of(self.step, call, self.options)

        def room_bytes(position: int) -> int | None:
            alive = sum(s.size_bytes for s in recording.shared if s.maker < position <= s.last)
            return None if limit_bytes is None else limit_bytes - resident - alive

        prepared: list[Prepared] = []

        def prepare(position: int, arguments: Sequence[Any]) -> None:
            recorded = recording.calls[position]
            segment, own = recorded.segment, recorded.segment.call_of(arguments, recorded.form.crossing)
            absent = segment.prepare(recorded.form, own).traced.without(recorded.present or ())
            recorded.form = replace(recorded.form, absent=absent)
            prepared.append(self.calibration.of(segment, recorded.form, own, room_bytes(position)))

        self._run_again(recording, call, prepare)
        calls = tuple(recording.calls)
        optimizer = self.options.optimizer
        update = optimizer_bytes(optimizer).rise_bytes if optimizer is not None else None
        sequence = sequence_of(calls, prepared, recording.backward, recording.shared, resident, update)
        sequence = replace(sequence, tail=recording.tail, partial=recording.partial)
        return Trial(calls, tuple(prepared), sequence, recording.weighed)

    def _run_again(
        self, recording: StepRecording, call: StepCall, reached: Callable[[int, Sequence[Any]], None]
    ) -> None:
        again = _Again(recording.calls, reached)
        with trial_run(self.step.model, self.changed(call), seed=None), under_way(again):
            self.run(*call)
        if again.n_reached != len(recording.calls):
            raise CaptureError(CHANGES)

    def _weighed(self, result: Any) -> Collection[int] | None:
        if self.step.loss_fn is not None:
            return (0,)
        return None if self.all_outputs else _loss_position(result)


def _versions(call: StepCall) -> list[int]:
    """Returns how often the tensors of a call were changed in place."""
    return [version_of(t) for t in call.tensors]


def _loss_position(result: Any) -> Collection[int] | None:
    """Returns the position of an output called ``loss``, among the tensors of what a call returns."""
    loss = result.get("loss") if isinstance(result, dict) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        return None
    return [i for i, t in enumerate(output_tensors(result)) if t is loss]
