"""The objective of ``IlpSolver``: the fewest added seconds within a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fxhybrid.ir.plan import GAP_FLOOR_SHARE, Action, Actions, relative_gap
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.ilp.action_columns import COST_SCALE
from fxhybrid.solvers.ilp.cutting_planes import Effort, MasterProgram, SimulatedPlan, Stopwatch
from fxhybrid.solvers.ilp.program_points import ProgramPoint, program_points_of

LOOSE_GAP = 0.05  # of the rounds that only find out which rows matter
LOOSE_TIME = 1 / 16  # of what is left: without the rows there is no use in searching long
ROUND_GAP = 0.5  # of the gap asked for: the backend's own tolerances take the rest
LAST_GAP = 0.25  # of the gap asked for, once all rows are known
SMALL = 16  # decided tensors up to which a wrong plan is forbidden rather than its row tightened


@dataclass
class Incumbents:
    """Collects the best plan, the plan of the smallest peak and the bound, over all programs of one solve.

    Attributes:
        problem: the step.
        budget_bytes: limit of the peak.
        max_error: limit of the error.
        best: cheapest plan within both limits.
        smallest: plan of the smallest peak within the error limit.
        bound_s: no plan within both limits adds less.
        impossible: whether it is proven that there is none.
    """

    problem: Problem
    budget_bytes: int
    max_error: float
    best: SimulatedPlan | None = None
    smallest: SimulatedPlan | None = None
    bound_s: float = 0.0
    impossible: bool = False

    def take(self, plan: SimulatedPlan) -> bool:
        """Remembers a plan if it is better; returns whether its error is within the limit."""
        if plan.error > self.max_error:
            return False
        cheaper = self.best is None or plan.overhead_s < self.best.overhead_s
        if cheaper and plan.peak_bytes <= self.budget_bytes:
            self.best = plan
        if self.smallest is None or plan.peak_bytes < self.smallest.peak_bytes:
            self.smallest = plan
        return True

    def cutoff_s(self) -> float:
        """Returns the seconds that the best plan adds; infinity without one."""
        return self.best.overhead_s if self.best else math.inf

    def gap(self) -> float:
        """Returns the gap of the best plan; infinity without one."""
        if self.best is None:
            return math.inf
        added_s = self.best.overhead_s
        return relative_gap(added_s, min(self.bound_s, added_s), self.problem.step_s)


class LeastTime:
    """Minimises the added seconds: program points above the budget are violated.

    Rounds with a loose gap find out which rows matter; once a plan fits the budget, rounds have the true gap. Where
    all violated program points have their rows, these undercount (pruned tensors, two decodes in one batch). A small
    program then forbids just that plan, which keeps every bound true. A large one first keeps room for the saved pruned
    tensors, then lowers the row's room; the bound from before remains until the rows get it back at the end.

    Attributes:
        exhausted: whether the program ended up without any plan while there was time left.
    """

    def __init__(self, master: MasterProgram, incumbents: Incumbents, gap: float, watch: Stopwatch) -> None:
        self.exhausted = False
        self._master = master
        self._known = incumbents
        self._gap = gap
        self._watch = watch
        self._loose = True
        self._bound_valid = True  # whether the program as it is bounds the problem
        self._bound_invalid = False  # whether it never will again

    def closed(self) -> bool:
        """Returns whether the gap is reached."""
        return self._known.gap() <= self._gap

    def effort(self) -> Effort:
        """Returns the loose or the true gap."""
        if self._loose:
            return _effort(LOOSE_GAP, LOOSE_TIME)
        return _effort(ROUND_GAP * self._gap)

    def start(self) -> Actions | None:
        """Returns the best plan."""
        return self._known.best.actions if self._known.best else None

    def take_bound(self, bound: float) -> None:
        """Takes in a bound, as far as it is one for the problem."""
        if not self._bound_valid:
            return
        known, model = self._known, self._master.model
        if bound == math.inf:
            # Nothing is left: no plan at all, or none but those simulated.
            known.impossible = known.best is None
            known.bound_s = known.best.overhead_s if known.best else known.bound_s
        elif math.isfinite(bound):
            known.bound_s = max(known.bound_s, bound * model.unit_s)

    def limit_bytes(self) -> float:
        """Returns the budget."""
        return self._known.budget_bytes

    def take_plan(self, plan: SimulatedPlan) -> bool:
        """Remembers a plan; returns whether its error is within the limit."""
        return self._known.take(plan)

    def stops_without_solution(self) -> bool:
        """Goes on with the true gap after a loose solve, and stops after a true one."""
        if self._loose:
            self._loose = False
            return False
        self.exhausted = self._watch.left_s() > 0
        return True

    def stops_without_cuts(self, found: dict[int, Action], plan: SimulatedPlan) -> bool:
        """Stops at a plan that fits, found with the true gap; rules out one that the rows allow and that does not."""
        within_error = plan.error <= self._known.max_error
        if within_error and plan.peak_bytes <= self._known.budget_bytes:
            stops, self._loose = not self._loose, False
            return stops
        presolved = self._master.model.presolved
        if not within_error or (len(presolved.decided) <= SMALL and not presolved.pruned):
            self._master.forbid(found)
            # With pruned tensors the plan forbidden represents others, too, that may fit.
            self._bound_invalid |= presolved.pruned
            self._bound_valid &= not self._bound_invalid
        else:
            self._tighten(found, plan)
        return False

    def _tighten(self, found: dict[int, Action], plan: SimulatedPlan) -> None:
        master = self._master
        master.count("tightened")
        self._bound_valid = False
        if master.rows.keep_room_for_pruned():
            return
        program_points = program_points_of(self._known.problem, plan.schedule)
        excess = plan.timeline.during_bytes - self._known.budget_bytes
        over: dict[ProgramPoint, int] = {}
        for at in np.flatnonzero(excess > 0).tolist():
            over[program_points[at]] = max(int(excess[at]), over.get(program_points[at], 0))
        changed = [master.rows.tighten(at, by) for at, by in over.items() if at in master.rows.rows]
        if not any(changed):
            master.model.forbid(found, master.model.presolved.decided)
            self._bound_invalid = True

    def finish(self) -> None:
        """Bounds the problem once more with all rows found, if these were tightened on the way."""
        if self._master.model.program.contradiction and self._bound_valid and not self.exhausted:
            self._known.impossible = True
        if self.needs_pruned() or self._bound_valid or self._bound_invalid:
            return
        if self._known.best is not None and not self.closed():
            self._bound_valid = True
            self._master.rows.release()
            if (left_s := self._watch.left_s()) > 0:
                self.take_bound(self._master.solve(self.start(), _effort(LAST_GAP * self._gap), left_s).bound)

    def needs_pruned(self) -> bool:
        """Returns whether not the rows are at fault but what is pruned: it has to be decided."""
        return self.exhausted and self._master.model.presolved.pruned and not self._bound_valid


def _effort(gap: float, time_share: float = 1.0) -> Effort:
    return Effort(gap, gap * GAP_FLOOR_SHARE * COST_SCALE, time_share)
