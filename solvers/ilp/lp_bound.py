"""A lower bound of the added seconds by linear programming: cheap enough for every report.

Problem
    The program of ``ilp_model`` without whole numbers: every plan within budget and error limit is a point of it, so
    its optimum is a bound for all of them.

Data, variables, model
    As in ``ilp_model`` and ``ilp_rows``, with all variables continuous and memory rows for the program points where
    keeping everything and the known plan are highest. Each round relaxes nothing: more rows only raise the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem, check_problem
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.simulator import simulate
from fxhybrid.solvers.base import plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.ilp.backend import BACKENDS
from fxhybrid.solvers.ilp.memory_rows import MemoryRows
from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import facts_of

PRUNED_SHARE = 0.02  # of the budget: what is left out only lowers the bound, and a small program is quick
NEAR = 0.97  # of the budget: what is lower hardly matters
ROWS_PER_PLAN = 4
ROWS_APART = 20  # instructions
TIME_LIMIT_S = 10.0


@dataclass(frozen=True)
class AddedBound:
    """What the linear program says about one budget.

    Attributes:
        overhead_s: seconds that every plan within budget and error limit adds at least; infinity where there is none.
        saved_s_per_byte: the shadow price of memory: by how much ``overhead_s`` falls for one byte more.
    """

    overhead_s: float
    saved_s_per_byte: float = 0.0


def added_lower_bound(
    problem: Problem, budget_bytes: int, *, max_error: float, known: Actions | None = None, backend: str = "highs"
) -> AddedBound:
    """A lower bound of the added seconds, with the shadow price of memory.

    Args:
        problem: the step.
        budget_bytes: limit of the peak.
        max_error: limit of the root of the sum of squared lossy errors.
        known: a plan near the budget; its highest program points say where memory is short.
        backend: ``"highs"`` or ``"cbc"``.

    Raises:
        ProblemError: the problem is malformed.
    """
    check_problem(problem)
    if budget_bytes < peak_lower_bound(problem)[0]:
        return AddedBound(math.inf)
    plans = [lower(problem, actions) for actions in ({}, known or {})]
    lines = [simulate(problem, plan) for plan in plans]
    known_line = lines[1]
    fits = known_line.peak_bytes <= budget_bytes and plan_error(problem, known or {}) <= max_error
    cutoff_s = known_line.overhead_s if fits else math.inf
    facts = facts_of(problem, max_error, pruned_bytes=PRUNED_SHARE * budget_bytes, cutoff_s=cutoff_s)
    model = IlpModel(problem, facts, max_error)
    rows = MemoryRows(model, budget_bytes)
    for plan, line in zip(plans, lines, strict=True):
        rows.add_highest(plan, line, above_bytes=NEAR * budget_bytes, most=ROWS_PER_PLAN, apart=ROWS_APART)
    if model.contradiction:
        return AddedBound(math.inf)
    for variable in model.lp.variables():
        variable.cat = "Continuous"
    answer = BACKENDS[backend](model.lp, {}, gap=0.0, gap_abs=0.0, time_limit_s=TIME_LIMIT_S)
    if not math.isfinite(answer.bound):
        return AddedBound(0.0 if answer.bound < 0 else math.inf)
    bound_s = answer.bound * model.unit_s - facts.credit_s
    if bound_s <= 0.0:
        return AddedBound(0.0)
    return AddedBound(min(bound_s, cutoff_s), rows.duals() * model.unit_s)
