"""Plans of a whole sequence of parts: searched in the joined problem, judged by the timeline of the parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from fxhybrid.capture.python_state import generator_state_bytes
from fxhybrid.compiler.planner import error_target
from fxhybrid.errors import BudgetError
from fxhybrid.ir.joined_problem import JoinedProblem, join_parts
from fxhybrid.ir.part import PartTimeline, part_timeline
from fxhybrid.ir.plan import Action
from fxhybrid.ir.sequence import PartSequence, SequencePeak, sequence_peak
from fxhybrid.options import Options
from fxhybrid.segments.part_errors import Measure, PartActions, measured_scales, with_scaled_errors
from fxhybrid.solvers.portfolio.extend_plans import find_smallest_peak, frontier_plans
from fxhybrid.solvers.portfolio.known_plans import WAYS_OUT, KnownPlan, KnownPlans, pareto
from fxhybrid.solvers.portfolio.solvers import Portfolio
from fxhybrid.units import format_bytes

MAX_ROUNDS = 4
BINDING = 0.7  # share of the limit from which on estimated errors decide which plans are found
RESCALE_MARGIN = 1.1  # errors are scaled up by this more than was measured
TRACED_STATES = 3  # of the generator, alive while a graph is traced: Dynamo's, and AOTAutograd's with its copy
TRACED_NUMBERS_BYTES = 256  # Python's numbers, of which Dynamo makes tensors of 8 bytes


def tracing_bytes() -> int:
    """Returns how far memory rises while a graph is traced in the middle of a step."""
    return TRACED_STATES * generator_state_bytes() + TRACED_NUMBERS_BYTES


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Holds a plan of the whole step.

    Attributes:
        actions: of each part.
        known: what the solver knows of it.
        needs: what each part needs by it.
        peak: of the step.
        measured_error: relative gradient error on the batch of the trial; None if it was not measured.
    """

    actions: PartActions
    known: KnownPlan
    needs: tuple[PartTimeline, ...]
    peak: SequencePeak
    measured_error: float | None = None

    @property
    def error(self) -> float:
        """The gradient error, measured if it was."""
        return self.known.point.error if self.measured_error is None else self.measured_error

    @property
    def needed_bytes(self) -> int:
        """The budget that it takes: its peak, and room to trace a graph wherever a step leaves the planned path."""
        return max(self.peak.peak_bytes, self.peak.traced_bytes + tracing_bytes())

    @property
    def held_bytes(self) -> int:
        """What the parts keep together when the forward pass is over."""
        return sum(need.stored_bytes for need in self.needs)


def measured_plans(sequence: PartSequence, options: Options, measure: Measure) -> SequencePlans:
    """Searches plans by the gradient errors of the whole step.

    Each part's errors are relative to its own gradients, so that together they look larger than they are. Where that is
    what ends the search, the smallest plan is run, and the errors of each part are scaled by what it shows.
    """
    plans = SequencePlans(sequence, options, measure)
    plans.cheapest(plans.smallest.needed_bytes)
    smallest = plans.smallest
    estimated = smallest.known.point.error
    if estimated < BINDING * plans.known.max_error:
        return plans
    scale = RESCALE_MARGIN * smallest.error / estimated
    if scale >= BINDING:
        return plans
    scales = measured_scales(sequence, smallest.actions, measure)
    plans = SequencePlans(with_scaled_errors(sequence, scales), options, measure, scale)
    plans.cheapest(plans.smallest.needed_bytes)
    return plans


def estimated_plans(sequence: PartSequence, options: Options, error_scale: float) -> SequencePlans:
    """Searches plans by estimated errors: those of the parts, scaled by what another path has shown."""
    scaled = with_scaled_errors(sequence, [error_scale] * len(sequence.parts))
    return SequencePlans(scaled, options, None, error_scale)


