"""Memory saved per second: a heuristic that gives plans for every budget at once.

From keep-everything it takes, again and again, the move that frees the most bytes at the peak per second of
added delay, then takes back what became unnecessary. A second family of plans starts from the other end:
everything small, and then back up. The plans that no other one beats form the ladder.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fxhybrid.plan import Action, Actions
from fxhybrid.problem import CodecOption, Problem
from fxhybrid.solvers.base import SolveResult, Status, plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.choices import Choices
from fxhybrid.solvers.descent import Descent, Point
from fxhybrid.solvers.footprint import Footprints
from fxhybrid.solvers.grid import SAVED, State
from fxhybrid.solvers.moves import MoveTable
from fxhybrid.solvers.seeds import seed_states
from fxhybrid.timeline import simulate_actions


@dataclass(frozen=True)
class Rung:
    """One plan of the ladder, with its simulated figures."""

    actions: Actions
    peak_bytes: int
    added_s: float
    error: float


@dataclass(frozen=True)
class Ladder:
    """Plans from keep-everything to the smallest peak found: the peak falls, the added time never does."""

    rungs: tuple[Rung, ...]

    def rung_for(self, budget_bytes: int) -> Rung | None:
        """The cheapest plan with a peak of at most ``budget_bytes``."""
        place = bisect_left(self.rungs, -budget_bytes, key=lambda rung: -rung.peak_bytes)
        return self.rungs[place] if place < len(self.rungs) else None


@dataclass(frozen=True)
class Effort:
    """How much work a ladder may take; all are counts or ratios, none is a time.

    Attributes:
        step: each target peak of the way down, relative to the one before.
        shakes: tries per target to take back dear actions and go down another way.
        seeds: coarse plans followed up.
        op_measurements: measurements times ops of the problem (one measurement costs more with more ops).
        both_starts: with at most so many candidates, go down from both forms of keep-everything.
        rungs: rungs kept at most.
        error_prices: seconds that the whole error limit is worth, relative to the step; one way down each.
    """

    step: float = 0.975
    shakes: int = 1
    seeds: int = 3
    op_measurements: int = 600_000
    both_starts: int = 100
    rungs: int = 64
    error_prices: tuple[float, ...] = (0.02, 0.0)

    def measurements(self, problem: Problem) -> int:
        """Plans that may be measured for ``problem``."""
        return min(max(self.op_measurements // max(len(problem.forward) + len(problem.backward), 1), 60), 2500)


def build_ladder(
    problem: Problem,
    *,
    max_error: float,
    allow: Callable[[CodecOption], bool] = lambda option: True,
    recompute: bool = True,
    effort: Effort | None = None,
) -> Ladder:
    """Plans for every budget.

    Args:
        problem: the step.
        max_error: limit of the root of the sum of squared lossy errors.
        allow: which codec options may be used.
        recompute: whether ops may run again (ops that only serve backward still run there).
        effort: work limits.
    """
    effort = effort or Effort()
    base = Footprints(problem)
    choices = Choices(base, max_error, allow, recompute)
    search = Descent(base, MoveTable(choices), max_error**2)
    first = search.measure(base.default)
    assert first is not None
    search.points.append(first)
    share = effort.measurements(problem) // (2 + 2 * len(effort.error_prices))
    prices = [price * problem.step_s / max(max_error, 1e-9) ** 2 for price in effort.error_prices]
    # Shares of the work, so that a large problem still gets every part of its ladder.
    search.error_price_s, search.work = prices[0], share
    lowest = _lowest(search, seed_states(choices, max_error), effort)
    kept = search.measure([SAVED] * len(base.default))
    search.points += [] if kept is None else [kept]
    start = _start(first, kept)
    low = [] if lowest is None else [lowest]
    for price in prices:
        search.error_price_s = price
        search.work += 2 * share
        low.append(_way_down(search, start, effort))
    other = kept if start is first else first
    if other is not None and len(choices.codes) <= effort.both_starts:
        low.append(_way_down(search, other, effort))
    search.work += share
    for point in sorted(low, key=lambda p: p.mark.peak_bytes)[:2]:
        _way_up(search, point, effort)
    return Ladder(_rungs(problem, base, search.points, effort.rungs))


def _start(first: Point, kept: Point | None) -> Point:
    """Keep-everything, or the same with masks kept too if that is lower and adds no time.

    Made in the backward pass a mask is free, but it holds its source until then.
    """
    if kept is None or kept.mark.added_s > 0.0 or kept.mark.peak_bytes >= first.mark.peak_bytes:
        return first
    return kept


def _way_down(search: Descent, point: Point, effort: Effort) -> Point:
    """Rung by rung down from keep-everything; gives the lowest point."""
    search.table.refresh(point.state, point.mark)
    turn = 0
    while True:
        target = int(point.mark.peak_bytes * effort.step)
        lower = search.descend(point, target)
        if lower is None:
            search.points.append(search.last)
            return search.last
        point = search.trim(lower, target)
        for _ in range(effort.shakes):
            point = search.shake(point, target, turn)
            turn += 1
        search.points.append(point)


def _lowest(search: Descent, states: Iterable[State], effort: Effort) -> Point | None:
    """The best of the coarse plans, taken as far down as single moves lead."""
    measured = [found for state in states if (found := search.measure(state)) is not None]
    search.points += measured
    best: Point | None = None
    for start in sorted(measured, key=lambda p: p.mark.peak_bytes)[: effort.seeds]:
        point: Point | None = start
        search.table.refresh(start.state, start.mark)
        while point is not None:
            point = search.descend(point, int(point.mark.peak_bytes * 0.99))
        point = search.last
        search.points.append(point)
        if best is None or point.mark.peak_bytes < best.mark.peak_bytes:
            best = point
    return best


def _way_up(search: Descent, point: Point, effort: Effort) -> None:
    """From a low point back up, taking back the dearest actions as the target rises."""
    search.table.refresh(point.state, point.mark)
    target = point.mark.peak_bytes
    while point.mark.added_s > 0 and search.work > 0 and target < search.points[0].mark.peak_bytes:
        point = search.trim(point, target)
        search.points.append(point)
        target = int(target / effort.step) + 1


def _rungs(problem: Problem, base: Footprints, points: list[Point], limit: int) -> tuple[Rung, ...]:
    """The points that no other one beats, thinned to ``limit``, judged by the simulator."""
    best: list[Point] = []
    for point in sorted(points[1:], key=lambda p: (p.mark.added_s, p.mark.peak_bytes, p.mark.error2)):
        if point.mark.peak_bytes < min(points[0].mark.peak_bytes, best[-1].mark.peak_bytes if best else 1 << 62):
            best.append(point)
    while len(best) > limit:
        peaks = [points[0].mark.peak_bytes, *(p.mark.peak_bytes for p in best)]
        gaps = [peaks[i] / max(peaks[i + 2], 1) for i in range(len(best) - 1)]
        del best[gaps.index(min(gaps))]
    rungs = [_judge(problem, base.actions(p.state, p.mark.needed)) for p in (points[0], *best)]
    kept: list[Rung] = rungs[:1]
    for rung in rungs[1:]:
        if rung.peak_bytes < kept[-1].peak_bytes and rung.added_s >= kept[-1].added_s:
            kept.append(rung)
    return tuple(kept)


def _judge(problem: Problem, actions: dict[int, Action]) -> Rung:
    line = simulate_actions(problem, actions)
    return Rung(actions, line.peak_bytes, line.added_s, plan_error(problem, actions))


@dataclass
class MpsSolver:
    """Looks budgets up in a problem's ladder, which is built at the first call."""

    allow: Callable[[CodecOption], bool] = lambda option: True
    recompute: bool = True
    _ladders: dict[tuple[int, float], tuple[Problem, Ladder]] = field(default_factory=dict, repr=False)

    def ladder(self, problem: Problem, max_error: float) -> Ladder:
        """The problem's ladder, from the cache if it was built before."""
        key = (id(problem), max_error)
        if key not in self._ladders:
            built = build_ladder(problem, max_error=max_error, allow=self.allow, recompute=self.recompute)
            # the problem is kept beside its ladder, so that its id stays taken
            self._ladders[key] = (problem, built)
        return self._ladders[key][1]

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """The cheapest rung within the budget; see ``Solver``."""
        started = time.perf_counter()
        ladder = self.ladder(problem, max_error)
        rung = ladder.rung_for(budget_bytes)
        if rung is not None:
            status = Status.OPTIMAL if rung.added_s <= 0.0 else Status.FEASIBLE
        else:
            rung = ladder.rungs[-1]
            infeasible = budget_bytes < peak_lower_bound(problem)[0]
            status = Status.INFEASIBLE if infeasible else Status.UNKNOWN
        return SolveResult(
            status,
            rung.actions,
            rung.peak_bytes,
            rung.added_s,
            0.0,
            rung.error,
            "mps",
            time.perf_counter() - started,
            {"rungs": len(ladder.rungs)},
        )
