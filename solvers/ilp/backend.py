"""Running PuLP's solvers: HiGHS in this process, or CBC, with what PuLP itself does not pass on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp


@dataclass(frozen=True)
class Answer:
    """What a solver said about an integer program that is minimised.

    Attributes:
        found: whether the variables hold a point that satisfies all rows.
        closed: whether that point is optimal within the gap asked for.
        bound: no point is below it; infinity where there is none at all.
        nodes: branch and bound nodes.
    """

    found: bool
    closed: bool
    bound: float
    nodes: int = 0


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's in-process HiGHS, started from known values of some variables."""

    start: Mapping[str, float] = {}

    def callSolver(self, lp: Any) -> None:
        known = [(v.index, self.start[v.name]) for v in lp.variables() if v.name in self.start]
        if known:
            index = np.asarray([i for i, _ in known], np.int32)
            lp.solverModel.setSolution(len(known), index, np.asarray([x for _, x in known], np.float64))
        lp.solverModel.run()


def run_highs(lp: Any, start: Mapping[str, float], *, gap: float, gap_abs: float, time_limit_s: float) -> Answer:
    """Solves with HiGHS; ``start`` holds values of the binary variables by name."""
    # HiGHS 1.14 and 1.15 lose optima in presolve where binary and continuous columns mix (its issues 3073 and
    # 3094; seen here once in 2,500 small solves: a "proven" optimum 5 % too high). True bounds are worth what
    # this costs: on most recorded problems nothing, on GPT-2 at a loose budget seconds.
    solver = _Highs(
        msg=False,
        threads=1,
        gapRel=gap,
        gapAbs=gap_abs,
        timeLimit=time_limit_s,
        presolve="off",
        # Its heuristics presolve their sub-problems all the same, and in HiGHS 1.16 that can loop for ever in
        # HPresolve::strengthenInequalities, past any time limit (seen on T5 and ViT). So none of the three may run.
        mip_heuristic_run_rins=False,
        mip_heuristic_run_rens=False,
        mip_heuristic_run_root_reduced_cost=False,
    )
    solver.start = start
    status = lp.solve(solver)
    info = lp.solverModel.getInfo()
    if status == pulp.LpStatusInfeasible:
        return Answer(False, True, math.inf)
    found = status == pulp.LpStatusOptimal and info.primal_solution_status == 2
    closed = found and lp.sol_status == pulp.LpSolutionOptimal
    bound = info.mip_dual_bound
    if not any(v.cat == pulp.LpInteger for v in lp.variables()):
        bound = info.objective_function_value if closed else -math.inf
    return Answer(found, closed, float(bound), max(int(info.mip_node_count), 0))


def run_cbc(lp: Any, start: Mapping[str, float], *, gap: float, gap_abs: float, time_limit_s: float) -> Answer:
    """Solves with CBC; it tells no bound when it runs out of time."""
    for variable in lp.variables():
        if variable.name in start:
            variable.setInitialValue(start[variable.name])
    limit_s = max(1, math.ceil(time_limit_s))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 4 wants CBC as an extra
        solver = pulp.PULP_CBC_CMD(
            msg=False, threads=1, gapRel=gap, gapAbs=gap_abs, timeLimit=limit_s, warmStart=bool(start)
        )
    status = lp.solve(solver)
    if status == pulp.LpStatusInfeasible:
        return Answer(False, True, math.inf)
    found = lp.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    closed = lp.sol_status == pulp.LpSolutionOptimal
    value = float(pulp.value(lp.objective) or 0.0) if found else 0.0
    return Answer(found, closed, value - max(gap * abs(value), gap_abs) if closed else -math.inf)


BACKENDS = {"highs": run_highs, "cbc": run_cbc}
