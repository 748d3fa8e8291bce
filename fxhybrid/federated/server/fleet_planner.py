"""Planning for a fleet: one capture, one problem, costs per kind of device, one plan per budget bucket."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum

from fxhybrid.devices.device_profile import DeviceProfile, problem_on
from fxhybrid.devices.op_work import StepWork
from fxhybrid.devices.remote_plan import plan_of
from fxhybrid.ir.plan import Plan
from fxhybrid.ir.problem import Problem, without_codecs, without_recomputation
from fxhybrid.module import HybridModule
from fxhybrid.solvers.base import PlanFrontier
from fxhybrid.solvers.mps.frontier_search import Effort, build_frontier
from fxhybrid.solvers.portfolio.known_plans import simulated

MAX_ERROR = 0.05  # of the gradient, as estimated: half of the default limit
N_BUCKETS = 50
# A fleet has many kinds of devices and 50 buckets for each: a coarser frontier than one device's own will do.
FLEET_EFFORT = Effort(moves=3_000, moves_per_op=1.0, initial_plans=1, points=64)


class Technique(Enum):
    """Says which plans a fleet's devices may get."""

    SAVE_ALL = "unmodified"
    RECOMPUTE = "recompute only"
    COMPRESS = "compress only"
    HYBRID = "hybrid"


@dataclass(frozen=True)
class DevicePlan:
    """Holds a plan for one kind of device.

    Attributes:
        plan: what the device carries out.
        text: the plan as JSON, as it is sent.
        step_s: predicted seconds of one step on a device of that kind with slowdown 1.
    """

    plan: Plan
    text: str
    step_s: float


class FleetPlanner:
    """Plans for any device and budget; makes frontiers and plans once and then looks them up."""

    def __init__(
        self,
        problem: Problem,
        work: StepWork,
        base: Plan,
        *,
        technique: Technique = Technique.HYBRID,
        n_buckets: int = N_BUCKETS,
    ) -> None:
        """Keeps what plans are made from.

        Args:
            problem: the captured step.
            work: of the same step.
            base: any plan for it; its fingerprint and versions are those of all plans.
            technique: which actions plans may use.
            n_buckets: budgets are rounded down to so many even steps from the smallest to the largest useful one.
        """
        self.problem = problem
        self.work = work
        self.base = base
        self.technique = technique
        self.n_buckets = n_buckets
        self.save_all = simulated(problem, {})
        self._frontiers: dict[str, tuple[Problem, PlanFrontier]] = {}
        self._plans: dict[tuple[str, int], DevicePlan | None] = {}
        self._buckets: dict[str, list[int]] = {}
        self._kinds: dict[int, tuple[DeviceProfile, str]] = {}

    @classmethod
    def of(cls, hybrid: HybridModule, **options: object) -> FleetPlanner:
        """Makes a planner for a compiled module's last called signature."""
        return cls(hybrid.planning_problem, hybrid.planning_work, hybrid.plan, **options)  # type: ignore[arg-type]

    @property
    def save_all_bytes(self) -> int:
        """Returns the peak of the unmodified step."""
        return self.save_all.peak_bytes

    def smallest_bytes(self, profile: DeviceProfile) -> int:
        """Returns the peak of the smallest plan for this kind of device."""
        return self._frontier_of(self._kind(profile), profile)[1].points[-1].peak_bytes

    def plan(self, profile: DeviceProfile, budget_bytes: int) -> DevicePlan | None:
        """Returns the plan for a device at a budget; None where no known plan fits.

        The plan's own budget is the bucket's lower end, so it holds for every budget of the bucket.
        """
        kind = self._kind(profile)
        _, frontier = self._frontier_of(kind, profile)
        place = bisect_right(self._buckets[kind], budget_bytes) - 1
        if place < 0:
            return None
        if (kind, place) not in self._plans:
            self._plans[kind, place] = self._make(kind, frontier, self._buckets[kind][place])
        return self._plans[kind, place]

    def unmodified_s(self, profile: DeviceProfile) -> float:
        """Predicts the seconds of one unmodified step on this very device."""
        return self._frontier_of(self._kind(profile), profile)[0].step_s * profile.slowdown

    def step_s(self, profile: DeviceProfile, planned: DevicePlan) -> float:
        """Predicts the seconds of one step on this very device."""
        return planned.step_s * profile.slowdown

    def smaller_plans(self, profile: DeviceProfile, budget_bytes: int, count: int) -> list[DevicePlan]:
        """Returns up to ``count`` plans with lower peaks, evenly down to the smallest, for an elastic client."""
        lowest = self.smallest_bytes(profile)
        budgets = (budget_bytes - (budget_bytes - lowest) * i // count for i in range(1, count + 1))
        found: dict[int, DevicePlan] = {}
        for budget in budgets:
            planned = self.plan(profile, max(budget, lowest))
            if planned is not None:
                found.setdefault(planned.plan.peak_bytes, planned)
        return [found[peak] for peak in sorted(found, reverse=True)]

    def _kind(self, profile: DeviceProfile) -> str:
        """Makes a key that devices with the same plans share."""
        known = self._kinds.get(id(profile))
        if known is None:
            # the profile is kept with its key, so that no other profile gets its id
            known = self._kinds[id(profile)] = (profile, profile.kind.to_json())
        return known[1]

    def _frontier_of(self, kind: str, profile: DeviceProfile) -> tuple[Problem, PlanFrontier]:
        if kind not in self._frontiers:
            problem = problem_on(self.problem, self.work, profile)
            frontier = _build(problem, self.technique)
            top, low = frontier.points[0].peak_bytes, frontier.points[-1].peak_bytes
            steps = max(self.n_buckets - 1, 1)
            self._buckets[kind] = sorted({low + (top - low) * i // steps for i in range(steps + 1)})
            self._frontiers[kind] = (problem, frontier)
        return self._frontiers[kind]

    def _make(self, kind: str, frontier: PlanFrontier, budget_bytes: int) -> DevicePlan | None:
        problem = self._frontiers[kind][0]
        point = frontier.point_for(budget_bytes)
        if point is None:
            return None
        point = simulated(problem, point.actions)  # the simulator has the last word
        if point.peak_bytes > budget_bytes:
            return None
        plan = plan_of(problem, point, self.base, budget_bytes)
        return DevicePlan(plan, plan.to_json(), problem.step_s + point.overhead_s)


def _build(problem: Problem, technique: Technique) -> PlanFrontier:
    if technique is Technique.SAVE_ALL:
        return PlanFrontier((simulated(problem, {}),))
    if technique is Technique.RECOMPUTE:
        problem = without_codecs(problem)
    elif technique is Technique.COMPRESS:
        problem = without_recomputation(problem)
    return build_frontier(problem, max_error=MAX_ERROR, effort=FLEET_EFFORT)
