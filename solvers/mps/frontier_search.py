"""Memory saved per second: a heuristic that gives plans for every budget at once.

From keep-everything, moves of the most bytes freed at the peak per second of added delay lead down. Where that gets
stuck, coarse plans and plans of segments start below; from these and from the lowest plan found, moves that save the
most seconds per byte lead up. A price of the peak that falls step by step finds plans in which several moves only pay
together. Between two plans that are far apart, the gap is filled from both sides. The plans that no other one beats
form the frontier.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.solvers.base import FrontierPoint, PlanFrontier, plan_error
from fxhybrid.solvers.mps.initial_plans import coarse_states, segment_states
from fxhybrid.solvers.mps.move_table import MoveTable
from fxhybrid.solvers.mps.neighbourhood import Choices
from fxhybrid.solvers.mps.plan_state import Footprints
from fxhybrid.solvers.mps.problem_tables import SAVED, State
from fxhybrid.solvers.mps.search import Descent, EvaluatedPlan, by_peak, undominated

STEPS = 32  # of a walk from one end to the other
STEPS_DOWN = (0.95, 0.99, 0.999)  # of the peak, on the way to the lowest
PRICES = (3e-4, 6.0)  # seconds for the whole peak, relative to the step


@dataclass(frozen=True)
class Effort:
    """How much work a frontier may take; all are counts or ratios, none is a time.

    Attributes:
        moves: moves made or tried at most, and so many more for each op of the problem.
        price_step: each price of the peak, relative to the one before.
        error_prices: seconds that the whole error limit is worth, relative to the step; one sweep each.
        seeds: plans with small peaks that are followed down, beside the best coarse one.
        points: points kept at most; ``point_ops`` bounds their number times the problem's ops.
        point_step: neighbouring points differ by about so much in added time (plus 0.1 % of the step).
    """

    moves: tuple[int, float] = (11_500, 0.0)
    price_step: float = 1.3
    error_prices: tuple[float, ...] = (0.0, 0.02)
    seeds: int = 4
    points: int = 192
    point_ops: int = 320_000
    point_step: float = 1.02

    def points_for(self, problem: Problem) -> int:
        """Points that may be kept for ``problem``."""
        return min(self.points, max(24, self.point_ops // max(len(problem.forward) + len(problem.backward), 1)))

    def work(self, problem: Problem) -> int:
        """Moves that may be made for ``problem``."""
        return self.moves[0] + int(self.moves[1] * (len(problem.forward) + len(problem.backward)))


def build_frontier(problem: Problem, *, max_error: float, effort: Effort | None = None) -> PlanFrontier:
    """Plans for every budget.

    Args:
        problem: the step.
        max_error: limit of the root of the sum of squared lossy errors.
        effort: work limits.

    Raises:
        ProblemError: the problem is malformed.
    """
    check_problem(problem)
    effort = effort or Effort()
    base = Footprints(problem)
    choices = Choices(base, max_error)
    search = Descent(base, MoveTable(choices), max_error**2)
    climb = _Climb(search, effort, problem)
    climb.run(choices, max_error)
    return PlanFrontier(_points_of(problem, base, climb.evaluated, effort.points_for(problem)))


class _Climb:
    """The parts of a frontier's search and the points that they came by."""

    def __init__(self, search: Descent, effort: Effort, problem: Problem) -> None:
        self.search = search
        self.effort = effort
        self.step_s = problem.step_s
        self.work = effort.work(problem)
        self.evaluated: list[EvaluatedPlan] = [search.plan()]

    def run(self, choices: Choices, max_error: float) -> None:
        """Every part gets a share of the work, so that a large problem still gets the most useful ones."""
        search = self.search
        self.add([SAVED] * len(search.base.state))
        for state in coarse_states(choices, max_error):
            self.add(state)
        coarse = self.smallest
        for state in segment_states(choices, max_error):
            self.add(state)
        seeds = [plan for plan in sorted(self.evaluated, key=by_peak) if plan is not coarse][: self.effort.seeds]
        self.grant(0.3)
        self.walk_down(self.evaluated[0])
        self.grant(0.1)
        self.lowest([coarse])
        self.walk_up(coarse)
        self.grant(0.15)
        self.lowest(seeds)
        self.grant(0.1)
        if not search.tired:
            self.walk_up(self.smallest)
        limit2 = max(max_error, 1e-9) ** 2
        for price in self.effort.error_prices:
            search.error_price_s = price * self.step_s / limit2
            self.grant(0.15 / len(self.effort.error_prices))
            self.sweep()
            self.grant(0.05 / len(self.effort.error_prices))
            self.lowest([self.smallest])
        search.error_price_s = 0.0
        self.grant(0.15)
        self.refine()

    @property
    def smallest(self) -> EvaluatedPlan:
        """The point with the smallest peak so far."""
        return min(self.evaluated, key=by_peak)

    def grant(self, share: float) -> None:
        """Allows a share of all work on top of what was allowed before; what one part leaves, the next may use."""
        self.search.stop_at += int(share * self.work)

    def add(self, state: State) -> EvaluatedPlan | None:
        """Takes a state to the points, if it is a valid one."""
        if not self.search.stand_at(bytes(state), to_search=False):
            return None
        self.evaluated.append(self.search.plan())
        return self.evaluated[-1]

    def lowest(self, starts: list[EvaluatedPlan]) -> None:
        """Takes points as far down as moves lead."""
        search = self.search
        for start in starts:
            if search.tired:
                return
            search.stand_at(start.codes, to_search=False)
            for step in STEPS_DOWN:
                while search.descend(int(search.base.footprint().peak_bytes * step)):
                    pass
            self.evaluated.append(search.plan())

    def walk_down(self, start: EvaluatedPlan) -> None:
        """From a point towards the smallest peak known, in even steps, until it gets stuck."""
        search = self.search
        high, low = start.cost.peak_bytes, self.smallest.cost.peak_bytes
        search.stand_at(start.codes)
        search.table.refresh()
        self.ensure(0.15)
        for target in (high - (high - low) * i // STEPS for i in range(1, STEPS + 1)):
            if not search.descend(target):
                return
            self.evaluated.append(search.plan())
            search.trim(target)
            self.evaluated.append(search.plan())

    def walk_up(self, start: EvaluatedPlan) -> None:
        """From a point to the peak of the start, in even steps, taking back what is no longer needed."""
        search = self.search
        low, high = start.cost.peak_bytes, self.evaluated[0].cost.peak_bytes
        search.stand_at(start.codes)
        self.ensure(0.05)
        for target in (low + (high - low) * i // STEPS for i in range(STEPS + 1)):
            search.trim(target)
            self.evaluated.append(search.plan())

    def ensure(self, share: float) -> None:
        """Allows at least a share of all work from here on: getting somewhere took moves of its own."""
        self.search.stop_at = max(self.search.stop_at, self.search.base.moves + int(share * self.work))

    def sweep(self) -> None:
        """From the smallest peak, with a falling price of the peak."""
        if self.search.tired:
            return
        self.search.stand_at(self.smallest.codes)
        highest = PRICES[1] * self.step_s / max(self.evaluated[0].cost.peak_bytes, 1)
        for i in range(int(math.log(PRICES[1] / PRICES[0]) / math.log(self.effort.price_step)) + 1):
            self.search.relax(highest / self.effort.price_step**i)
            self.evaluated.append(self.search.plan())

    def refine(self) -> None:
        """Puts points between neighbours that are far apart, the widest gaps first."""
        floor = 1e-3 * self.step_s + 1e-30
        tried: set[tuple[int, int]] = set()
        while not self.search.tired:
            gaps = []
            for high, low in itertools.pairwise([self.evaluated[0], *undominated(self.evaluated)]):
                ratio = (low.cost.overhead_s + floor) / (high.cost.overhead_s + floor)
                if ratio > self.effort.point_step and (high.cost.peak_bytes, low.cost.peak_bytes) not in tried:
                    gaps.append((ratio, high, low))
            if not gaps:
                return
            widest = sorted(gaps, key=lambda gap: -gap[0])[: max(8, len(gaps) // 2)]
            for _, high, low in sorted(widest, key=lambda gap: gap[1].cost.peak_bytes):
                if self.search.tired:
                    return
                tried.add((high.cost.peak_bytes, low.cost.peak_bytes))
                self.fill(high, low)

    def fill(self, high: EvaluatedPlan, low: EvaluatedPlan) -> None:
        """Looks for plans between two points from both sides."""
        search, evaluated = self.search, self.evaluated
        middle = (high.cost.peak_bytes + low.cost.peak_bytes) // 2
        search.stand_at(low.codes)
        for target in (middle, high.cost.peak_bytes - 1):
            search.trim(target, evaluated)
            evaluated.append(search.plan())
        search.stand_at(high.codes)
        for target in (high.cost.peak_bytes - 1, middle, low.cost.peak_bytes):
            if search.descend(target):
                search.trim(target, evaluated)
                evaluated.append(search.plan())


def _points_of(
    problem: Problem, base: Footprints, evaluated: list[EvaluatedPlan], limit: int
) -> tuple[FrontierPoint, ...]:
    """The points that no other one beats, thinned to ``limit``."""
    best = [evaluated[0], *undominated(evaluated)]
    floor = 1e-3 * problem.step_s + 1e-30
    while len(best) > limit:
        costs = [plan.cost.overhead_s + floor for plan in best]
        losses = [after / cost for cost, after in itertools.pairwise(costs[1:])]
        del best[1 + losses.index(min(losses))]
    made: dict[bytes, FrontierPoint] = {}
    kept = {plan.codes for plan in best}
    for plan in evaluated:  # in the order in which they were found, as neighbours there have most in common
        if plan.codes in kept and plan.codes not in made:
            base.move(base.changes_to(plan.codes))
            actions = base.actions()
            error = plan_error(problem, actions)
            made[plan.codes] = FrontierPoint(actions, plan.cost.peak_bytes, base.exact_overhead_s(), error)
    points: list[FrontierPoint] = []
    for point in (made[plan.codes] for plan in best):
        if not points or (point.peak_bytes < points[-1].peak_bytes and point.overhead_s >= points[-1].overhead_s):
            points.append(point)
    return tuple(points)
