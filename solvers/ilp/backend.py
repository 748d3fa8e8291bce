"""The one place that knows PuLP and HiGHS: a linear or integer program that is minimised, and its solution.

Importing it loads both, so that it is imported where a program is built and not before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import pulp

ROW_TOLERANCE = 1e-9  # by which a row without variables may be violated
FEASIBLE_POINT = 2  # what HiGHS reports of a primal solution that satisfies all rows

Literal = Any  # a pulp variable, or a plain 0 or 1 where it is known
Term = tuple[float, Literal]

# HiGHS 1.14 and 1.15 lose optima in presolve where binary and continuous columns mix (its issues 3073 and 3094; seen
# here once in 2,500 small solves: a "proven" optimum 5 % too high). True bounds are worth what this costs: on most
# recorded problems nothing, on GPT-2 at a loose budget seconds.
# Its heuristics presolve their sub-problems all the same, and in HiGHS 1.16 that can loop for ever in
# HPresolve::strengthenInequalities, past any time limit (seen on T5 and ViT). So none of the three may run.
OPTIONS: Mapping[str, object] = {
    "threads": 1,
    "presolve": "off",
    "mip_heuristic_run_rins": False,
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_root_reduced_cost": False,
}


@dataclass(frozen=True)
class Answer:
    """Holds what HiGHS said about a program.

    Attributes:
        found: whether the variables hold a point that satisfies all rows.
        bound: no point is below it; infinity where there is none at all.
        nodes: branch and bound nodes.
    """

    found: bool
    bound: float
    nodes: int = 0


class _SilentModel(highspy.Highs):
    """Runs HiGHS and prints nothing.

    HiGHS prints its banner at the first call that is not an option. ``highspy`` makes such a call in its constructor,
    before PuLP's ``msg=False`` arrives: it registers callbacks.
    """

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """Runs PuLP's in-process HiGHS silently, from known values of some variables."""

    start: Mapping[str, float] = {}

    def createAndConfigureSolver(self, lp: Any) -> None:
        lp.solverModel = _SilentModel()  # type: ignore[no-untyped-call]
        lp.solverModel.setOptionValue("output_flag", False)
        for option, value in self.optionsDict.items():
            lp.solverModel.setOptionValue(option, value)

    def callSolver(self, lp: Any) -> None:
        known = [(v.index, self.start[v.name]) for v in lp.variables() if v.name in self.start]
        if known:
            index = np.asarray([i for i, _ in known], np.int32)
            lp.solverModel.setSolution(len(known), index, np.asarray([x for _, x in known], np.float64))
        lp.solverModel.run()


class LinearProgram:
    """Builds a program column by column and row by row, and solves it.

    Attributes:
        contradiction: whether a row without variables is violated.
    """

    def __init__(self) -> None:
        self._lp = pulp.LpProblem("plan", pulp.LpMinimize)
        self._count = 0
        self.contradiction = False

    @property
    def columns(self) -> int:
        """The number of variables."""
        return len(self._lp.variables())

    def column(self, name: str, *, most: int = 1, integer: bool = False) -> Literal:
        """Makes a variable between 0 and ``most``."""
        self._count += 1
        category = pulp.LpInteger if integer else pulp.LpContinuous
        return self._lp.add_variable(f"{name}_{self._count}", 0, most, cat=category)

    def at_least(self, terms: Iterable[Term], rhs: float) -> Any:
        """Adds ``sum of terms >= rhs``; returns the row, or None where there is nothing to decide."""
        return self._row(terms, pulp.LpConstraintGE, rhs)

    def at_most(self, terms: Iterable[Term], rhs: float) -> Any:
        """Adds ``sum of terms <= rhs``; returns the row, or None where there is nothing to decide."""
        return self._row(terms, pulp.LpConstraintLE, rhs)

    def equal(self, terms: Iterable[Term], rhs: float) -> Any:
        """Adds ``sum of terms = rhs``; the terms hold variables only."""
        row = pulp.LpConstraint(_expression(terms), pulp.LpConstraintEQ, rhs=rhs)
        self._lp.addConstraint(row)
        return row

    def minimise(self, terms: Iterable[Term]) -> None:
        """Sets the objective."""
        self._lp.setObjective(_expression(terms))

    def relax(self) -> None:
        """Makes all variables continuous."""
        for variable in self._lp.variables():
            variable.cat = pulp.LpContinuous

    def solve(self, start: Mapping[str, float], *, gap: float, gap_abs: float, time_limit_s: float) -> Answer:
        """Solves with HiGHS; ``start`` holds values of the whole-number variables by name."""
        lp = self._lp
        limits = {"mip_rel_gap": gap, "mip_abs_gap": gap_abs, "time_limit": time_limit_s}
        solver = _Highs(msg=False, **limits, **OPTIONS)
        solver.start = start
        status = lp.solve(solver)
        info = lp.solverModel.getInfo()
        if status == pulp.LpStatusInfeasible:
            return Answer(False, math.inf)
        found = status == pulp.LpStatusOptimal and info.primal_solution_status == FEASIBLE_POINT
        bound = info.mip_dual_bound
        if not any(v.cat == pulp.LpInteger for v in lp.variables()):
            optimal = found and lp.sol_status == pulp.LpSolutionOptimal
            bound = info.objective_function_value if optimal else -math.inf
        return Answer(found, float(bound), max(int(info.mip_node_count), 0))

    def _row(self, terms: Iterable[Term], sense: int, rhs: float) -> Any:
        variables: list[Term] = []
        for coefficient, literal in terms:
            if isinstance(literal, int):
                rhs -= coefficient * literal
            elif coefficient:
                variables.append((coefficient, literal))
        if not variables:
            short = rhs if sense == pulp.LpConstraintGE else -rhs
            self.contradiction |= short > ROW_TOLERANCE
            return None
        row = pulp.LpConstraint(_expression(variables), sense, rhs=rhs)
        self._lp.addConstraint(row)
        return row


def _expression(terms: Iterable[Term]) -> Any:
    total: dict[Literal, float] = {}
    for coefficient, literal in terms:
        total[literal] = total.get(literal, 0.0) + coefficient
    return pulp.LpAffineExpression(total)
