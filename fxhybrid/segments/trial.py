"""Records a step of several graphs on a batch and prepares its parts for planning; the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from fxhybrid.accuracy.calibration import calibrate
from fxhybrid.accuracy.step_result import StepResult, observe_step, trial_run
from fxhybrid.accuracy.verifier import CaptureCheck, compare_with_eager, reference, runs_in_low_precision
from fxhybrid.capture.output_structure import output_tensors
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.console import stage
from fxhybrid.errors import CaptureError
from fxhybrid.ir.sequence import PartSequence
from fxhybrid.options import Options
from fxhybrid.pipeline import Prepared, resident_bytes_of
from fxhybrid.profiling.optimizer_step import optimizer_bytes
from fxhybrid.segments.parts import sequence_of
from fxhybrid.segments.segment import Form, Segment, under_way
from fxhybrid.segments.step_recording import FirstRun, RecordedCall, SaveAllRun

Run = Callable[..., Any]


class NothingToPlan(CaptureError):
    """None of the step's graphs can be captured."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Holds what trial runs of a step showed.

    Attributes:
        calls: of segments, in order.
        prepared: each one up to the planning problem.
        sequence: the same as numbers.
        check: how its save-all step compares with eager.
        weighed: positions of the outputs that got gradients, among the tensors that a call returns; None for all.
    """

    calls: tuple[RecordedCall, ...]
    prepared: tuple[Prepared, ...]
    sequence: PartSequence
    check: CaptureCheck
    weighed: Collection[int] | None


def record(
    run: Run, step: Step, call: StepCall, options: Options, known: dict[int, Prepared], *, all_outputs: bool
) -> tuple[Trial, StepResult]:
    """Runs a step three times: for what Python holds, by save-all graphs, and in eager mode.

    Args:
        run: runs the step by graphs.
        step: model and loss.
        call: the batch.
        options: what the user asked for.
        known: calibrated parts, by the identity of what they were prepared from; new ones are added.
        all_outputs: whether all outputs get gradients, even beside a loss.

    Returns:
        What was recorded, and what the save-all step left behind.

    Raises:
        NothingToPlan: no graph can be planned.
        CaptureError: the graphs compute something else than the model, or differ from run to run.
    """
    call = call.detached()
    existing = [*step.parameters(), *step.buffers(), *call.tensors]
    for _ in range(2):  # tracing holds tensors for longer than running does
        first = FirstRun(existing)
        with stage("record"), trial_run(step.model, seed=None), under_way(first):
            result = run(*call)
            shared = first.finish()
            weighed = None if all_outputs else _loss_position(step, result)
            del result
    if not first.calls:
        raise NothingToPlan("no part of the step can be planned: none of its graphs has a gradient")
    second = SaveAllRun(first.calls, existing)
    observed = partial(observe_step, model=step.model, has_loss=step.loss_fn is not None, weighed=weighed, seed=None)

    def save_all() -> Any:
        with under_way(second):
            return step.check_result(second.forward(lambda: run(*call)))

    found = observed(save_all)
    eager = partial(observed, lambda: step.check_result(step(*call)))
    check = compare_with_eager(found, eager, is_low_precision=runs_in_low_precision(step))
    prepared = tuple(_prepared(recorded, options, known) for recorded in first.calls)
    resident = resident_bytes_of(step, call, options)
    update = optimizer_bytes(options.optimizer).rise_bytes if options.optimizer is not None else None
    sequence = sequence_of(first.calls, prepared, second.backward, shared, resident, update)
    for recorded in first.calls:
        recorded.call = None
    sequence = replace(sequence, tail_bytes=second.tail_bytes)
    return Trial(tuple(first.calls), prepared, sequence, check, weighed), found


def _loss_position(step: Step, result: Any) -> Collection[int] | None:
    """Returns the position of an output called ``loss``, among the tensors of what a call returns."""
    if step.loss_fn is not None:
        return None
    loss = result.get("loss") if isinstance(result, dict) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        return None
    return [i for i, t in enumerate(output_tensors(result)) if t is loss]


def _prepared(recorded: RecordedCall, options: Options, known: dict[int, Prepared]) -> Prepared:
    """Prepares a call for the tangents that arrive."""
    segment, call = recorded.segment, recorded.call
    assert call is not None
    absent = segment.prepare(recorded.form, call).traced.without(recorded.present or ())
    recorded.form = replace(recorded.form, absent=absent)
    return calibrated(segment, recorded.form, call, options, known)


def calibrated(segment: Segment, form: Form, call: StepCall, options: Options, known: dict[int, Prepared]) -> Prepared:
    """Returns a part up to the planning problem, with gradient errors measured on a call's own inputs.

    Args:
        segment: the part.
        form: how it is called.
        call: its arguments.
        options: what the user asked for.
        known: what was calibrated before, by the identity of what it was made from.
    """
    prepared = segment.prepare(form, call)
    if id(prepared) not in known:
        known[id(prepared)] = _calibrated(prepared, segment, call) if options.lossy else prepared
    return known[id(prepared)]


def _calibrated(prepared: Prepared, segment: Segment, call: StepCall) -> Prepared:
    all_absent = not prepared.traced.without(prepared.expected.absent)
    if not any(prepared.choices.values()) or all_absent:
        return prepared
    compared = reference(prepared, segment.step, call, with_inputs=True)
    calibration = calibrate(prepared, compared)
    return prepared.with_choices(calibration.choices).with_errors(calibration.errors)
