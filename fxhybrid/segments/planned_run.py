"""Runs one call of a step of several graphs: by its plan while it takes the path that was planned, else part by part.

On another path each part takes the cheapest of its own plans that fits beside what is pending, and that leaves room for
the smallest plan of what usually follows. Where none fits, the step is refused before that part runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from fxhybrid.compiler.pending_calls import PendingCall, references
from fxhybrid.errors import BackwardError, BudgetError
from fxhybrid.ir.part import PartTimeline
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.pipeline import Prepared
from fxhybrid.runtime import LateBackward, StepFunction
from fxhybrid.segments.images import HandedImages
from fxhybrid.segments.leaf_notes import NOTHING_NEW
from fxhybrid.segments.left_out import LeftOutValues, Recomputation, RecomputedParts
from fxhybrid.segments.room import NothingPending, Room
from fxhybrid.segments.segment import Segment, run_under_way
from fxhybrid.segments.sequence_plans import tracing_bytes
from fxhybrid.units import format_bytes

UNEXPECTED = (
    "gradients arrive for outputs of a graph of the step which got none in the trial: its forward pass did not store "
    "what they need. From now on they are planned for: zero the gradients and run the step again"
)


@dataclass(frozen=True, eq=False)
class PlannedPart:
    """Holds a part by one plan.

    Attributes:
        segment: what is called.
        prepared: for the form in which it is called.
        needs: what it needs.
        function: runs it.
        stored_bytes: what it keeps between the halves, shared or not.
        recomputations: what earlier parts recompute for its backward half.
    """

    segment: Segment
    prepared: Prepared
    needs: PartTimeline
    function: Callable[..., Any]
    stored_bytes: int
    recomputations: tuple[Recomputation, ...] = ()

    @cached_property
    def output_bytes(self) -> int:
        """What it returns."""
        return output_bytes_of(self.prepared)

    @cached_property
    def _strides(self) -> Mapping[int, tuple[int, ...]]:
        """Those of the images that it takes, by position."""
        placeholders = self.prepared.traced.joint.placeholders
        return {i: placeholders[i].meta["val"].stride() for i in self.segment.images}

    def takes(self, arguments: Sequence[Any]) -> bool:
        """Says whether images come in the layout that is planned."""
        return all(arguments[i].stride() == strides for i, strides in self._strides.items())

    def call(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Runs the forward half."""
        return tuple(self.function(None, self.segment.lifted.free_of(arguments), {}, ()))


def output_bytes_of(prepared: Prepared) -> int:
    """Adds up what a part returns."""
    joint, layout, problem = prepared.joint, prepared.layout, prepared.problem
    behind = {t for node in joint.output_nodes if node is not None for t in layout.storages_of.get(node, ())}
    return sum(problem.tensors[t].size_bytes for t in behind if t in problem.producer)


def before_tracing() -> None:
    """Makes sure that the step under way, if it is planned, has room to trace a graph.

    Raises:
        BudgetError: it has not.
    """
    run = run_under_way()
    if isinstance(run, PlannedRun):
        run.check_room_to_trace()


def planned_part(segment: Segment, prepared: Prepared, graphs: SplitGraphs, needs: PartTimeline) -> PlannedPart:
    """Makes a part of its two halves.

    Args:
        segment: what is called.
        prepared: for the form in which it is called.
        graphs: the halves.
        needs: what it needs by them.
    """
    traced, metadata, absent = prepared.traced, prepared.capture.metadata, prepared.expected.absent

    def enter(saved: list[Tensor], outputs: Sequence[Any], inputs: Sequence[Any]) -> _Opened:
        run = run_under_way()
        assert isinstance(run, PlannedRun), "a planned part runs within a planned step"
        return run.entered(saved, [t for t in outputs if isinstance(t, Tensor)], inputs, absent)

    function = prepared.capture.bind(StepFunction(graphs, traced.interface, metadata, absent=absent, enter=enter))
    return PlannedPart(segment, prepared, needs, function, needs.stored_bytes)


