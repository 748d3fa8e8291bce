"""Plans of single parts, for steps that take a path which is not planned as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxhybrid.capture.planning_lock import PLANNING
from fxhybrid.compiler.planner import error_target
from fxhybrid.ir.part import PartTimeline, part_timeline
from fxhybrid.ir.plan import Actions
from fxhybrid.options import Options
from fxhybrid.pipeline import Prepared, build_graphs
from fxhybrid.segments.parts import own_part
from fxhybrid.segments.planned_run import PlannedPart, planned_part
from fxhybrid.segments.segment import Segment
from fxhybrid.segments.trial import PartCalibration
from fxhybrid.solvers.portfolio.extend_plans import find_smallest_peak, frontier_plans
from fxhybrid.solvers.portfolio.known_plans import pareto


class OwnPlans:
    """Holds the plans of one part.

    Attributes:
        needs: what it needs by each, the cheapest plan first.
    """

    def __init__(self, segment: Segment, prepared: Prepared, max_error: float) -> None:
        """Searches them."""
        self.segment, self.prepared = segment, prepared
        known = find_smallest_peak(frontier_plans(prepared.problem, max_error=max_error))
        self.actions: list[Actions] = [plan.point.actions for plan in pareto(known.plans)]
        self.needs: list[PartTimeline] = [part_timeline(own_part(prepared), actions) for actions in self.actions]
        self._parts: dict[int, PlannedPart] = {}

    def part(self, number: int) -> PlannedPart:
        """Returns the part by one of the plans; built when first needed."""
        if number not in self._parts:
            graphs = build_graphs(self.prepared, self.actions[number])
            self._parts[number] = planned_part(self.segment, self.prepared, graphs, self.needs[number])
        return self._parts[number]


class SoloPlans:
    """Holds the plans of parts by themselves."""

    def __init__(self, options: Options, calibration: PartCalibration) -> None:
        """Takes what measures errors, which keeps what it measured."""
        self.options, self.calibration = options, calibration

    def plans(self, segment: Segment, arguments: Sequence[Any], room_bytes: int) -> OwnPlans:
        """Returns the plans of a part; searched when first needed, with errors measured on these arguments.

        Args:
            segment: the part.
            arguments: of the call.
            room_bytes: what measuring may take.
        """
        with PLANNING:
            form = segment.form_of(arguments)
            plans: OwnPlans | None = segment.own_plans.get(form)
            if plans is None:
                prepared = self.calibration.of(segment, form, segment.call_of(arguments), room_bytes)
                plans = segment.own_plans[form] = OwnPlans(segment, prepared, error_target(self.options))
            return plans
