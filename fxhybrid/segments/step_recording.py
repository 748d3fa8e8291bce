"""Records a step of several graphs: which are called, what they hand to each other, and for how long it lives.

The forward pass is run so that graphs store nothing. Whatever of their outputs is still alive when a later graph begins
is then held by Python, and no more memory is taken than by any plan. What the backward pass will run is read from
autograd's graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.capture.output_structure import output_tensors
from fxhybrid.errors import ProfileError
from fxhybrid.ir.sequence import Shared
from fxhybrid.passes.split import forward_only
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.profiling.recording import Recording, recording, walk
from fxhybrid.runtime import StepFunction
from fxhybrid.segments.backward_order import halves_behind
from fxhybrid.segments.segment import Form, Segment


@dataclass(eq=False)
class RecordedCall:
    """Holds one call of a segment.

    Attributes:
        segment: what was called.
        form: how.
        inputs: position and shared storage of each input that was made within the step.
        outputs: the same of each output of the graph.
        present: positions of the tangents that arrive; None where there is no backward pass.
        beside_bytes: what Python's own operators before the call keep for their backward pass.
        rise_bytes: what they take while they run, beyond what is alive when the call begins.
    """

    segment: Segment
    form: Form
    inputs: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, int] = field(default_factory=dict)
    present: frozenset[int] | None = None
    beside_bytes: int = 0
    rise_bytes: int = 0


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

    def knows(self, tensor: Tensor) -> bool:
        """Says whether a tensor's storage exists through the whole step, or is handed from graph to graph."""
        return _identity(tensor) in self.existing or _identity(tensor) in self.keys

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


class ForwardRecording:
    """Runs a step's forward pass by graphs that store nothing, and records it.

    Attributes:
        calls: in order.
        shared: storages that were made within the step; complete at the end of ``forward``.
        backward: the calls in the order in which their backward halves will run; likewise.
        weighed: positions of the results that get gradients, among the tensors that a call returns; likewise.
        tail_bytes: what Python's operators after the last call keep.
        tail_rise_bytes: what they take while they run, beyond what is alive at the end.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        self.calls: list[RecordedCall] = []
        self.shared: tuple[Shared, ...] = ()
        self.backward: tuple[int, ...] = ()
        self.weighed: Collection[int] | None = None
        self.tail_bytes = self.tail_rise_bytes = 0
        self._storages = _Storages(existing)
        self._steps: list[StepFunction] = []
        self._within = False
        self._counted: set[int] = set()
        self._beside_bytes = 0
        self._memory: Recording | None = None

    def forward(self, run: Callable[[], Any], weighed: Callable[[Any], Collection[int] | None]) -> None:
        """Runs the forward pass.

        Args:
            run: does it.
            weighed: returns the positions of a result's tensors that get gradients; None for all.

        Raises:
            CaptureError: a custom autograd function runs between the graphs.
        """
        pack, unpack = map(torch.compiler.disable, (self._pack, _as_it_is))  # Dynamo would trace them between graphs
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), contextlib.ExitStack() as stack:
            with contextlib.suppress(ProfileError):  # a profiler of the user's is on
                self._memory = stack.enter_context(recording())
            result = run()
        self._note_rises()
        self._storages.look_at_end(len(self.calls))
        self.shared, self.tail_bytes = tuple(self._storages.shared), self._beside_bytes
        self.weighed = weighed(result)
        results = (t for i, t in enumerate(output_tensors(result)) if self.weighed is None or i in self.weighed)
        halves = halves_behind(results, self._steps)
        self.backward = tuple(position for position, _ in halves)
        for position, present in halves:
            self.calls[position].present = present

    def call(self, segment: Segment, arguments: Sequence[Any]) -> Any:
        """Runs a graph."""
        if segment.capture is None:
            return segment.plain(arguments)
        now = len(self.calls)
        self._storages.look(now)
        recorded = RecordedCall(segment, segment.form_of(arguments), beside_bytes=self._beside_bytes)
        self._beside_bytes = 0
        self.calls.append(recorded)
        recorded.inputs = self._keys(arguments, now)
        self._within = True
        self._mark()
        try:
            step, outputs = run_forward(segment, arguments)
        finally:
            self._within = False
        self._mark()
        self._steps.append(step)
        recorded.outputs = self._keys(outputs, now)
        return outputs

    def _mark(self) -> None:
        if self._memory is not None:
            self._memory.mark()

    def _note_rises(self) -> None:
        """Notes how far memory rose between the calls, which are marked at both ends."""
        if self._memory is None:
            return
        live: dict[int, int] = {}
        levels = [walk(events, live) for events in self._memory.segments]
        *rises, self.tail_rise_bytes = (peak - end for peak, end in levels[::2])
        for recorded, rise in zip(self.calls, rises, strict=True):
            recorded.rise_bytes = rise

    def _keys(self, values: Sequence[Any], now: int) -> dict[int, int]:
        strided = {i: t for i, t in enumerate(values) if isinstance(t, Tensor) and t.layout is torch.strided}
        keys = {i: self._storages.key(t, now) for i, t in strided.items()}
        return {i: key for i, key in keys.items() if key is not None}

    def _pack(self, tensor: Tensor) -> Tensor:
        """Counts what operators between graphs keep, unless it is handed from graph to graph and counted there."""
        if self._within:
            return tensor
        if tensor.layout is torch.strided and _identity(tensor) not in self._counted:
            self._counted.add(_identity(tensor))
            if not self._storages.knows(tensor):
                self._beside_bytes += tensor.untyped_storage().nbytes()
        return tensor.detach()


def run_forward(segment: Segment, arguments: Sequence[Any]) -> tuple[StepFunction, tuple[Any, ...]]:
    """Runs the forward half of a segment so that nothing is stored; returns what ran it, and its outputs."""
    capture = segment.capture
    assert capture is not None
    step = StepFunction(forward_only(capture.joint), StepInterface.of(capture.joint), capture.metadata)
    return step, tuple(capture.bind(step)(segment.step, segment.lifted.free_of(arguments), {}, ()))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