class OfferedPlans(Protocol):
    """Is the plans of a part by itself."""

    prepared: Prepared

    @property
    def needs(self) -> Sequence[PartTimeline]:
        """What it needs by each, the cheapest plan first."""

    def part(self, number: int) -> PlannedPart:
        """Returns the part by one of the plans."""


class Solo(Protocol):
    """Gives the plans of parts by themselves."""

    def plans(self, segment: Segment, arguments: Sequence[Any], room_bytes: int) -> OfferedPlans:
        """Returns the plans of a part for a call with these arguments; to find them may take some bytes."""


@dataclass(eq=False)
class PlannedRun:
    """Runs the parts of one call.

    Attributes:
        parts: of the planned path.
        room: what the call may take.
        solo: gives the plans of single parts.
        pending: stands for the call until its backward pass has run.
        unexpected: is told of a part whose tangents were not expected.
        images: follows those that are handed on in channels_last.
        path: the segments that ran.
    """

    parts: Sequence[PlannedPart]
    room: Room
    solo: Solo
    pending: PendingCall | NothingPending
    unexpected: Callable[[], None]
    images: HandedImages
    path: list[Segment] = field(default_factory=list)
    is_on_path: bool = True
    _stored_bytes: int = 0
    _output_bytes: int = 0
    _gradient_bytes: int = 0
    _backward_bytes: list[int] = field(default_factory=list)  # heights of the backward halves to come
    _made: dict[int, int] = field(default_factory=dict)  # storage -> part

    def call(self, segment: Segment, arguments: Sequence[Any]) -> Any:
        """Runs a graph."""
        if segment.capture is None:
            return segment.plain(arguments)
        position = len(self.path)
        expected = self.parts[position] if self.is_on_path and position < len(self.parts) else None
        if (
            expected is not None
            and expected.segment is segment
            and self._recomputed.are_as_made(expected.recomputations, arguments)
            and expected.takes(arguments)
        ):
            self.path.append(segment)
            self._ran(expected)
            results = expected.call(arguments)
            self.images.add([results[i] for i in expected.prepared.traced.crossing.outputs])
            return results
        self.is_on_path = False
        self.images.restore()
        arguments = segment.as_traced(arguments)
        part = self._admitted(segment, arguments)
        self.path.append(segment)
        self._ran(part)
        return part.call(arguments)

    @cached_property
    def _recomputed(self) -> RecomputedParts:
        """What the parts need that are recomputed in the backward pass."""
        return RecomputedParts(recomputation.source for part in self.parts for recomputation in part.recomputations)

    def check_room_to_trace(self) -> None:
        """Makes sure that a graph can be traced beside what is alive, images in the usual layout.

        Raises:
            BudgetError: the budget is exceeded by it.
        """
        resident = self.room.resident()
        pending = sum(n_bytes for storage, n_bytes in self.pending.alive().items() if storage not in resident)
        alive = self.room.resident_bytes + pending + self.images.n_bytes()
        if alive + tracing_bytes() > self.room.limit_bytes:
            raise self._error(alive, alive + tracing_bytes(), "to be traced it takes")
        self.images.restore()

    def _admitted(self, segment: Segment, arguments: Sequence[Any]) -> PlannedPart:
        """Returns a part beside those that ran already; what they returned is taken for held by Python."""
        room, form = self.room, segment.form_of(arguments)
        taken = sum(arguments[i].untyped_storage().nbytes() for i in form.boundaries)  # counted in the part itself
        stored = room.resident_bytes + self._stored_bytes
        before = stored + max(self._output_bytes - taken, 0)
        needed: list[int] = []

        def fits(needs: PartTimeline, *, as_usual: bool) -> bool:
            earlier = max(self._backward_bytes, default=0) + needs.gradient_bytes
            later = max(room.gradient_bytes - self._gradient_bytes - needs.gradient_bytes, 0) if as_usual else 0
            backward = max(stored + needs.backward_bytes, earlier) + later
            leaving = following if as_usual else 0
            needed.append(max(before + max(needs.forward_bytes, needs.stored_bytes + leaving), backward))
            return needed[-1] <= room.limit_bytes

        for i in form.boundaries:  # its gradient lives through the backward halves in between
            storage = arguments[i].untyped_storage()
            for j in range(self._made.get(storage._cdata, -1) + 1, len(self.path)):
                self._backward_bytes[j] += storage.nbytes()
        offered = self.solo.plans(segment, arguments, room.limit_bytes - before - taken)
        traced = taken + output_bytes_of(offered.prepared) + tracing_bytes()  # whatever comes next may be new
        following = max([*room.least_bytes()[len(self.path) + 1 :], traced])
        roomy = (n for n, needs in enumerate(offered.needs) if fits(needs, as_usual=True))
        chosen = next(roomy, None)
        if chosen is None:  # then the one that leaves most
            fitting = [n for n, needs in enumerate(offered.needs) if fits(needs, as_usual=False)]
            chosen = min(fitting, key=lambda n: (offered.needs[n].stored_bytes, n), default=None)
        if chosen is None:
            raise self._error(before, min(needed, default=before), "by its smallest known plan it takes")
        return offered.part(chosen)

    def _ran(self, part: PlannedPart) -> None:
        """Counts a part that runs: what it keeps, and what it adds to the backward halves of earlier ones."""
        needs = part.needs
        self._backward_bytes = [height + needs.gradient_bytes for height in self._backward_bytes]
        self._backward_bytes.append(self.room.resident_bytes + self._stored_bytes + needs.backward_bytes)
        self._stored_bytes += part.stored_bytes
        self._output_bytes += part.output_bytes
        self._gradient_bytes += needs.gradient_bytes

    def _error(self, alive: int, needed: int, takes: str) -> BudgetError:
        limit = self.room.limit_bytes
        return BudgetError(
            f"the step takes another path than before, and the budget of {limit} bytes ({format_bytes(limit)}) cannot "
            f"be met for its graph {len(self.path) + 1}: {alive} bytes ({format_bytes(alive)}) are pending, and "
            f"{takes} {needed} bytes ({format_bytes(needed)}) with them. Raise the budget, or run the step again: the "
            "next path is planned as a whole",
            budget_bytes=limit,
            minimum_bytes=needed,
            minimum_lower_bound_bytes=min(alive, needed),
            holder="graphs whose backward pass is still to come",
        )

    def entered(
        self, saved: list[Tensor], outputs: Sequence[Tensor], inputs: Sequence[Any], absent: frozenset[int]
    ) -> _Opened:
        """Counts what a part holds for a backward pass to come, and leaves out what is recomputed."""
        position, left_out = len(self.path) - 1, None
        if self.is_on_path:
            left_out = self._recomputed.leave_out(saved, inputs, self.parts[position].recomputations)
            self._recomputed.note(position, inputs, outputs)
        returned = references(outputs)
        self._made |= {reference.cdata: position for reference, _ in returned}
        self.pending.held = (*self.pending.held, *references(saved), *returned)
        return _Opened(self.pending, absent, self.unexpected, left_out)


@dataclass(frozen=True, eq=False)
class _Opened:
    """Keeps the call among the pending ones until the backward half of a part begins."""

    pending: PendingCall | NothingPending
    absent: frozenset[int]
    unexpected: Callable[[], None]
    left_out: LeftOutValues | None
    leaf_notes = NOTHING_NEW

    def begins(self, present: frozenset[int], _: frozenset[int]) -> LateBackward | None:
        """Refuses tangents that were not expected.

        Raises:
            BackwardError: such tangents arrive; no gradient of this part has been computed.
        """
        if present & self.absent:
            self.unexpected()
            raise BackwardError(UNEXPECTED)
        return None
