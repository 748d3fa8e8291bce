"""Integer programming with the simulator as the judge.

Problem / Data / Variables / Model: in algebra at the top of ``ilp_model``; ``ilp_rows`` has the memory rows.

The program starts with memory rows for the program points where keeping everything (and the warm plan) is highest.
Each round solves it, simulates the plan, and adds rows for the program points that are over the budget. Where such
a program point has its row already, the row undercounts (pruned tensors, two decodes in one batch). A small problem
then forbids just that plan, which keeps every bound true. A large one first keeps room for the saved pruned
tensors, then lowers the row's room; the bound from before stands until the rows get it back at the end.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxhybrid.errors import InvalidArgument, PlanError
from fxhybrid.ir.plan import GAP_FLOOR_SHARE, Action, Actions, relative_gap
from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.ir.schedule import Schedule, lower
from fxhybrid.ir.simulator import Timeline, simulate
from fxhybrid.solvers.base import SolveResult, Status, plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.ilp.backend import BACKENDS
from fxhybrid.solvers.ilp.memory_rows import MemoryRows
from fxhybrid.solvers.ilp.min_peak import MinPeak, MinPeakSolver
from fxhybrid.solvers.ilp.model import COST_SCALE, IlpModel
from fxhybrid.solvers.ilp.presolve import completed, facts_of, reached
from fxhybrid.solvers.ilp.program_points import ProgramPoint, program_points_of

PRUNED_SHARE = 2e-3  # of the budget: what all pruned tensors may occupy together
LOOSE_GAP = 0.05  # of the rounds that only find out which rows matter
LOOSE_TIME = 1 / 16  # of what is left: without the rows there is no use in looking long
ROWS_PER_ROUND = 12
ROWS_APART = 3  # instructions between two rows of one round: neighbours say nearly the same
LEAST_S = 1.0  # for the question how low plans go, where the time limit is used up
SMALL = 16  # decided tensors up to which a wrong plan is forbidden rather than its row tightened


@dataclass(frozen=True)
class _Tried:
    actions: Mapping[int, Action]
    schedule: Schedule
    timeline: Timeline
    error: float


class IlpSolver:
    """Plans by integer programming, with a proven lower bound.

    Args:
        time_limit_s: seconds for one ``solve``, all rounds together.
        gap: stop when (added - bound) / max(added, 0.1 % of the step) is at most this.
        backend: ``"highs"`` or ``"cbc"``.
    """

    def __init__(self, *, time_limit_s: float = 15.0, gap: float = 0.01, backend: str = "highs") -> None:
        if backend not in BACKENDS:
            raise InvalidArgument(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
        self.time_limit_s = time_limit_s
        self.gap = gap
        self.backend = backend

    def solve(
        self, problem: Problem, budget_bytes: int, *, max_error: float, warm_start: Actions | None = None
    ) -> SolveResult:
        """The best actions found; ``warm_start`` is a plan to start from.

        Raises:
            ProblemError: the problem is malformed.
        """
        check_problem(problem)
        return _Search(self, problem, budget_bytes, max_error).run(warm_start)


class _Search:
    def __init__(self, solver: IlpSolver, problem: Problem, budget_bytes: int, max_error: float) -> None:
        self.started = time.perf_counter()
        self.solver = solver
        self.problem = problem
        self.budget_bytes = budget_bytes
        self.max_error = max_error
        self.best: _Tried | None = None
        self.min_peak: MinPeak | None = None
        self.smallest: _Tried | None = None
        self.bound_s = 0.0
        self.impossible = False
        self.exact = True  # whether the program as it stands gives true bounds
        self.blurred = False  # whether it never will again
        self.counts = dict.fromkeys(("rounds", "rows", "columns", "nodes", "tightened", "forbidden"), 0)

    def run(self, warm_start: Actions | None) -> SolveResult:
        """All rounds, and the result."""
        default = self.tried({})
        assert default is not None
        known = [default]
        with contextlib.suppress(PlanError):  # one made for another problem is no use as a start
            known += [tried for tried in [self.tried(warm_start or {})] if tried]
        beaten = self.best is not None and self.best.timeline.overhead_s <= 0
        if not beaten and self.budget_bytes >= peak_lower_bound(self.problem)[0]:
            self.search(known)
        if self.best is None:
            self.look_lower()
        return self.result()

    def look_lower(self) -> None:
        """No plan fits so far: how low do plans go at all?"""
        assert self.smallest is not None
        solver = MinPeakSolver(time_limit_s=max(self.left_s(), LEAST_S), backend=self.solver.backend)
        self.min_peak = solver.solve(self.problem, max_error=self.max_error, warm_start=self.smallest.actions)
        self.tried(self.min_peak.actions)

    def tried(self, actions: Actions) -> _Tried | None:
        """Simulates a plan and remembers it if it is the best so far; None beyond the error limit."""
        error = plan_error(self.problem, actions)
        if error > self.max_error:
            return None
        schedule = lower(self.problem, actions)
        tried = _Tried(actions, schedule, simulate(self.problem, schedule), error)
        peak, added = tried.timeline.peak_bytes, tried.timeline.overhead_s
        if peak <= self.budget_bytes and (self.best is None or added < self.best.timeline.overhead_s):
            self.best = tried
        if self.smallest is None or peak < self.smallest.timeline.peak_bytes:
            self.smallest = tried
        return tried

    def left_s(self) -> float:
        """Seconds until the time limit."""
        return self.solver.time_limit_s - (time.perf_counter() - self.started)

    def search(self, known: list[_Tried]) -> None:
        """One pass without the smallest tensors, and where that does not settle it, one with them."""
        program_points: tuple[ProgramPoint, ...] = ()
        for share in (PRUNED_SHARE, 0.0):
            rows = self.search_once(known, program_points, share * self.budget_bytes)
            program_points = tuple(rows.rows)
            if self.impossible or self.gap() <= self.solver.gap or not rows.facts.pruned:
                return

    def search_once(
        self, known: list[_Tried], program_points: tuple[ProgramPoint, ...], pruned_bytes: float
    ) -> MemoryRows:
        """Builds the program, runs the rounds, and bounds the problem once more with all rows they found."""
        cutoff_s = self.best.timeline.overhead_s if self.best else math.inf
        facts = facts_of(self.problem, self.max_error, pruned_bytes=pruned_bytes, cutoff_s=cutoff_s)
        model = IlpModel(self.problem, facts, self.max_error)
        rows = MemoryRows(model, self.budget_bytes)
        self.exact, self.blurred = True, False
        for at in program_points:
            rows.add(at)
        for tried in () if program_points else known:
            self.add_rows(rows, tried, above=0.97)
        if self.rounds(model, rows) and facts.pruned and not self.exact:
            return rows  # not the rows are at fault but what is pruned: it has to be decided
        if self.best is not None and self.gap() > self.solver.gap and not self.exact and not self.blurred:
            self.exact = True
            rows.release()
            self.solve_once(model, rows, self.solver.gap / 4, self.left_s())
        return rows

    def rounds(self, model: IlpModel, rows: MemoryRows) -> bool:
        """Solve, simulate, add rows, repeat: with a loose gap until the plan fits, then with the true one.

        Says whether the program ended up without any plan while there was time left.
        """
        loose = True
        while self.left_s() > 0 and self.gap() > self.solver.gap and not model.contradiction:
            gap, share = (LOOSE_GAP, LOOSE_TIME) if loose else (self.solver.gap / 2, 1.0)
            found = self.solve_once(model, rows, gap, share * self.left_s())
            if found is None and loose:
                loose = False
                continue
            if found is None:
                return self.left_s() > 0
            tried = self.tried(completed(self.problem, found))
            if tried is not None and tried.timeline.peak_bytes <= self.budget_bytes:
                if not loose:
                    break
                loose = False
            elif tried is None or not self.add_rows(rows, tried, above=1.0):
                self.correct(model, rows, found, tried)
        self.impossible |= model.contradiction and self.exact
        return False

    def solve_once(self, model: IlpModel, rows: MemoryRows, gap: float, time_limit_s: float) -> Actions | None:
        """One run of the backend; keeps its bound if that is one for the problem."""
        if time_limit_s <= 0:
            return None
        answer = BACKENDS[self.solver.backend](
            model.lp,
            model.start(reached(self.problem, self.best.actions)) if self.best else {},
            gap=gap,
            gap_abs=gap * GAP_FLOOR_SHARE * COST_SCALE,
            time_limit_s=time_limit_s,
        )
        self.count(model, rows, answer.nodes)
        if self.exact and answer.bound == math.inf:
            # Nothing is left: no plan at all, or none besides those tried.
            self.impossible = self.best is None
            self.bound_s = self.best.timeline.overhead_s if self.best else self.bound_s
        elif self.exact and math.isfinite(answer.bound):
            self.bound_s = max(self.bound_s, answer.bound * model.unit_s - model.facts.credit_s)
        return model.actions() if answer.found else None

    def count(self, model: IlpModel, rows: MemoryRows, nodes: int) -> None:
        """Notes the sizes reached."""
        self.counts["rounds"] += 1
        self.counts["nodes"] += nodes
        self.counts["rows"] = len(rows.rows)
        self.counts["columns"] = len(model.lp.variables())

    def add_rows(self, rows: MemoryRows, tried: _Tried, *, above: float) -> bool:
        """Adds rows where the plan is highest, beyond ``above`` times the budget; False if all have theirs already."""
        limit = above * self.budget_bytes
        return rows.add_highest(
            tried.schedule, tried.timeline, above_bytes=limit, most=ROWS_PER_ROUND, apart=ROWS_APART
        )

    def correct(self, model: IlpModel, rows: MemoryRows, found: Actions, tried: _Tried | None) -> None:
        """Rules out a plan that all rows allow but the simulator refuses."""
        if tried is None or (len(model.facts.decided) <= SMALL and not model.facts.pruned):
            self.counts["forbidden"] += 1
            seen = reached(self.problem, completed(self.problem, found))
            model.forbid(found, [t for t in model.facts.decided if t in seen])
            # With pruned tensors the plan forbidden stands for others, too, that may fit.
            self.blurred |= model.facts.pruned
            self.exact &= not self.blurred
            return
        self.counts["tightened"] += 1
        self.exact = False
        if rows.reserve():
            return
        program_points = program_points_of(self.problem, tried.schedule)
        excess = tried.timeline.during_bytes - self.budget_bytes
        over: dict[ProgramPoint, int] = {}
        for at in np.flatnonzero(excess > 0).tolist():
            over[program_points[at]] = max(int(excess[at]), over.get(program_points[at], 0))
        changed = [rows.tighten(at, by) for at, by in over.items() if at in rows.rows]
        if not any(changed):
            model.forbid(found, model.facts.decided)
            self.blurred = True

    def gap(self) -> float:
        """The gap of the best plan so far; infinite without one."""
        if self.best is None:
            return math.inf
        added = self.best.timeline.overhead_s
        return relative_gap(added, min(self.bound_s, added), self.problem.step_s)

    def result(self) -> SolveResult:
        """What is known now."""
        if self.best is not None:
            status = Status.OPTIMAL if self.gap() <= self.solver.gap + 1e-9 else Status.FEASIBLE
        elif self.impossible or (self.min_peak and self.budget_bytes < self.min_peak.lower_bound_bytes):
            status = Status.INFEASIBLE
        else:
            status = Status.UNKNOWN
        shown = self.best or self.smallest
        assert shown is not None
        bound_s = min(self.bound_s, self.best.timeline.overhead_s) if self.best else self.bound_s
        return SolveResult(
            status,
            dict(shown.actions),
            shown.timeline.peak_bytes,
            shown.timeline.overhead_s,
            max(bound_s, 0.0),
            shown.error,
            "ilp",
            time.perf_counter() - self.started,
            self.counts,
            str(self.min_peak) if status is Status.INFEASIBLE else "",
        )
