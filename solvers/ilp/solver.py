"""Integer programming with a proven lower bound.

Problem / Data / Variables / Model: in algebra at the top of ``model``; ``forward_rows`` and ``backward_rows`` have the
memory rows. ``cutting_planes`` adds these as lazy constraints, and ``least_time`` says what is minimised.

A first program leaves out the smallest tensors; where that does not settle the problem, a second one has them all. It
starts with the rows of the first.
"""

from __future__ import annotations

import contextlib

from fxhybrid.errors import PlanError
from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.solvers.base import SolveResult, Status
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.ilp.cutting_planes import (
    START_SHARE,
    MasterProgram,
    SimulatedPlan,
    Stopwatch,
    run_cutting_planes,
    simulated_plan,
)
from fxhybrid.solvers.ilp.least_time import Incumbents, LeastTime
from fxhybrid.solvers.ilp.memory_rows import MemoryRows
from fxhybrid.solvers.ilp.min_peak import MinPeak, MinPeakSolver
from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import presolve
from fxhybrid.solvers.ilp.program_points import ProgramPoint

PRUNED_SHARE = 2e-3  # of the budget: what all pruned tensors may occupy together
ROWS_APART = 3  # instructions between two rows of one round
LEAST_S = 1.0  # for the question how low plans go, where the time limit is used up
CLOSED_SLACK = 1e-9  # of the gap, for rounding
COUNTS = ("rounds", "rows", "columns", "nodes", "tightened", "forbidden")


class IlpSolver:
    """Plans by integer programming, with a proven lower bound.

    Args:
        time_limit_s: seconds for one ``solve``, all rounds together.
        gap: stop when (added - bound) / max(added, 0.1 % of the step) is at most this.
    """

    def __init__(self, *, time_limit_s: float = 15.0, gap: float = 0.01) -> None:
        self.time_limit_s = time_limit_s
        self.gap = gap

    def solve(
        self, problem: Problem, budget_bytes: int, *, max_error: float, warm_start: Actions | None = None
    ) -> SolveResult:
        """Finds the best actions; ``warm_start`` is a plan to start from.

        Raises:
            ProblemError: the problem is malformed.
        """
        watch = Stopwatch(self.time_limit_s)
        check_problem(problem)
        known = Incumbents(problem, budget_bytes, max_error)
        starts = [simulated_plan(problem, {})]
        with contextlib.suppress(PlanError):  # one made for another problem is no use as a start
            starts.append(simulated_plan(problem, warm_start or {}))
        starts = [plan for plan in starts if known.take(plan)]
        counts = dict.fromkeys(COUNTS, 0)
        is_free = known.best is not None and known.best.overhead_s <= 0
        if not is_free and budget_bytes >= peak_lower_bound(problem)[0]:
            self._search(known, starts, counts, watch)
        min_peak = None if known.best else self._search_min_peak(known, watch)
        return self._result(known, min_peak, counts, watch)

    def _search(self, known: Incumbents, starts: list[SimulatedPlan], counts: dict[str, int], watch: Stopwatch) -> None:
        """Solves one program without the smallest tensors, and where that does not settle it, one with them."""
        program_points: tuple[ProgramPoint, ...] = ()
        for share in (PRUNED_SHARE, 0.0):
            pruned_bytes = share * known.budget_bytes
            presolved = presolve(known.problem, known.max_error, pruned_bytes=pruned_bytes, cutoff_s=known.cutoff_s())
            model = IlpModel(known.problem, presolved, known.max_error)
            master = MasterProgram(model, MemoryRows(model, known.budget_bytes), ROWS_APART, counts)
            for at in program_points:
                master.rows.add(at)
            for plan in () if program_points else starts:
                master.separate(plan, START_SHARE * known.budget_bytes)
            objective = LeastTime(master, known, self.gap, watch)
            run_cutting_planes(master, objective, watch)
            objective.finish()
            program_points = tuple(master.rows.rows)
            if known.impossible or objective.closed() or not presolved.pruned:
                return

    def _search_min_peak(self, known: Incumbents, watch: Stopwatch) -> MinPeak:
        """Finds out how low plans go at all, where none fits so far."""
        assert known.smallest is not None, "the default plan has no error"
        solver = MinPeakSolver(time_limit_s=max(watch.left_s(), LEAST_S))
        found = solver.solve(known.problem, max_error=known.max_error, warm_start=known.smallest.actions)
        known.take(simulated_plan(known.problem, found.actions))
        return found

    def _result(
        self, known: Incumbents, min_peak: MinPeak | None, counts: dict[str, int], watch: Stopwatch
    ) -> SolveResult:
        if known.best is not None:
            status = Status.OPTIMAL if known.gap() <= self.gap + CLOSED_SLACK else Status.FEASIBLE
        elif known.impossible or (min_peak and known.budget_bytes < min_peak.lower_bound_bytes):
            status = Status.INFEASIBLE
        else:
            status = Status.UNKNOWN
        shown = known.best or known.smallest
        assert shown is not None, "the default plan has no error"
        return SolveResult(
            status=status,
            actions=dict(shown.actions),
            peak_bytes=shown.peak_bytes,
            overhead_s=shown.overhead_s,
            lower_bound_s=max(min(known.bound_s, known.cutoff_s()), 0.0),
            error=shown.error,
            solver="ilp",
            solve_s=watch.spent_s(),
            details=dict(counts),
            proof=str(min_peak) if status is Status.INFEASIBLE else "",
        )
