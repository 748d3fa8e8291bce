"""Records a step of several graphs: which are called, what they hand to each other, and for how long it lives.

The forward pass is run so that graphs store nothing. Whatever of their outputs is still alive when a later graph begins
is then held by Python, and no more memory is taken than by any plan. What the backward pass will run is read from
autograd's graph; what Python's own operators take in it is seen by running it (``backward_recording.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.capture.output_structure import output_tensors
from fxhybrid.errors import ProfileError
from fxhybrid.ir.sequence import Shared, Tail
from fxhybrid.passes.channels_last import Crossing
from fxhybrid.passes.split import forward_only
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.profiling.recording import Event, Recording, recording, split_at_birth, walk
from fxhybrid.runtime import Enter, StepFunction
from fxhybrid.segments.backward_order import halves_behind
from fxhybrid.segments.backward_recording import ZeroHalves
from fxhybrid.segments.handed_storages import HandedStorages, storage_identity
from fxhybrid.segments.segment import Form, Segment, under_way


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
        backward_rise_bytes: what their backward pass takes, beyond what is alive when the call's own is over.
        passing_bytes: gradients that Python's operators have made for others, alive in the call's backward pass or
            behind it.
        loose_bytes: what else Python holds when the call begins: tensors that it hands to no graph.
    """

    segment: Segment
    form: Form
    inputs: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, int] = field(default_factory=dict)
    present: frozenset[int] | None = None
    beside_bytes: int = 0
    rise_bytes: int = 0
    backward_rise_bytes: int = 0
    passing_bytes: int = 0
    loose_bytes: int = 0


