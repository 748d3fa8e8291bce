"""One path through a model that traces into several graphs, as it was recorded and planned."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from fxhybrid.accuracy.verifier import CaptureCheck
from fxhybrid.ir.part import Headroom, Part, PartTimeline, own_actions, scheduled_timeline
from fxhybrid.ir.plan import Actions
from fxhybrid.ir.schedule import Schedule
from fxhybrid.pipeline import Prepared, schedule_of, scheduled_graphs
from fxhybrid.segments.left_out import Recomputation
from fxhybrid.segments.part_errors import PartActions
from fxhybrid.segments.planned_run import PlannedPart, planned_part
from fxhybrid.segments.segment import Segment
from fxhybrid.segments.sequence_plans import SequencePlan, SequencePlans
from fxhybrid.segments.sources import forward_alone, result_positions
from fxhybrid.segments.trial import Trial


def parts_of(
    trial: Trial, actions: PartActions, needs: Sequence[PartTimeline], headroom: Sequence[Headroom]
) -> list[PlannedPart]:
    """Builds the graphs of a plan; the same graph by the same schedule is built once.

    Where the step rises higher elsewhere, a part takes faster forms of its operators.

    Args:
        trial: of the path.
        actions: of each part.
        needs: what each part needs by them.
        headroom: of each part in the step.
    """
    built: dict[tuple[int, Schedule], PlannedPart] = {}
    parts = []
    for k, (call, prepared) in enumerate(zip(trial.calls, trial.prepared, strict=True)):
        schedule, need = _scheduled(prepared, trial.sequence.parts[k], actions[k], needs[k], headroom[k])
        key = id(prepared), schedule
        shared = sum(trial.sequence.shared[i].size_bytes for i in need.stored)
        if key not in built:
            built[key] = planned_part(call.segment, prepared, scheduled_graphs(prepared, schedule), need)
        recomputations = recomputations_of(trial, k, need.recomputed)
        parts.append(
            replace(built[key], needs=need, stored_bytes=need.stored_bytes + shared, recomputations=recomputations)
        )
    return parts


def _scheduled(
    prepared: Prepared, part: Part, actions: Actions, need: PartTimeline, headroom: Headroom
) -> tuple[Schedule, PartTimeline]:
    """Returns the fastest schedule of a part by its actions that keeps to the headroom, and what it needs by that."""
    own, more, dying = own_actions(part, actions), headroom, part.dying
    while True:
        schedule = schedule_of(prepared, own, more, dying)
        found = scheduled_timeline(part, actions, schedule)
        lower = found.backward_bytes < need.backward_bytes or found.beside_others_bytes < need.beside_others_bytes
        if lower and dying and not headroom.backward_bytes:  # the step would rise less than was predicted
            dying = ()
            continue
        backward_bytes = max(found.backward_bytes, need.backward_bytes)
        beside_others_bytes = max(found.beside_others_bytes, need.beside_others_bytes)
        rise = max(backward_bytes - need.backward_bytes, beside_others_bytes - need.beside_others_bytes)
        if rise <= headroom.backward_bytes:
            return schedule, replace(need, backward_bytes=backward_bytes, beside_others_bytes=beside_others_bytes)
        # the part's own peak counts what dies earlier within the step
        more = replace(more, backward_bytes=more.backward_bytes - (rise - headroom.backward_bytes))


def recomputations_of(trial: Trial, k: int, recomputed: frozenset[int]) -> tuple[Recomputation, ...]:
    """Returns what earlier parts recompute for the backward half of a part.

    Args:
        trial: of the path.
        k: position of the part.
        recomputed: tensors that it takes and does not keep.
    """
    part = trial.sequence.parts[k]
    sources = sorted({part.sources[t].part for t in recomputed})
    taken = {part.arriving[t] for t in recomputed}
    keys = {i: key for i, key in trial.calls[k].inputs.items() if key in taken}
    found = []
    for source in sources:
        prepared = trial.prepared[source]
        positions = result_positions(prepared, trial.calls[source].outputs, taken)
        results = {i: positions[key] for i, key in keys.items() if key in positions}
        found.append(Recomputation(source, forward_alone(prepared).forward, results))
    return tuple(found)


@dataclass(eq=False)
class Path:
    """Holds one path through the model.

    Attributes:
        trial: what was recorded on it.
        plans: of the whole.
        check: how its save-all step compares with eager.
        inputs: shapes and types of the call's tensors, in words.
        has_loss: whether the loss is part of the step.
        chosen: by the bytes that it may take, and by what waits beside it, the plan and its parts.
    """

    trial: Trial
    plans: SequencePlans
    check: CaptureCheck
    inputs: str
    has_loss: bool
    chosen: dict[Hashable, tuple[SequencePlan, list[PlannedPart]]] = field(default_factory=dict)

    @property
    def crosses(self) -> bool:
        """Whether images go from graph to graph in channels_last."""
        return any(call.form.crossing.outputs for call in self.trial.calls)

    @property
    def segments(self) -> list[Segment]:
        """What is called, in order."""
        return [call.segment for call in self.trial.calls]

    def within(self, limit_bytes: int) -> tuple[SequencePlan, list[PlannedPart]] | None:
        """Returns the cheapest plan within a limit, and its parts; None if there is none."""
        if limit_bytes not in self.chosen:
            plan = self.plans.cheapest(limit_bytes)
            if plan is None:
                return None
            self.chosen[limit_bytes] = plan, self.parts(plan)
        return self.chosen[limit_bytes]

    def parts(self, plan: SequencePlan) -> list[PlannedPart]:
        """Returns the parts by a plan; built once."""
        built = next((parts for other, parts in self.chosen.values() if other.actions == plan.actions), None)
        return built or parts_of(self.trial, plan.actions, plan.needs, plan.peak.headroom)

    def least_bytes(self) -> list[int]:
        """Returns what each part takes by the smallest known plan, above what is alive before it."""
        peak = self.plans.smallest_known.peak
        pairs = zip(peak.before_bytes, peak.forward_bytes, peak.backward_bytes, strict=True)
        return [max(forward, backward) - before for before, forward, backward in pairs]

    def boundary_bytes(self, k: int) -> int:
        """Counts what a part leaves to later ones, which Python holds for some time."""
        shared = self.trial.sequence.shared
        return sum(shared[key].size_bytes for key in set(self.trial.sequence.parts[k].leaving.values()))
