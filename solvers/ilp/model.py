"""The integer program behind ``IlpSolver``: its variables, and all rows but memory.

Problem
    Choose one action per candidate tensor so that a training step stays within the budget at every program point and
    adds as few seconds as possible. ``schedule.lower`` says what the actions mean.

Data
    T, O           decided tensors; ops that may be recomputed in backward; o(t) makes t; R(t) are those reading t
    size_t, s_o    bytes of t; seconds of o
    b in B(t)      codec options: bytes_tb, seconds_tb (encode + decode), err_tb; those with err are lossy
    f_t, l_t       first and last direct backward read of t (backward positions), if any
    D              ops that only serve backward: in forward only if something stored needs them

Variables
    k_t, r_t, c_tb save t, recompute t, keep t encoded by b                       r, c binary; k follows
    r_o            o is recomputed in backward (r_t itself where o makes one tensor), or is fused  follows
    n_o            o in D runs in forward                                                 follows
    m_op           o has been recomputed at or before backward position p         follows, made on demand
    N_g            how many of the equal choices g are made: same op in repeated layers, same option   integer

Model
    minimise   sum s_o r_o + sum seconds_tb c_tb + sum_{o in D} s_o max(0, r_o + n_o - 1) + sum_{o fused} s_o n_o
    t read by backward         k_t + sum_b c_tb + r_t  = 1
    other t                    k_t + sum_b c_tb + r_t <= 1
    o in R(t)                  k_t + sum_{b lossless} c_tb + r_t >= r_o;    r_o + sum_{b lossy} c_tb <= 1
    t made by o                r_o >= r_t;    o in D: n_o >= k_t + sum_b c_tb, n_o >= n_j for j in D reading t
    error                      sum err_tb^2 c_tb <= max_error^2
    recompute o(t) by p        m_op + k_t + sum_{b lossless} c_tb >= m_qp for q in R(t)
                               m_op >= r_t for p >= f_t
    no earlier than asked for  m_op <= r_o;  m_op <= sum_t ([p >= f_t] r_t + sum_{q in R(t)} m_qp)
    repeated layers            N_g = sum of the r_o or c_tb in g
    memory                     one row per program point, as a lazy constraint (forward_rows, backward_rows)

In the letters of Checkmate (Jain et al., MLSys 2020), whose stage is the time up to one backward op p here:
    R_po           o is computed in stage p               m_op - m_o,p-1   (an op runs at most once in backward)
    S_pt           t is kept into stage p                 k_t; encoded by sum_b c_tb; recomputed before p: m_o(t),p-1
    U_po           bytes in use while o runs in stage p   the left side of the memory row of one program point
    FREE_pto       t is freed after o in stage p          no variable: t dies at its last read, so that each memory row
                                                          counts t by what is read later (the "live" variables)
Checkmate's program has no encoded forms, and lets an op run in any number of stages.

Why its bound is one for the problem: each plan within budget and error limit gives a point that costs no
more. Take its actions, save pruned tensors (small ones of ops that forward runs anyway; they count no bytes
before their first read) and drop what is no longer read: cost and each counted byte stay or fall. A pruned
tensor that the plan recomputed may have triggered an op earlier than other readers would: such an op has no "no
earlier than asked for" row. Lazy constraints not added yet only enlarge the program. Chains costlier than a known plan
are left out: no plan that is better holds one, and the bound is never reported above the known plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.ilp.action_columns import ActionColumns
from fxhybrid.solvers.ilp.presolve import Presolved
from fxhybrid.solvers.ilp.recompute_positions import RecomputePositions

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Literal

ERROR_SCALE = 1e3  # the error limit in its row's units


class IlpModel(ActionColumns):
    """Builds the variables, the objective and all rows but memory; ``MemoryRows`` adds these.

    Attributes:
        runs: n_o per forward op; 1 where every plan runs it.
    """

    def __init__(self, problem: Problem, presolved: Presolved, max_error: float) -> None:
        super().__init__(problem, presolved)
        self.runs: dict[int, Literal] = dict.fromkeys(presolved.required, 1)
        self._positions = RecomputePositions(self)
        self._availability()
        self._forward_runs()
        self._error(max_error)
        # PuLP drops variables that occur nowhere, and an empty objective is one that it cannot print.
        self.program.minimise([(0.0, self.program.column("zero")), *self._costs])

    def moved(self, o: int, p: int) -> Literal:
        """Returns m_op: whether o has been recomputed at or before backward position p."""
        return self._positions.moved(o, p)

    def _availability(self) -> None:
        for t in self.presolved.decided:
            chosen = [*self.stored(t), (1.0, self.recompute[t])]
            self.program.at_most(chosen, 1)
            if t in self.presolved.first:
                self.program.at_least(chosen, 1)
            lossy = [(1.0, c) for _, c in self.encoded(t, lossless=False)]
            for q in self.presolved.readers[t]:
                exact = [*self.stored(t, exact=True), (1.0, self.recompute[t]), (-1.0, self.rerun[q])]
                self.program.at_least(exact, 0)
                self.program.at_most([*lossy, (1.0, self.rerun[q])], 1)

    def _forward_runs(self) -> None:
        """Adds n_o: an op that only serves backward runs in forward where something stored depends on it."""
        optional = [o for o in range(len(self.problem.forward)) if o not in self.presolved.required]
        for o in optional:
            self.runs[o] = self.program.column("n")
            if o in self.problem.fused_masks:  # its seconds are what keeping the mask costs
                self._costs.append((self._cost(o), self.runs[o]))
        for o in optional:
            for t in self.problem.forward[o].outputs:
                if t in self.save:
                    self.program.at_least([(1, self.runs[o]), *((-x, v) for x, v in self.stored(t))], 0)
                for j in self.presolved.optional_readers[t]:
                    self.program.at_least([(1, self.runs[o]), (-1, self.runs[j])], 0)
            if o in self.rerun:
                twice = self.program.column("twice")
                self.program.at_least([(1, twice), (-1, self.rerun[o]), (-1, self.runs[o])], -1)
                self._costs.append((self._cost(o), twice))

    def _error(self, max_error: float) -> None:
        terms = [
            (ERROR_SCALE * (o.error / max_error) ** 2, c)
            for t in self.presolved.decided
            for o, c in zip(self.presolved.options[t], self.compress[t], strict=True)
            if o.error > 0
        ]
        self.program.at_most(terms, ERROR_SCALE)
