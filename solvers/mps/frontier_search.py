"""Memory saved per second: a heuristic that gives plans for every budget at once.

From keep-everything, moves of the most bytes freed at the peak per second of added delay lead down. Where that gets
stuck, coarse plans and plans of segments start below; from these and from the lowest plan found, moves that save the
most seconds per byte lead up. A price of the peak that falls step by step finds plans in which several moves only pay
together. Between two plans that are far apart, the gap is filled from both sides. The plans that no other one beats
form the ladder.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.solvers.base import Ladder, Rung, plan_error
from fxhybrid.solvers.mps.initial_plans import coarse_states, segment_states
from fxhybrid.solvers.mps.move_table import MoveTable
from fxhybrid.solvers.mps.neighbourhood import Choices
from fxhybrid.solvers.mps.plan_state import Footprints
from fxhybrid.solvers.mps.problem_tables import SAVED, State
from fxhybrid.solvers.mps.search import Descent, Point, by_peak, undominated

STEPS = 32  # of a walk from one end to the other
STEPS_DOWN = (0.95, 0.99, 0.999)  # of the peak, on the way to the lowest
PRICES = (3e-4, 6.0)  # seconds for the whole peak, relative to the step


@dataclass(frozen=True)
class Effort:
    """How much work a ladder may take; all are counts or ratios, none is a time.

    Attributes:
        moves: moves made or tried at most, and so many more for each op of the problem.
        price_step: each price of the peak, relative to the one before.
        error_prices: seconds that the whole error limit is worth, relative to the step; one sweep each.
        seeds: plans with small peaks that are followed down, beside the best coarse one.
        rungs: rungs kept at most; ``rung_ops`` bounds their number times the problem's ops.
        rung_step: neighbouring rungs differ by about so much in added time (plus 0.1 % of the step).
    """

    moves: tuple[int, float] = (11_500, 0.0)
    price_step: float = 1.3
    error_prices: tuple[float, ...] = (0.0, 0.02)
    seeds: int = 4
    rungs: int = 192
    rung_ops: int = 320_000
    rung_step: float = 1.02

    def rungs_for(self, problem: Problem) -> int:
        """Rungs that may be kept for ``problem``."""
        return min(self.rungs, max(24, self.rung_ops // max(len(problem.forward) + len(problem.backward), 1)))

    def work(self, problem: Problem) -> int:
        """Moves that may be made for ``problem``."""
        return self.moves[0] + int(self.moves[1] * (len(problem.forward) + len(problem.backward)))


def build_ladder(problem: Problem, *, max_error: float, effort: Effort | None = None) -> Ladder:
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
    return Ladder(_rungs(problem, base, climb.points, effort.rungs_for(problem)))


class _Climb:
    """The parts of a ladder's search and the points that they came by."""

    def __init__(self, search: Descent, effort: Effort, problem: Problem) -> None:
        self.search = search
        self.effort = effort
        self.step_s = problem.step_s
        self.work = effort.work(problem)
        self.points: list[Point] = [search.point()]

    def run(self, choices: Choices, max_error: float) -> None:
        """Every part gets a share of the work, so that a large problem still gets the most useful ones."""
        search = self.search
        self.add([SAVED] * len(search.base.state))
        for state in coarse_states(choices, max_error):
            self.add(state)
        coarse = self.smallest
        for state in segment_states(choices, max_error):
            self.add(state)
        seeds = [point for point in sorted(self.points, key=by_peak) if point is not coarse][: self.effort.seeds]
        self.grant(0.3)
        self.walk_down(self.points[0])
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
    def smallest(self) -> Point:
        """The point with the smallest peak so far."""
        return min(self.points, key=by_peak)

    def grant(self, share: float) -> None:
        """Allows a share of all work on top of what was allowed before; what one part leaves, the next may use."""
        self.search.stop_at += int(share * self.work)

    def add(self, state: State) -> Point | None:
        """Takes a state to the points, if it is a valid one."""
        if not self.search.stand_at(bytes(state), to_search=False):
            return None
        self.points.append(self.search.point())
        return self.points[-1]

    def lowest(self, starts: list[Point]) -> None:
        """Takes points as far down as moves lead."""
        search = self.search
        for start in starts:
            if search.tired:
                return
            search.stand_at(start.codes, to_search=False)
            for step in STEPS_DOWN:
                while search.descend(int(search.base.footprint().peak_bytes * step)):
                    pass
            self.points.append(search.point())

    def walk_down(self, start: Point) -> None:
        """From a point towards the smallest peak known, in even steps, until it gets stuck."""
        search = self.search
        high, low = start.mark.peak_bytes, self.smallest.mark.peak_bytes
        search.stand_at(start.codes)
        search.table.refresh()
        self.ensure(0.15)
        for target in (high - (high - low) * i // STEPS for i in range(1, STEPS + 1)):
            if not search.descend(target):
                return
            self.points.append(search.point())
            search.trim(target)
            self.points.append(search.point())

    def walk_up(self, start: Point) -> None:
        """From a point to the peak of the start, in even steps, taking back what is no longer needed."""
        search = self.search
        low, high = start.mark.peak_bytes, self.points[0].mark.peak_bytes
        search.stand_at(start.codes)
        self.ensure(0.05)
        for target in (low + (high - low) * i // STEPS for i in range(STEPS + 1)):
            search.trim(target)
            self.points.append(search.point())

    def ensure(self, share: float) -> None:
        """Allows at least a share of all work from here on: getting somewhere took moves of its own."""
        self.search.stop_at = max(self.search.stop_at, self.search.base.moves + int(share * self.work))

    def sweep(self) -> None:
        """From the smallest peak, with a falling price of the peak."""
        if self.search.tired:
            return
        self.search.stand_at(self.smallest.codes)
        highest = PRICES[1] * self.step_s / max(self.points[0].mark.peak_bytes, 1)
        for i in range(int(math.log(PRICES[1] / PRICES[0]) / math.log(self.effort.price_step)) + 1):
            self.search.relax(highest / self.effort.price_step**i)
            self.points.append(self.search.point())

    def refine(self) -> None:
        """Puts rungs between neighbours that are far apart, the widest gaps first."""
        floor = 1e-3 * self.step_s + 1e-30
        tried: set[tuple[int, int]] = set()
        while not self.search.tired:
            gaps = []
            for high, low in itertools.pairwise([self.points[0], *undominated(self.points)]):
                ratio = (low.mark.added_s + floor) / (high.mark.added_s + floor)
                if ratio > self.effort.rung_step and (high.mark.peak_bytes, low.mark.peak_bytes) not in tried:
                    gaps.append((ratio, high, low))
            if not gaps:
                return
            widest = sorted(gaps, key=lambda gap: -gap[0])[: max(8, len(gaps) // 2)]
            for _, high, low in sorted(widest, key=lambda gap: gap[1].mark.peak_bytes):
                if self.search.tired:
                    return
                tried.add((high.mark.peak_bytes, low.mark.peak_bytes))
                self.fill(high, low)

    def fill(self, high: Point, low: Point) -> None:
        """Looks for plans between two points from both sides."""
        search, points = self.search, self.points
        middle = (high.mark.peak_bytes + low.mark.peak_bytes) // 2
        search.stand_at(low.codes)
        for target in (middle, high.mark.peak_bytes - 1):
            search.trim(target, points)
            points.append(search.point())
        search.stand_at(high.codes)
        for target in (high.mark.peak_bytes - 1, middle, low.mark.peak_bytes):
            if search.descend(target):
                search.trim(target, points)
                points.append(search.point())


def _rungs(problem: Problem, base: Footprints, points: list[Point], limit: int) -> tuple[Rung, ...]:
    """The points that no other one beats, thinned to ``limit``."""
    best = [points[0], *undominated(points)]
    floor = 1e-3 * problem.step_s + 1e-30
    while len(best) > limit:
        costs = [point.mark.added_s + floor for point in best]
        losses = [after / cost for cost, after in itertools.pairwise(costs[1:])]
        del best[1 + losses.index(min(losses))]
    made: dict[bytes, Rung] = {}
    kept = {point.codes for point in best}
    for point in points:  # in the order in which they were found, as neighbours there have most in common
        if point.codes in kept and point.codes not in made:
            base.move(base.changes_to(point.codes))
            actions = base.actions()
            error = plan_error(problem, actions)
            made[point.codes] = Rung(actions, point.mark.peak_bytes, base.exact_added_s(), error)
    rungs: list[Rung] = []
    for rung in (made[point.codes] for point in best):
        if not rungs or (rung.peak_bytes < rungs[-1].peak_bytes and rung.added_s >= rungs[-1].added_s):
            rungs.append(rung)
    return tuple(rungs)
