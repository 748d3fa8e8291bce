"""A lower bound of the added seconds by linear programming: cheap enough for every report.

Problem
    The linear relaxation of ``model``: every plan within budget and error limit is a point of it, so its optimum is a
    bound for all of them.

Data, variables, model
    As in ``model``, with all variables continuous and memory rows for the program points where the save-all step and
    the known plan are highest. More rows would only raise the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.ilp.cutting_planes import START_SHARE, simulated_plan
from fxhybrid.solvers.ilp.memory_rows import MemoryRows
from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import presolve

PRUNED_SHARE = 0.02  # of the budget: what is left out only lowers the bound, and a small program is quick
ROWS_PER_PLAN = 4
ROWS_APART = 20  # instructions
TIME_LIMIT_S = 10.0


@dataclass(frozen=True)
class AddedBound:
    """Holds what the linear program says about one budget.

    Attributes:
        overhead_s: seconds that every plan within budget and error limit adds at least; infinity where there is none.
        saved_s_per_byte: the shadow price of memory: by how much ``overhead_s`` falls for one byte more.
    """

    overhead_s: float
    saved_s_per_byte: float = 0.0


def added_lower_bound(
    problem: Problem, budget_bytes: int, *, max_error: float, known: Actions | None = None
) -> AddedBound:
    """Computes a lower bound of the added seconds, with the shadow price of memory.

    Args:
        problem: the step.
        budget_bytes: limit of the peak.
        max_error: limit of the root of the sum of squared lossy errors.
        known: a plan near the budget; its highest program points say where memory is short.

    Raises:
        ProblemError: the problem is malformed.
    """
    check_problem(problem)
    if budget_bytes < peak_lower_bound(problem)[0]:
        return AddedBound(math.inf)
    start = simulated_plan(problem, known or {})
    fits = start.peak_bytes <= budget_bytes and start.error <= max_error
    cutoff_s = start.overhead_s if fits else math.inf
    presolved = presolve(problem, max_error, pruned_bytes=PRUNED_SHARE * budget_bytes, cutoff_s=cutoff_s)
    model = IlpModel(problem, presolved, max_error)
    rows = MemoryRows(model, budget_bytes)
    for plan in (simulated_plan(problem, {}), start):
        rows.add_highest(
            plan.schedule,
            plan.timeline,
            above_bytes=START_SHARE * budget_bytes,
            most=ROWS_PER_PLAN,
            apart=ROWS_APART,
        )
    if model.program.contradiction:
        return AddedBound(math.inf)
    model.program.relax()
    answer = model.program.solve({}, gap=0.0, gap_abs=0.0, time_limit_s=TIME_LIMIT_S)
    if not math.isfinite(answer.bound):
        return AddedBound(0.0 if answer.bound < 0 else math.inf)
    bound_s = answer.bound * model.unit_s
    if bound_s <= 0.0:
        return AddedBound(0.0)
    return AddedBound(min(bound_s, cutoff_s), rows.duals() * model.unit_s)