class SequencePlans:
    """Holds the plans that are known for one sequence, and searches for more.

    Attributes:
        sequence: the parts.
        known: plans of the joined problem.
        error_scale: of the parts' errors, as one run of the whole step has shown.
    """

    def __init__(
        self, sequence: PartSequence, options: Options, measure: Measure | None, error_scale: float = 1.0
    ) -> None:
        """Searches the frontier of plans.

        Args:
            sequence: the parts.
            options: what the user asked for.
            measure: runs a plan on the batch of the trial, and returns its gradient error; None where that is exact.
            error_scale: by which the errors of the parts are scaled.
        """
        self.error_scale = error_scale
        self.sequence, self.options, self.measure = sequence, options, measure
        self.joined: JoinedProblem = join_parts(sequence)
        self.known: KnownPlans = frontier_plans(self.joined.problem, max_error=error_target(options))
        self._judged: dict[frozenset[tuple[int, Action]], SequencePlan] = {}
        self._scale = 1.0  # by which measured errors exceed estimated ones

    @cached_property
    def save_all(self) -> SequencePlan:
        """The plan that stores everything."""
        plan = next((plan for plan in self.known.plans if not plan.point.actions), None)
        assert plan is not None, "the frontier begins with the plan that stores everything"
        return self._judge(plan)

    @property
    def smallest(self) -> SequencePlan:
        """The plan with the smallest peak that can be found."""
        self.known = find_smallest_peak(self.known)
        return self.smallest_known

    @property
    def smallest_known(self) -> SequencePlan:
        """The plan with the smallest peak that was found so far."""
        plans = sorted(self._within_error(), key=lambda plan: plan.point.peak_bytes)
        return min(map(self._judge, plans[:4]), key=lambda plan: plan.needed_bytes)

    def cheapest(self, limit_bytes: int) -> SequencePlan | None:
        """Returns the cheapest plan within a limit, whose gradient error is within its own limit by measurement."""
        for _ in range(MAX_ROUNDS):
            plan = self._cheapest(limit_bytes)
            measured = None if plan is None else self._measured(plan)
            if measured is None or measured.error <= self.options.max_grad_error:
                return measured
            self._scale *= max(RESCALE_MARGIN * measured.error / self.options.max_grad_error, RESCALE_MARGIN)
        return None

    def together(self, n_others: int, each_bytes: int) -> list[tuple[int, SequencePlan]]:
        """Returns what one call takes while others by the same plan wait for their backward pass, cheapest plan first.

        Args:
            n_others: how many wait.
            each_bytes: what stands beside each of them whatever its plan.
        """
        self.known = find_smallest_peak(self.known)
        peaks = ((plan.peak, plan) for plan in map(self._judge, pareto(self._within_error())))
        return [(peak.peak_bytes + n_others * (peak.waiting_bytes + each_bytes), plan) for peak, plan in peaks]

    def _cheapest(self, limit_bytes: int) -> SequencePlan | None:
        if self.save_all.needed_bytes <= limit_bytes:
            return self.save_all
        self.known, _ = Portfolio(self.options.solver).extend(self.known, limit_bytes)
        plan = self._first_fitting(limit_bytes)
        if plan is None:
            smallest = self.smallest
            plan = self._first_fitting(limit_bytes) or (smallest if smallest.needed_bytes <= limit_bytes else None)
        return plan

    def _first_fitting(self, limit_bytes: int) -> SequencePlan | None:
        """Bisects the frontier: peaks fall as overheads rise, by the parts' timeline as by the joined problem's."""
        plans = pareto(self._within_error())
        low, high = 0, len(plans)
        while low < high:
            middle = (low + high) // 2
            fits = self._judge(plans[middle]).needed_bytes <= limit_bytes
            low, high = (low, middle) if fits else (middle + 1, high)
        fitting = (self._judge(plan) for plan in plans[low:])
        return next((plan for plan in fitting if plan.needed_bytes <= limit_bytes), None)

    def _within_error(self) -> list[KnownPlan]:
        limit = self.known.max_error / self._scale
        return [plan for plan in self.known.plans if plan.point.error <= limit]

    def _judge(self, plan: KnownPlan) -> SequencePlan:
        key = frozenset(plan.point.actions.items())
        if key not in self._judged:
            actions = self.joined.by_part(plan.point.actions)
            parts = self.sequence.parts
            needs = tuple(part_timeline(part, chosen) for part, chosen in zip(parts, actions, strict=True))
            self._judged[key] = SequencePlan(actions, plan, needs, sequence_peak(self.sequence, needs))
        return self._judged[key]

    def _measured(self, plan: SequencePlan) -> SequencePlan:
        """Measures a plan's gradient error, unless it is exact or there is no batch at hand."""
        if plan.known.point.error == 0 or self.measure is None or plan.measured_error is not None:
            return plan
        measured = replace(plan, measured_error=self.measure(plan.actions))
        self._judged[frozenset(plan.known.point.actions.items())] = measured
        return measured

    def budget_error(self, budget_bytes: int, extra_bytes: int) -> BudgetError:
        """Builds the error for a budget that no known plan meets."""
        smallest = self.smallest
        minimum = smallest.needed_bytes + extra_bytes
        beside = f" beside {extra_bytes} bytes of earlier gradients and calls" if extra_bytes else ""
        return BudgetError(
            f"the budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) cannot be met{beside}: the smallest "
            f"known plan of the step, which is {len(self.sequence.parts)} graphs with Python between them, takes "
            f"{minimum} bytes ({format_bytes(minimum)}). {WAYS_OUT}",
            budget_bytes=budget_bytes,
            minimum_bytes=minimum,
            minimum_lower_bound_bytes=min(self.known.lower_bound_bytes + extra_bytes, minimum),
            holder="the step of several graphs",
        )
