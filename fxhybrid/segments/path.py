"""One path through a model that traces into several graphs, as it was recorded and planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxhybrid.segments.planned_run import PlannedPart, planned_part
from fxhybrid.segments.segment import Segment
from fxhybrid.segments.sequence_plans import PartActions, SequencePlan, SequencePlans
from fxhybrid.segments.trial import Trial


@dataclass(eq=False)
class Path:
    """Holds one path through the model.

    Attributes:
        trial: what was recorded on it.
        plans: of the whole.
        inputs: shapes and types of the call's tensors, in words.
        has_loss: whether the loss is part of the step.
        chosen: by the bytes that it may take, the plan and its parts.
    """

    trial: Trial
    plans: SequencePlans
    inputs: str
    has_loss: bool
    chosen: dict[int, tuple[SequencePlan, list[PlannedPart]]] = field(default_factory=dict)

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
            twin = next((parts for other, parts in self.chosen.values() if other.actions == plan.actions), None)
            self.chosen[limit_bytes] = plan, twin or self.parts_of(plan.actions, plan)
        return self.chosen[limit_bytes]

    def parts_of(self, actions: PartActions, plan: SequencePlan) -> list[PlannedPart]:
        """Builds the graphs of a plan; the same graph by the same actions is built once."""
        built: dict[tuple[int, frozenset[Any]], PlannedPart] = {}
        parts = []
        calls = zip(self.trial.calls, self.trial.prepared, actions, plan.needs, strict=True)
        for call, prepared, chosen, needs in calls:
            key = id(prepared), frozenset(chosen.items())
            if key not in built:
                shared = sum(self.trial.sequence.shared[i].size_bytes for i in needs.stored)
                built[key] = planned_part(call.segment, prepared, chosen, needs, shared)
            parts.append(built[key])
        return parts

    def boundary_bytes(self, k: int) -> int:
        """Counts what a part leaves to later ones, which Python holds for some time."""
        shared = self.trial.sequence.shared
        return sum(shared[key].size_bytes for key in set(self.trial.sequence.parts[k].leaving.values()))
