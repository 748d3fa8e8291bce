"""The smallest peak that any plan reaches, by integer programming with the simulator as the judge.

Problem
    Choose one action per candidate tensor so that the step's highest program point is as low as possible.

Data
    P_low, P_high   a peak that no plan goes below; the peak of a known plan
    all else        as in ``ilp_model``, without pruning and without a limit on seconds

Variables
    z               share of the way from P_low to P_high
    all else        as in ``ilp_model``

Model
    minimise   z
    all rows of ``ilp_model`` and ``ilp_rows``, where the budget of each memory row is P_low + (P_high - P_low) z

Rows are made only for program points at which a plan found is higher than the program believes. Every plan gives a
point of the program that is no higher, so the program's bound is one for the peak. A plan that the rows undercount is
noted with its true peak and forbidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import pulp

from fxhybrid.ir.plan import Action, Actions
from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.simulator import simulate
from fxhybrid.solvers.base import plan_error
from fxhybrid.solvers.bounds import holder_in_words, peak_lower_bound
from fxhybrid.solvers.ilp.backend import BACKENDS
from fxhybrid.solvers.ilp.memory_rows import MemoryRows
from fxhybrid.solvers.ilp.model import COST_SCALE, IlpModel
from fxhybrid.solvers.ilp.presolve import completed, facts_of, reached
from fxhybrid.units import format_bytes

ROUNDS = 400
ROWS_PER_ROUND = 12
ROUNDING = 1e-6  # what the backend's tolerances may hide, of the way from P_low to P_high


@dataclass(frozen=True)
class MinPeak:
    """The smallest peak found, and what no plan goes below.

    Attributes:
        actions: the plan of the smallest peak.
        peak_bytes: its simulated peak.
        lower_bound_bytes: no plan within the error limit that makes each tensor at most once more peaks below.
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
        backend: ``"highs"`` or ``"cbc"``.
    """

    def __init__(self, *, time_limit_s: float = 15.0, backend: str = "highs") -> None:
        self.time_limit_s = time_limit_s
        self.backend = backend

    def solve(self, problem: Problem, *, max_error: float, warm_start: Actions | None = None) -> MinPeak:
        """The smallest peak; ``warm_start`` is a known plan within the error limit.

        Raises:
            ProblemError: the problem is malformed.
        """
        check_problem(problem)
        return _Search(self, problem, max_error, warm_start or {}).run()


class _Search:
    def __init__(self, solver: MinPeakSolver, problem: Problem, max_error: float, warm_start: Actions) -> None:
        self.started = time.perf_counter()
        self.solver = solver
        self.problem = problem
        self.max_error = max_error
        self.low = peak_lower_bound(problem)[0]
        self.counts = {"rounds": 0, "rows": 0, "nodes": 0, "forbidden": 0}
        self.actions: Mapping[int, Action] = {}
        self.peak_bytes = self.high = simulate(problem, lower(problem, {})).peak_bytes
        self.note(warm_start, simulate(problem, lower(problem, warm_start)).peak_bytes)
        self.high = self.peak_bytes
        self.bound = float(self.low)

    def note(self, actions: Mapping[int, Action], peak_bytes: int) -> None:
        """Remembers the lowest plan."""
        if peak_bytes < self.peak_bytes:
            self.actions, self.peak_bytes = actions, peak_bytes

    def run(self) -> MinPeak:
        """All rounds, and the result."""
        if self.high > self.low:
            self.search()
        schedule = lower(self.problem, self.actions)
        holder = holder_in_words(self.problem, schedule, simulate(self.problem, schedule))
        bound = math.ceil(min(self.bound, self.peak_bytes) - ROUNDING * (self.high - self.low))
        seconds = time.perf_counter() - self.started
        return MinPeak(dict(self.actions), self.peak_bytes, max(bound, self.low), holder, seconds, self.counts)

    def search(self) -> None:
        """Solve, simulate, add rows, repeat, until the program believes what the simulator says."""
        model = IlpModel(self.problem, facts_of(self.problem, self.max_error), self.max_error)
        z = model.column("z")
        model.lp.setObjective(pulp.LpAffineExpression({z: COST_SCALE}))
        rows = MemoryRows(model, self.low, spread=(self.high - self.low, z))
        self.add_rows(rows, self.actions, 0.97 * self.peak_bytes)
        self.add_rows(rows, {}, 0.97 * self.peak_bytes)
        while self.counts["rounds"] < ROUNDS and self.bound < self.peak_bytes and self.left_s() > 0:
            self.counts["rounds"] += 1
            start = model.start(reached(self.problem, self.actions))
            answer = BACKENDS[self.solver.backend](model.lp, start, gap=0.0, gap_abs=0.0, time_limit_s=self.left_s())
            self.counts["nodes"] += answer.nodes
            self.counts["rows"] = len(rows.rows)
            if answer.bound > -math.inf:  # infinite where only forbidden plans are left
                self.bound = max(self.bound, self.low + (self.high - self.low) * answer.bound / COST_SCALE)
            if not answer.found:
                break
            self.judge(model, rows, model.actions(), self.low + (self.high - self.low) * (z.varValue or 0.0))

    def judge(self, model: IlpModel, rows: MemoryRows, found: dict[int, Action], believed: float) -> None:
        """Simulates what the program found; adds rows where it is higher than believed, or forbids it."""
        actions = completed(self.problem, found)
        fits = plan_error(self.problem, actions) <= self.max_error
        if fits:
            self.note(actions, simulate(self.problem, lower(self.problem, actions)).peak_bytes)
        if not fits or not self.add_rows(rows, actions, believed + ROUNDING * (self.high - self.low)):
            self.counts["forbidden"] += 1
            seen = reached(self.problem, actions)
            model.forbid(found, [t for t in model.facts.decided if t in seen])

    def add_rows(self, rows: MemoryRows, actions: Actions, above_bytes: float) -> bool:
        """Adds rows for the highest program points of a plan; False if all of these have theirs."""
        schedule = lower(self.problem, actions)
        return rows.add_highest(
            schedule, simulate(self.problem, schedule), above_bytes=above_bytes, most=ROWS_PER_ROUND
        )

    def left_s(self) -> float:
        """Seconds until the time limit."""
        return self.solver.time_limit_s - (time.perf_counter() - self.started)
