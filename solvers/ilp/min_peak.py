"""The smallest peak that any plan reaches, by integer programming.

Problem
    Choose one action per candidate tensor so that the step's highest program point is as low as possible.

Data
    P_low, P_high   a peak that no plan goes below; the peak of a known plan
    all else        as in ``model``, without pruning and without a limit on seconds

Variables
    z               share of the way from P_low to P_high
    all else        as in ``model``

Model
    minimise   z
    all rows of ``model``, and memory rows as lazy constraints with P_low + (P_high - P_low) z as their budget

Rows are separated where the plan found is higher than the program's own value of its peak. Every plan gives a point of
the program that is no higher, so the program's bound is one for the peak. A plan whose peak the rows undercount is
noted with its true peak and forbidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxhybrid.ir.plan import Action, Actions
from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.solvers.bounds import holder_in_words, peak_lower_bound
from fxhybrid.solvers.ilp.action_columns import COST_SCALE
from fxhybrid.solvers.ilp.cutting_planes import (
    START_SHARE,
    Effort,
    MasterProgram,
    SimulatedPlan,
    Stopwatch,
    run_cutting_planes,
    simulated_plan,
)
from fxhybrid.solvers.ilp.memory_rows import MemoryRows
from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import presolve
from fxhybrid.units import format_bytes

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Literal

ROUNDS = 400
ROUNDING = 1e-6  # what the backend's tolerances may hide, of the way from P_low to P_high


@dataclass(frozen=True)
class MinPeak:
    """Holds the smallest peak found, and what no plan goes below.

    Attributes:
        actions: the plan of the smallest peak.
        peak_bytes: its simulated peak.
        lower_bound_bytes: no plan within the error limit peaks below, if it makes each tensor at most once more.
        holder: the step and the tensors that hold the peak, in words.
        solve_s: seconds spent.
        details: counts worth reporting.
    """

    actions: Mapping[int, Action]
    peak_bytes: int
    lower_bound_bytes: int
    holder: str
    solve_s: float
    details: Mapping[str, float]

    @property
    def proven(self) -> bool:
        """Whether no plan peaks lower, by more than the backend's tolerances (one part in a million)."""
        return self.lower_bound_bytes >= self.peak_bytes * (1 - ROUNDING)

    def __str__(self) -> str:
        peak, bound = (f"{n} bytes ({format_bytes(n)})" for n in (self.peak_bytes, self.lower_bound_bytes))
        if self.proven:
            return f"the smallest reachable peak is {peak}, held by {self.holder}"
        return (
            f"no plan that makes each tensor at most once more peaks below {bound}; the lowest found peaks at {peak}, "
            f"held by {self.holder}"
        )


class MinPeakSolver:
    """Finds the smallest reachable peak.

    Args:
        time_limit_s: seconds for one ``solve``; what is known then is given.
    """

    def __init__(self, *, time_limit_s: float = 15.0) -> None:
        self.time_limit_s = time_limit_s

    def solve(self, problem: Problem, *, max_error: float, warm_start: Actions | None = None) -> MinPeak:
        """Finds the smallest peak; ``warm_start`` is a known plan within the error limit.

        Raises:
            ProblemError: the problem is malformed.
            PlanError: ``warm_start`` is no plan of this problem.
        """
        watch = Stopwatch(self.time_limit_s)
        check_problem(problem)
        default, known = simulated_plan(problem, {}), simulated_plan(problem, warm_start or {})
        start = known if known.peak_bytes < default.peak_bytes else default
        low_bytes = peak_lower_bound(problem)[0]
        counts = {"rounds": 0, "rows": 0, "nodes": 0, "forbidden": 0}
        best, bound_bytes = start, float(low_bytes)
        if start.peak_bytes > low_bytes:
            model = IlpModel(problem, presolve(problem, max_error), max_error)
            master, objective = _master(model, low_bytes, start, max_error, counts)
            for plan in (start, default):
                master.separate(plan, START_SHARE * start.peak_bytes)
            run_cutting_planes(master, objective, watch)
            best, bound_bytes = objective.best, objective.bound_bytes()
        bound = math.ceil(min(bound_bytes, best.peak_bytes) - ROUNDING * (start.peak_bytes - low_bytes))
        return MinPeak(
            actions=dict(best.actions),
            peak_bytes=best.peak_bytes,
            lower_bound_bytes=max(bound, low_bytes),
            holder=holder_in_words(problem, best.schedule, best.timeline),
            solve_s=watch.spent_s(),
            details=dict(counts),
        )


def _master(
    model: IlpModel, low_bytes: int, start: SimulatedPlan, max_error: float, counts: dict[str, int]
) -> tuple[MasterProgram, LeastPeak]:
    z = model.program.column("z")
    model.program.minimise([(COST_SCALE, z)])
    rows = MemoryRows(model, low_bytes, spread=(start.peak_bytes - low_bytes, z))
    master = MasterProgram(model, rows, counts=counts)
    return master, LeastPeak(master, z, low_bytes, start, max_error)


class LeastPeak:
    """Minimises the peak: program points above the program's own value of it are violated.

    Attributes:
        best: plan of the smallest peak.
    """

    def __init__(
        self, master: MasterProgram, z: Literal, low_bytes: int, start: SimulatedPlan, max_error: float
    ) -> None:
        self.best = start
        self._master = master
        self._z = z
        self._low_bytes = low_bytes
        self._way_bytes = start.peak_bytes - low_bytes
        self._max_error = max_error
        self._bound = 0.0

    def bound_bytes(self) -> float:
        """Returns the peak that no plan goes below."""
        if self._master.model.program.contradiction:  # the last plan is forbidden
            return math.inf
        return self._low_bytes + self._way_bytes * self._bound

    def closed(self) -> bool:
        """Returns whether no plan peaks lower than the best one, or the rounds are used up."""
        return self._master.counts["rounds"] >= ROUNDS or self.bound_bytes() >= self.best.peak_bytes

    def effort(self) -> Effort:
        """Asks for the optimum."""
        return Effort()

    def start(self) -> Actions:
        """Returns the plan of the smallest peak."""
        return self.best.actions

    def take_bound(self, bound: float) -> None:
        """Takes in the program's bound; infinite where only forbidden plans are left."""
        self._bound = max(self._bound, bound / COST_SCALE)

    def limit_bytes(self) -> float:
        """Returns the peak that the program gives to the plan just found."""
        return self._low_bytes + self._way_bytes * ((self._z.varValue or 0.0) + ROUNDING)

    def take_plan(self, plan: SimulatedPlan) -> bool:
        """Remembers the lowest plan; returns whether this one's error is within the limit."""
        within_error = plan.error <= self._max_error
        if within_error and plan.peak_bytes < self.best.peak_bytes:
            self.best = plan
        return within_error

    def stops_without_solution(self) -> bool:
        """Stops: no plan is left, or the time is up."""
        return True

    def stops_without_cuts(self, found: dict[int, Action], _plan: SimulatedPlan) -> bool:
        """Forbids a plan that the rows undercount, or whose error is beyond the limit, and goes on."""
        self._master.forbid(found)
        return False
