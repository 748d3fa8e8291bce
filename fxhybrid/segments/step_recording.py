"""Trial runs of a step of several graphs: which are called, what they hand to each other, and for how long it lives.

A first run stores nothing for a backward pass, so that whatever of a graph's outputs is still alive when a later graph
begins is held by Python. A second one runs by save-all graphs and goes back, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.capture.joint_graph import InputKind
from fxhybrid.capture.step import StepCall
from fxhybrid.errors import CaptureError
from fxhybrid.ir.sequence import Shared
from fxhybrid.passes.split import forward_only
from fxhybrid.runtime import LateBackward, StepFunction, StepInterface
from fxhybrid.segments.leaf_notes import NOTHING_NEW
from fxhybrid.segments.segment import Form, Segment

CHANGES = "the model takes another path each time it runs on the same batch and seed; no step of it can be planned"


@dataclass(eq=False)
class RecordedCall:
    """Holds one call of a segment in a trial run.

    Attributes:
        segment: what was called.
        form: how.
        inputs: position and shared storage of each input that was made within the step.
        outputs: the same of each output of the graph.
        call: the arguments; None in a first run.
        present: positions of the tangents that arrived; None where there was no backward pass.
        beside_bytes: what Python's own operators before the call keep for their backward pass.
    """

    segment: Segment
    form: Form
    inputs: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, int] = field(default_factory=dict)
    call: StepCall | None = None
    present: frozenset[int] | None = None
    beside_bytes: int = 0


class _Storages:
    """Follows the storages that are made within a step."""

    def __init__(self, existing: Sequence[Tensor]) -> None:
        self.existing = {_identity(t) for t in existing}
        self.references: list[StorageWeakRef] = []
        self.shared: list[Shared] = []
        self.keys: dict[int, int] = {}

    def key(self, tensor: Tensor, maker: int) -> int | None:
        """Returns the storage of a tensor; None for one that exists through the whole step."""
        identity = _identity(tensor)
        if identity in self.existing:
            return None
        if identity not in self.keys:
            storage = tensor.untyped_storage()
            self.keys[identity] = len(self.shared)
            self.references.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]  # keeps the identity
            self.shared.append(Shared(storage.nbytes(), maker, maker))
        return self.keys[identity]

    def look(self, now: int) -> None:
        """Notes what is alive when a call begins."""
        for key, reference in enumerate(self.references):
            if not reference.expired():  # type: ignore[no-untyped-call]
                self.shared[key] = replace(self.shared[key], last=max(self.shared[key].last, now))

    def look_at_end(self, n_calls: int) -> None:
        """Notes what the caller holds after the forward pass."""
        for key, reference in enumerate(self.references):
            if not reference.expired():  # type: ignore[no-untyped-call]
                self.shared[key] = replace(self.shared[key], last=n_calls, held=True)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class FirstRun:
    """Runs a step's forward pass, and stores nothing.

    Attributes:
        calls: in order.
        storages: those that were made within the step.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        self.calls: list[RecordedCall] = []
        self.storages = _Storages(existing)

    def call(self, segment: Segment, arguments: Sequence[Any]) -> Any:
        """Runs a graph."""
        if segment.capture is None:
            return segment.plain(arguments)
        now = len(self.calls)
        self.storages.look(now)
        recorded = RecordedCall(segment, segment.form_of(arguments))
        self.calls.append(recorded)
        recorded.inputs = self._keys(arguments, now)
        capture = segment.capture
        step = StepFunction(forward_only(capture.joint), StepInterface.of(capture.joint), capture.metadata)
        outputs = capture.bind(step)(segment.step, segment.lifted.free_of(arguments), {}, ())
        recorded.outputs = self._keys(outputs, now)
        return tuple(outputs)

    def finish(self) -> tuple[Shared, ...]:
        """Returns the storages that were made; what is still alive is held by the caller."""
        self.storages.look_at_end(len(self.calls))
        return tuple(self.storages.shared)

    def _keys(self, values: Sequence[Any], now: int) -> dict[int, int]:
        strided = {i: t for i, t in enumerate(values) if isinstance(t, Tensor) and t.layout is torch.strided}
        keys = {i: self.storages.key(t, now) for i, t in strided.items()}
        return {i: key for i, key in keys.items() if key is not None}


class SaveAllRun:
    """Runs the same step by save-all graphs, forward and backward, and completes the records.

    Attributes:
        calls: of the first run.
        backward: the calls in the order in which their backward halves ran.
        tail_bytes: what Python's operators after the last call keep.
    """

    def __init__(self, calls: Sequence[RecordedCall], existing: Sequence[Tensor]) -> None:
        self.calls = calls
        self.backward: list[int] = []
        self.tail_bytes = 0
        self._next = 0
        self._within = False
        self._counted = {_identity(t) for t in existing}
        self._beside_bytes = 0

    def call(self, segment: Segment, arguments: Sequence[Any]) -> Any:
        """Runs a graph."""
        if segment.capture is None:
            return segment.plain(arguments)
        position, self._next = self._next, self._next + 1
        recorded = self.calls[position] if position < len(self.calls) else None
        if recorded is None or recorded.segment is not segment:
            raise CaptureError(CHANGES)
        recorded.beside_bytes, self._beside_bytes = self._beside_bytes, 0
        recorded.call = _kept(segment.call_of(arguments), segment)
        prepared = segment.prepare(recorded.form, recorded.call)

        def noted(present: frozenset[int]) -> None:
            self.backward.append(position)
            recorded.present = (recorded.present or frozenset()) | present

        step = StepFunction(
            prepared.save_all_graphs,
            prepared.traced.interface,
            prepared.capture.metadata,
            enter=lambda *_: _Noting(noted),
        )
        self._within = True
        try:
            outputs = prepared.capture.bind(step)(segment.step, segment.lifted.free_of(arguments), {}, ())
        finally:
            self._within = False
        return tuple(outputs)

    def forward(self, run: Callable[[], Any]) -> Any:
        """Runs the forward pass, and counts what operators outside of the graphs keep for their backward pass."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _as_it_is):
            result = run()
        self.tail_bytes = self._beside_bytes
        if self._next != len(self.calls):
            raise CaptureError(CHANGES)
        return result

    def _pack(self, tensor: Tensor) -> Tensor:
        if not self._within and tensor.layout is torch.strided and _identity(tensor) not in self._counted:
            self._counted.add(_identity(tensor))
            self._beside_bytes += tensor.untyped_storage().nbytes()
        return tensor.detach() if not self._within else tensor


@dataclass(frozen=True, eq=False)
class _Noting:
    """Stands for a call whose backward pass has not begun."""

    noted: Callable[[frozenset[int]], None]

    leaf_notes = NOTHING_NEW

    def begins(self, present: frozenset[int], _: frozenset[int]) -> LateBackward | None:
        """Notes the tangents that arrive."""
        self.noted(present)
        return None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _kept(call: StepCall, segment: Segment) -> StepCall:
    """Returns arguments that later calls do not change: copies of those that the graph itself writes to."""
    assert segment.capture is not None
    roles = segment.capture.joint.inputs
    if not any(role.mutated and role.kind is InputKind.USER_INPUT for role in roles):
        return call

    def copied(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return StepCall(tuple(map(copied, call.args)), {}, ())
