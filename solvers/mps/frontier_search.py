"""Memory saved per second: a heuristic that finds plans for every budget at once.

Problem
    Find the Pareto frontier of peak bytes and overhead over all plans within an error limit.

Method
    Phases of local search (``PHASES``) share a budget of moves. Moves of the most bytes freed at the peak per second of
    overhead lead down from the save-all plan. Where that gets stuck, initial plans start below; from these and from the
    lowest plan found, moves that save most seconds per byte lead up. A Lagrange multiplier of the peak that falls step
    by step finds plans in which several moves only pay together. Between two plans that are far apart, the gap is
    filled from both sides. The plans that no other one dominates form the frontier. What each phase earns is measured
    in docs/adr/0015.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.solvers.base import FrontierPoint, PlanFrontier, plan_error
from fxhybrid.solvers.mps.initial_plans import coarse_plans, segment_plans
from fxhybrid.solvers.mps.move_table import MoveTable
from fxhybrid.solvers.mps.neighbourhood import Neighbourhood
from fxhybrid.solvers.mps.plan_state import PlanState
from fxhybrid.solvers.mps.problem_tables import SAVED, Codes, ProblemTables
from fxhybrid.solvers.mps.search import EvaluatedPlan, LocalSearch, by_peak, undominated

STEPS = 32  # of a walk from one end to the other
STEPS_DOWN = (0.95, 0.99, 0.999)  # of the peak, on the way to the lowest
MULTIPLIERS = (3e-4, 6.0)  # seconds that the whole peak of the save-all plan is worth, relative to the step
MULTIPLIER_STEP = 1.3  # each multiplier of a sweep, relative to the next one
ERROR_MULTIPLIER = 0.02  # seconds that the whole squared error limit is worth, relative to the step
FLOOR_SHARE = 1e-3  # of the step: overheads below that count as equal
POINT_STEP = 1.02  # neighbouring points differ by at most about so much in overhead and floor
MIN_GAPS = 8  # filled before gaps are listed anew
MIN_POINTS, MAX_POINT_OPS = 24, 320_000  # points that any frontier may keep; and its points times the problem's ops
WALK_DOWN_SHARE, WALK_UP_SHARE = 0.15, 0.05  # of the moves: kept for a walk itself after getting to its start


@dataclass(frozen=True)
class Effort:
    """How much work a frontier may take; all are counts, none is a time.

    Attributes:
        moves: moves made or tried at most.
        moves_per_op: and so many more for each op of the problem.
        initial_plans: initial plans that are followed down, in addition to the best coarse one.
        points: points kept at most.
    """

    moves: int = 11_500
    moves_per_op: float = 0.0
    initial_plans: int = 4
    points: int = 192

    def points_for(self, problem: Problem) -> int:
        """Returns how many points may be kept for ``problem``."""
        return min(self.points, max(MIN_POINTS, MAX_POINT_OPS // max(_n_ops(problem), 1)))

    def moves_for(self, problem: Problem) -> int:
        """Returns how many moves may be made for ``problem``."""
        return self.moves + int(self.moves_per_op * _n_ops(problem))


def build_frontier(problem: Problem, *, max_error: float, effort: Effort | None = None) -> PlanFrontier:
    """Finds plans for every budget.

    Args:
        problem: the step.
        max_error: limit of the root of the sum of squared lossy errors.
        effort: work limits.

    Raises:
        ProblemError: the problem is malformed.
    """
    check_problem(problem)
    search = FrontierSearch(problem, max_error, effort or Effort())
    search.run(PHASES)
    return search.frontier()


class FrontierSearch:
    """Holds one search for a frontier: the local search and all plans that it came by.

    Attributes:
        evaluated: plans within the error limit, the save-all plan first.
        coarse: the best coarse plan.
        initial: other initial plans to follow down.
    """

    def __init__(self, problem: Problem, max_error: float, effort: Effort) -> None:
        self.problem = problem
        self.max_error = max_error
        self.effort = effort
        self.state = PlanState(ProblemTables(problem))
        self.neighbourhood = Neighbourhood(self.state, max_error)
        self.search = LocalSearch(self.state, MoveTable(self.neighbourhood), max_error**2)
        self.moves = effort.moves_for(problem)
        self.evaluated: list[EvaluatedPlan] = [self.search.plan()]
        self.add([SAVED] * len(problem.tensors))
        self.coarse = self.smallest
        self.initial: list[EvaluatedPlan] = []

    def run(self, phases: Sequence[Phase]) -> None:
        """Runs phases; each gets a share of the moves, so that a large problem still gets the most useful ones."""
        limit2 = max(self.max_error, 1e-9) ** 2
        for phase in phases:
            self.search.error_multiplier_s = phase.error_multiplier * self.problem.step_s / limit2
            self.allow_moves(phase.share)
            phase.run(self)

    @property
    def smallest(self) -> EvaluatedPlan:
        """The plan with the smallest peak so far."""
        return min(self.evaluated, key=by_peak)

    def allow_moves(self, share: float) -> None:
        """Allows a share of all moves in addition to those before; what one phase leaves, the next may use."""
        self.search.move_limit += int(share * self.moves)

    def allow_at_least(self, share: float) -> None:
        """Allows at least a share of all moves from here on: getting somewhere took moves of its own."""
        self.search.move_limit = max(self.search.move_limit, self.state.n_applied + int(share * self.moves))

    def add(self, codes: Codes) -> None:
        """Adds a plan, if it is a valid one."""
        if self.search.go_to(bytes(codes), to_search=False):
            self.evaluated.append(self.search.plan())

    # -- phases --------------------------------------------------------------------------------------------

    def add_coarse(self) -> None:
        """Adds coarse plans."""
        for codes in coarse_plans(self.neighbourhood, self.max_error):
            self.add(codes)
        self.coarse = self.smallest
        self._choose_initial()

    def add_segments(self) -> None:
        """Adds plans of segments."""
        for codes in segment_plans(self.neighbourhood, self.max_error):
            self.add(codes)
        self._choose_initial()

    def _choose_initial(self) -> None:
        others = [plan for plan in sorted(self.evaluated, key=by_peak) if plan is not self.coarse]
        self.initial = others[: self.effort.initial_plans]

    def walk_down(self) -> None:
        """Goes from the save-all plan towards the smallest peak known, in even steps, until it gets stuck."""
        search = self.search
        high, low = self.evaluated[0].cost.peak_bytes, self.smallest.cost.peak_bytes
        search.go_to(self.evaluated[0].codes)
        search.table.refresh()
        self.allow_at_least(WALK_DOWN_SHARE)
        for target in (high - (high - low) * i // STEPS for i in range(1, STEPS + 1)):
            if not search.descend(target):
                return
            self.evaluated.append(search.plan())
            search.trim(target)
            self.evaluated.append(search.plan())

    def walk_up(self, start: EvaluatedPlan) -> None:
        """Goes from a plan to the peak of the save-all plan, in even steps, undoing what is no longer needed."""
        search = self.search
        low, high = start.cost.peak_bytes, self.evaluated[0].cost.peak_bytes
        search.go_to(start.codes)
        self.allow_at_least(WALK_UP_SHARE)
        for target in (low + (high - low) * i // STEPS for i in range(STEPS + 1)):
            search.trim(target)
            self.evaluated.append(search.plan())

    def lower(self, starts: Sequence[EvaluatedPlan]) -> None:
        """Takes plans as far down as moves lead."""
        search = self.search
        for start in starts:
            if search.exhausted:
                return
            search.go_to(start.codes, to_search=False)
            for step in STEPS_DOWN:
                while search.descend(int(self.state.cost().peak_bytes * step)):
                    pass
            self.evaluated.append(search.plan())

    def walk_up_from_smallest(self) -> None:
        """Walks up from the smallest peak, if any move is left."""
        if not self.search.exhausted:
            self.walk_up(self.smallest)

    def sweep(self) -> None:
        """Relaxes from the smallest peak at falling multipliers of the peak."""
        if self.search.exhausted:
            return
        self.search.go_to(self.smallest.codes)
        highest_s = MULTIPLIERS[1] * self.problem.step_s / max(self.evaluated[0].cost.peak_bytes, 1)
        for i in range(int(math.log(MULTIPLIERS[1] / MULTIPLIERS[0]) / math.log(MULTIPLIER_STEP)) + 1):
            self.search.relax(highest_s / MULTIPLIER_STEP**i)
            self.evaluated.append(self.search.plan())

    def fill_gaps(self) -> None:
        """Puts plans between neighbours that are far apart, the widest gaps first."""
        floor_s = _floor_s(self.problem)
        tried: set[tuple[int, int]] = set()
        while not self.search.exhausted:
            gaps = []
            for high, low in itertools.pairwise([self.evaluated[0], *undominated(self.evaluated)]):
                ratio = (low.cost.overhead_s + floor_s) / (high.cost.overhead_s + floor_s)
                if ratio > POINT_STEP and (high.cost.peak_bytes, low.cost.peak_bytes) not in tried:
                    gaps.append((ratio, high, low))
            if not gaps:
                return
            widest = sorted(gaps, key=lambda gap: -gap[0])[: max(MIN_GAPS, len(gaps) // 2)]
            for _, high, low in sorted(widest, key=lambda gap: gap[1].cost.peak_bytes):
                if self.search.exhausted:
                    return
                tried.add((high.cost.peak_bytes, low.cost.peak_bytes))
                self.fill(high, low)

    def fill(self, high: EvaluatedPlan, low: EvaluatedPlan) -> None:
        """Searches for plans between two plans from both sides."""
        search, evaluated = self.search, self.evaluated
        middle = (high.cost.peak_bytes + low.cost.peak_bytes) // 2
        search.go_to(low.codes)
        for target in (middle, high.cost.peak_bytes - 1):
            search.trim(target, evaluated)
            evaluated.append(search.plan())
        search.go_to(high.codes)
        for target in (high.cost.peak_bytes - 1, middle, low.cost.peak_bytes):
            if search.descend(target):
                search.trim(target, evaluated)
                evaluated.append(search.plan())

    # -- result --------------------------------------------------------------------------------------------

    def frontier(self) -> PlanFrontier:
        """Returns the plans that no other one dominates, thinned to those that the effort allows."""
        best = self._thinned([self.evaluated[0], *undominated(self.evaluated)])
        made: dict[bytes, FrontierPoint] = {}
        wanted = {plan.codes for plan in best}
        for plan in self.evaluated:  # in the order in which they were found, as neighbours there have most in common
            if plan.codes in wanted and plan.codes not in made:
                self.state.apply(self.state.changes_to(plan.codes))
                actions = self.state.actions()
                error = plan_error(self.problem, actions)
                made[plan.codes] = FrontierPoint(actions, plan.cost.peak_bytes, self.state.exact_overhead_s(), error)
        points: list[FrontierPoint] = []
        for point in (made[plan.codes] for plan in best):
            if not points or (point.peak_bytes < points[-1].peak_bytes and point.overhead_s >= points[-1].overhead_s):
                points.append(point)
        return PlanFrontier(tuple(points))

    def _thinned(self, best: list[EvaluatedPlan]) -> list[EvaluatedPlan]:
        """Leaves out the points whose next one costs least more, until few enough are left."""
        floor_s = _floor_s(self.problem)
        while len(best) > self.effort.points_for(self.problem):
            costs_s = [plan.cost.overhead_s + floor_s for plan in best]
            losses = [after / cost for cost, after in itertools.pairwise(costs_s[1:])]
            del best[1 + losses.index(min(losses))]
        return best


@dataclass(frozen=True)
class Phase:
    """One phase of the search.

    Attributes:
        name: what it does.
        share: of all moves, in addition to what earlier phases left.
        run: the phase.
        error_multiplier: seconds that the squared error limit is worth meanwhile, relative to the step.
    """

    name: str
    share: float
    run: Callable[[FrontierSearch], None]
    error_multiplier: float = 0.0


def _from_coarse(search: FrontierSearch) -> None:
    search.lower([search.coarse])
    search.walk_up(search.coarse)


# In the order in which they run; docs/adr/0015 says what each earns.
PHASES = (
    Phase("coarse plans", 0.0, FrontierSearch.add_coarse),
    Phase("segment plans", 0.0, FrontierSearch.add_segments),
    Phase("walk down", 0.3, FrontierSearch.walk_down),
    Phase("down and up from coarse", 0.1, _from_coarse),
    Phase("down from initial plans", 0.15, lambda search: search.lower(search.initial)),
    Phase("walk up", 0.1, FrontierSearch.walk_up_from_smallest),
    Phase("multiplier sweep", 0.075, FrontierSearch.sweep),
    Phase("down from the sweep", 0.025, lambda search: search.lower([search.smallest])),
    Phase("error multiplier sweep", 0.075, FrontierSearch.sweep, ERROR_MULTIPLIER),
    Phase("down from the error sweep", 0.025, lambda search: search.lower([search.smallest]), ERROR_MULTIPLIER),
    Phase("fill gaps", 0.15, FrontierSearch.fill_gaps),
)


def _floor_s(problem: Problem) -> float:
    return FLOOR_SHARE * problem.step_s + 1e-30


def _n_ops(problem: Problem) -> int:
    return len(problem.forward) + len(problem.backward)
