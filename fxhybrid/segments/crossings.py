"""Chooses the images that go from graph to graph of a step in channels_last, without conversions at both ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fxhybrid.ir.sequence import Shared
from fxhybrid.passes.channels_last import Crossing, images_that_come, images_that_go
from fxhybrid.passes.traced import Traced
from fxhybrid.segments.step_recording import RecordedCall, StepRecording
from fxhybrid.torch_internals import OutputType


def crossings(recording: StepRecording, traced: Sequence[Traced]) -> list[Crossing]:
    """Returns what crosses in channels_last, for each call.

    That is what a graph would convert from channels_last, and another one to it, and what nobody else can tell from
    what eager hands on: not what the caller gets, what Python changes in place, and what graphs without a plan read.

    Args:
        recording: of the step.
        traced: the graph of each call, in the layouts that pay.
    """
    chosen = {key for key in range(len(recording.shared)) if _crosses(key, recording, traced)}
    return [Crossing(_positions(call.inputs, chosen), _positions(call.outputs, chosen)) for call in recording.calls]


def _positions(keys: dict[int, int], chosen: Collection[int]) -> frozenset[int]:
    return frozenset(i for i, key in keys.items() if key in chosen)


def _crosses(key: int, recording: StepRecording, traced: Sequence[Traced]) -> bool:
    shared, calls = recording.shared[key], recording.calls
    if not _is_between_graphs(shared) or key in recording.unplanned:
        return False
    made = _positions(calls[shared.maker].outputs, {key})
    if len(made) != 1 or not all(_goes(i, traced[shared.maker]) for i in made):
        return False
    takers = [(k, i) for k, call in enumerate(calls) for i in _positions(call.inputs, {key})]
    if not all(_can_take(calls[k], i) for k, i in takers):
        return False
    return any(i in images_that_come(traced[k].joint) for k, i in takers)


def _is_between_graphs(shared: Shared) -> bool:
    return not (shared.held or shared.is_root or shared.changed)


def _goes(output: int, traced: Traced) -> bool:
    info = traced.capture.metadata.output_info[output]
    return info.output_type is OutputType.non_alias and output in images_that_go(traced.joint)


def _can_take(call: RecordedCall, position: int) -> bool:
    return position in call.segment.images and position in call.form.boundaries