class StepRecording:
    """Runs a step by graphs that store nothing, and records it.

    Attributes:
        calls: in order.
        shared: storages that were made within the step; complete at the end of ``run``.
        backward: the calls in the order in which their backward halves will run; likewise.
        weighed: positions of the results that get gradients, among the tensors that a call returns; likewise.
        tail: what Python's operators after the last call take; likewise.
        unplanned: storages that graphs without a plan take; likewise.
        partial: what ``backward`` is where only one of the results gets a gradient, or all but one; likewise.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        self.calls: list[RecordedCall] = []
        self.shared: tuple[Shared, ...] = ()
        self.backward: tuple[int, ...] = ()
        self.weighed: Collection[int] | None = None
        self.tail = Tail()
        self.partial: tuple[tuple[int, ...], ...] = ()
        self.unplanned: Collection[int] = ()
        self._storages = HandedStorages(existing)
        self._steps: list[StepFunction] = []
        self._halves = ZeroHalves(self._mark, self._look_in_backward)
        self._within = False
        self._counted: set[int] = set()
        self._plain: set[int] = set()  # storages that graphs take which are not planned
        self._beside: list[tuple[StorageWeakRef, int]] = []  # what operators since the last call keep
        self._left: tuple[set[int], int] = set(), 0  # what is alive when the first backward half begins
        self._memory: Recording | None = None

    def run(self, forward: Callable[[], Any], weighed: Callable[[Any], Collection[int] | None]) -> None:
        """Runs the step.

        Args:
            forward: does the forward pass.
            weighed: returns the positions of a result's tensors that get gradients; None for all.

        Raises:
            CaptureError: a custom autograd function runs between the graphs.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ProfileError):  # a profiler of the user's is on
                self._memory = stack.enter_context(recording())
            result = self._forward(forward)
            self._mark()
            self.weighed = weighed(result)
            outputs = list(output_tensors(result))
            chosen = (t for i, t in enumerate(outputs) if self.weighed is None or i in self.weighed)
            results = [t for t in chosen if t.requires_grad]
            halves = halves_behind(results, self._steps)
            self.backward = tuple(position for position, _ in halves)
            for position, present in halves:
                self.calls[position].present = present
            self.partial = tuple(self._partial(results) - {self.backward, ()})
            is_run = self._memory is not None and bool(halves) and self._halves.run(results)
        self.unplanned = {key for identity, key in self._storages.keys.items() if identity in self._plain}
        roots = {self._storages.keys.get(storage_identity(t)) for t in results}
        self.shared = tuple(replace(s, is_root=key in roots) for key, s in enumerate(self._storages.shared))
        if self._memory is not None:
            live = self._note_rises(self._memory.segments)
            if is_run and tuple(self._halves.ran) == self.backward:
                self._note_backward(self._memory.segments, live, results)
            elif halves:
                self._assume_backward()

    def cross(self, crossings: Sequence[Crossing]) -> None:
        """Notes for each call which images go from graph to graph in channels_last."""
        laid_out = {call.inputs[i] for call, found in zip(self.calls, crossings, strict=True) for i in found.inputs}
        for call, found in zip(self.calls, crossings, strict=True):
            call.form = replace(call.form, crossing=found)
        self.shared = tuple(replace(s, is_laid_out=key in laid_out) for key, s in enumerate(self.shared))

    def _forward(self, forward: Callable[[], Any]) -> Any:
        pack, unpack = map(torch.compiler.disable, (self._pack, _as_it_is))  # Dynamo would trace them between graphs
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), under_way(self):
            result = forward()
        for tensor in output_tensors(result):
            self._count(tensor)
        self._storages.look_at_end(len(self.calls))
        self.tail = Tail(sum(n_bytes for _, n_bytes in self._beside))
        return result

    def call(self, segment: Segment, arguments: Sequence[Any]) -> Any:
        """Runs a graph."""
        arguments = segment.as_traced(arguments)
        if segment.capture is None:
            self._plain |= {storage_identity(t) for t in arguments if _is_strided(t)}
            return segment.plain(arguments)
        now = len(self.calls)
        self._storages.look(now)
        recorded = RecordedCall(segment, segment.form_of(arguments), beside_bytes=sum(n for _, n in self._beside))
        self._beside = []
        self.calls.append(recorded)
        recorded.inputs = self._keys(arguments, now)
        self._within = True
        self._mark()
        try:
            step, outputs = run_forward(segment, arguments, partial(self._halves.enter, now, arguments))
        finally:
            self._within = False
        self._mark()
        self._steps.append(step)
        recorded.outputs = self._keys(outputs, now)
        return outputs

    def _partial(self, results: Sequence[Tensor]) -> set[tuple[int, ...]]:
        """Returns the orders of backward passes in which one result gets a gradient, or all but one do."""
        alone = ([result] for result in results)
        others = ([*results[:i], *results[i + 1 :]] for i in range(len(results)))
        return {tuple(k for k, _ in halves_behind(some, self._steps)) for some in (*alone, *others) if some}

    def _look_in_backward(self) -> None:
        """Looks at what is left when the first half begins."""
        self._left = self._storages.left(), sum(n for ref, n in self._beside if not ref.expired())  # type: ignore[no-untyped-call, misc]

    def _mark(self) -> None:
        if self._memory is not None:
            self._memory.mark()

    def _note_rises(self, segments: Sequence[Sequence[Event]]) -> dict[int, int]:
        """Notes how far memory rose between the calls, which are marked at both ends; returns what is alive then."""
        live: dict[int, int] = {}
        rises: list[int] = []
        levels: list[int] = []
        for events in segments[: 2 * len(self.calls) + 1]:
            freed, ran = split_at_birth(events)  # what goes first counts in the call before
            began = walk(freed, live)[1]
            peak, end = walk(ran, live)
            rises.append(peak - end)
            levels.append(sum(levels[-1:]) + began + end)
        for k, recorded in enumerate(self.calls):
            recorded.rise_bytes = rises[2 * k]
            recorded.loose_bytes = max(levels[2 * k] - self._counted_bytes(k), 0)
        more = max(levels[-1] - self._counted_bytes(len(self.calls)), 0)  # numbers that operators keep as tensors
        self.tail = replace(self.tail, beside_bytes=self.tail.beside_bytes + more, rise_bytes=rises[-1])
        return live

    def _counted_bytes(self, k: int) -> int:
        """Adds up what is known to be alive when a call begins; at the end of the forward pass for their number."""
        taken = set(self.calls[k].inputs.values()) if k < len(self.calls) else set()
        alive = (s for i, s in enumerate(self.shared) if s.last >= k and (s.maker < k or i in taken))
        beside = sum(recorded.beside_bytes for recorded in self.calls[: k + 1])
        return beside + sum(s.size_bytes for s in alive) + (self.tail.beside_bytes if k == len(self.calls) else 0)

    def _note_backward(
        self, segments: Sequence[Sequence[Event]], live: dict[int, int], results: Sequence[Tensor]
    ) -> None:
        """Notes how far memory rose before and behind the backward halves, and what passed them.

        Args:
            segments: what the allocator did, in forward and backward pass.
            live: blocks that are alive after the forward pass.
            results: get gradients.
        """
        halves, (held, kept_bytes) = self._halves, self._left
        before, *rest = segments[2 * len(self.calls) + 1 :]
        rise = max(self.tail.rise_bytes, walk(before, live)[0])
        born: dict[int, int] = {}  # in the backward pass, in which halves make nothing but what they hand on
        given = sum(t.numel() * t.element_size() for t in results if self._storages.knows(t))
        level = walk(before, born)[1] - given  # gradients of graphs' outputs are counted there
        counts = zip(halves.ran, halves.counted_bytes, halves.carried_bytes, rest[::2], rest[1::2], strict=False)
        for position, counted_bytes, carried_bytes, half, behind in counts:
            passing_bytes = level - counted_bytes  # behind the half some may be summed with what it has made
            freed, ran = split_at_birth(behind)
            level += walk([*half, *freed], born)[1]
            walk([*half, *freed], live)
            self.calls[position].passing_bytes = max(passing_bytes, level - carried_bytes, 0)
            self.calls[position].backward_rise_bytes = walk(ran, live)[0]
            level += walk(ran, born)[1]
        gone_bytes = sum(n for _, n in self._beside) - kept_bytes
        self.tail = replace(self.tail, gone_bytes=gone_bytes, rise_bytes=rise, left_bytes=max(level, 0))
        self.shared = tuple(replace(s, held=s.held and key in held) for key, s in enumerate(self.shared))

    def _assume_backward(self) -> None:
        """Lets Python's backward pass, which was not seen, take one more gradient of all that graphs take and make.

        Behind the last graph it may take twice what the forward pass took: a loss reads what it made, and its gradient.
        """
        self.tail = replace(self.tail, rise_bytes=2 * self.tail.rise_bytes)
        for recorded in self.calls:
            taken, made = (
                sum(self.shared[key].size_bytes for key in set(keys.values()))
                for keys in (recorded.inputs, recorded.outputs)
            )
            recorded.passing_bytes = made
            recorded.backward_rise_bytes = taken + made

    def _keys(self, values: Sequence[Any], now: int) -> dict[int, int]:
        strided = {i: t for i, t in enumerate(values) if _is_strided(t)}
        keys = {i: self._storages.key(t, now) for i, t in strided.items()}
        return {i: key for i, key in keys.items() if key is not None}

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._within:
            return tensor
        self._count(tensor)
        return tensor.detach()

    def _count(self, tensor: Tensor) -> None:
        """Counts what operators between graphs keep, unless it is handed from graph to graph and counted there."""
        if tensor.layout is torch.strided and storage_identity(tensor) not in self._counted:
            self._counted.add(storage_identity(tensor))
            if not self._storages.knows(tensor):
                storage = tensor.untyped_storage()
                self._beside.append((StorageWeakRef(storage), storage.nbytes()))  # type: ignore[no-untyped-call]


def run_forward(
    segment: Segment, arguments: Sequence[Any], enter: Callable[[StepInterface], Enter] | None = None
) -> tuple[StepFunction, tuple[Any, ...]]:
    """Runs the forward half of a segment so that nothing is stored; returns what ran it, and its outputs.

    Args:
        segment: to run.
        arguments: of the call.
        enter: makes what is told of the call; None for nothing.
    """
    capture = segment.capture
    assert capture is not None
    interface = StepInterface.of(capture.joint)
    entering = None if enter is None else enter(interface)
    step = StepFunction(forward_only(capture.joint), interface, capture.metadata, enter=entering)
    return step, tuple(capture.bind(step)(segment.step, segment.lifted.free_of(arguments), {}, ()))


def _is_strided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
