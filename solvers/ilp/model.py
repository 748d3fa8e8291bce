"""The integer program behind ``IlpSolver``.

Problem
    Choose one action per candidate tensor so that a training step stays within the budget at every program point and
    adds as few seconds as possible. ``schedule.lower`` says what the actions mean.

Data
    T, O           decided tensors; ops that may run again in backward; o(t) makes t; R(t) are those reading t
    size_t, s_o    bytes of t; seconds of o
    b in B(t)      codec options: bytes_tb, seconds_tb (encode + decode), err_tb; those with err are lossy
    f_t, l_t       first and last direct backward read of t (backward positions), if any
    D              ops that only serve backward: in forward only if something stored needs them

Variables
    k_t, r_t, c_tb save t, recompute t, keep t encoded by b                       r, c binary; k follows
    r_o            o runs again in backward (r_t itself where o makes one tensor), or is fused    follows
    n_o            o in D runs in forward                                                 follows
    m_op           o has run again at or before backward position p               follows, made on demand
    N_g            how many of the equal choices g are made: same op in repeated layers, same option   integer

Model
    minimise   sum s_o r_o + sum seconds_tb c_tb + sum_{o in D} s_o max(0, r_o + n_o - 1) + sum_{o fused} s_o n_o
    t read by backward         k_t + sum_b c_tb + r_t  = 1
    other t                    k_t + sum_b c_tb + r_t <= 1
    o in R(t)                  k_t + sum_{b lossless} c_tb + r_t >= r_o;    r_o + sum_{b lossy} c_tb <= 1
    t made by o                r_o >= r_t;    o in D: n_o >= k_t + sum_b c_tb, n_o >= n_j for j in D reading t
    error                      sum err_tb^2 c_tb <= max_error^2
    rerun o(t) by p            m_op + k_t + sum_{b lossless} c_tb >= m_qp for q in R(t)
                               m_op >= r_t for p >= f_t
    no earlier than wanted     m_op <= r_o;  m_op <= sum_t ([p >= f_t] r_t + sum_{q in R(t)} m_qp)
    repeated layers            N_g = sum of the r_o or c_tb in g
    memory                     one row per program point that the simulator asked for (ilp_forward, ilp_backward)

Why its bound is one for the problem: each plan within budget and error limit gives a point that costs no
more. Take its actions, save pruned tensors (small ones of ops that forward runs anyway; they count no bytes
before their first read) and drop what is no longer read: cost and each counted byte stay or fall. A pruned
tensor that the plan made again may have woken an op earlier than other readers would: such an op has no "no
earlier than wanted" row. Rows not made yet only enlarge the program. Chains dearer than a known plan are left
out: no plan that is better holds one, and the bound is never reported above the known plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pulp

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.ilp.presolve import Facts, chain_seconds

Literal = Any  # a pulp variable, or a plain 0 or 1 where it is known
Term = tuple[float, Literal]

COST_SCALE = 1e4  # the step in the objective's units: solver tolerances are absolute
ERROR_SCALE = 1e3


class IlpModel:
    """Variables and all rows but memory; ``ilp_rows`` adds these.

    Attributes:
        lp: the PuLP problem.
        contradiction: whether a row without variables is violated.
    """

    def __init__(self, problem: Problem, facts: Facts, max_error: float) -> None:
        self.problem = problem
        self.facts = facts
        self.lp = pulp.LpProblem("plan", pulp.LpMinimize)
        self.contradiction = False
        self.unit_s = max(problem.step_s, 1e-12) / COST_SCALE
        self.save: dict[int, Literal] = {}
        self.recompute: dict[int, Literal] = {}
        self.compress: dict[int, tuple[Literal, ...]] = {}
        self.rerun: dict[int, Literal] = {}
        self.runs: dict[int, Literal] = dict.fromkeys(facts.needed, 1)
        self._moved: dict[tuple[int, int], Literal] = {}
        self._costs: list[Term] = []
        self._count = 0
        self.counts: list[tuple[Any, list[Literal]]] = []
        self._columns()
        self._repeated()
        self._availability()
        self._forward_runs()
        self._error(max_error)
        # PuLP drops variables that occur nowhere, and an empty objective is one that it cannot print.
        self.lp.setObjective(_expression([(0.0, self.column("zero")), *self._costs]))

    def column(self, name: str, category: str = "Continuous", *, most: int = 1) -> Literal:
        """A new variable between 0 and ``most``."""
        self._count += 1
        return self.lp.add_variable(f"{name}_{self._count}", 0, most, cat=category)

    def over(self, lower: list[list[Term]]) -> Literal:
        """A new variable that is at least each of the given sums."""
        variable = self.column("live")
        for terms in lower:
            self.at_least([(1, variable), *((-x, v) for x, v in terms)], 0)
        return variable

    def at_least(self, terms: Iterable[Term], rhs: float) -> Any:
        """Adds ``sum of terms >= rhs``; gives the row, or None where there is nothing to decide."""
        return self._row(terms, pulp.LpConstraintGE, rhs)

    def at_most(self, terms: Iterable[Term], rhs: float) -> Any:
        """Adds ``sum of terms <= rhs``; gives the row, or None where there is nothing to decide."""
        return self._row(terms, pulp.LpConstraintLE, rhs)

    def _row(self, terms: Iterable[Term], sense: int, rhs: float) -> Any:
        variables: list[Term] = []
        for coefficient, literal in terms:
            if isinstance(literal, int):
                rhs -= coefficient * literal
            elif coefficient:
                variables.append((coefficient, literal))
        if not variables:
            self.contradiction |= (rhs > 1e-9) if sense == pulp.LpConstraintGE else (rhs < -1e-9)
            return None
        row = pulp.LpConstraint(_expression(variables), sense, rhs=rhs)
        self.lp.addConstraint(row)
        return row

    def stored(self, t: int, *, exact: bool = False) -> list[Term]:
        """Terms of "t is kept in some form", or in a form that gives back the very same bits."""
        options = zip(self.facts.options[t], self.compress[t], strict=True)
        return [(1.0, self.save[t]), *((1.0, c) for o, c in options if o.lossless or not exact)]

    def kept(self, t: int, *, lossless: bool) -> list[tuple[int, Literal]]:
        """(encoded bytes, literal) of the lossless or of the lossy options of t."""
        options = zip(self.facts.options[t], self.compress[t], strict=True)
        return [(o.encoded_bytes, c) for o, c in options if o.lossless is lossless]

    def _columns(self) -> None:
        decided = set(self.facts.decided)
        for o in sorted(self.facts.rerunnable):
            made = [t for t in self.problem.forward[o].outputs if t in decided]
            self.rerun[o] = self.column("r", "Binary")
            if len(made) == 1:
                self.recompute[made[0]] = self.rerun[o]
            else:
                self.recompute.update((t, self.column("rt", "Binary")) for t in made)
                for t in made:
                    self.at_least([(1, self.rerun[o]), (-1, self.recompute[t])], 0)
                self.at_most([(1, self.rerun[o]), *((-1.0, self.recompute[t]) for t in made)], 0)
            self._costs.append((self._cost(o) if o in self.facts.needed else 0.0, self.rerun[o]))
        for t in self.facts.decided:
            self.recompute.setdefault(t, 0)
            self.save[t] = self.column("k")
            self.compress[t] = tuple(self.column("c", "Binary") for _ in self.facts.options[t])
            for option, c in zip(self.facts.options[t], self.compress[t], strict=True):
                self._costs.append(((option.encode_s + option.decode_s) / self.unit_s, c))

    def _repeated(self) -> None:
        """N_g: branching settles how many of the equal choices of repeated layers are made before which."""
        alike: dict[tuple[object, ...], list[Literal]] = {}
        for o, rerun in self.rerun.items():
            op = self.problem.forward[o]
            sizes = tuple(self.problem.tensors[t].size_bytes for t in op.outputs)
            alike.setdefault((op.seconds, op.alloc_peak_bytes, len(op.inputs), sizes), []).append(rerun)
        for t in self.facts.decided:
            for option, c in zip(self.facts.options[t], self.compress[t], strict=True):
                same = replace(option, error=0.0)  # measured layer by layer, so rarely equal
                alike.setdefault((self.problem.tensors[t].size_bytes, same), []).append(c)
        for choices in alike.values():
            if len(choices) > 1:
                count = self.column("count", "Integer", most=len(choices))
                self.counts.append((count, choices))
                self.lp.addConstraint(_expression([(1.0, count), *((-1.0, x) for x in choices)]) == 0)

    def _cost(self, o: int) -> float:
        return self.problem.forward[o].seconds / self.unit_s

    def _availability(self) -> None:
        for t in self.facts.decided:
            chosen = [*self.stored(t), (1.0, self.recompute[t])]
            self.at_most(chosen, 1)
            if t in self.facts.first:
                self.at_least(chosen, 1)
            lossy = [(1.0, c) for _, c in self.kept(t, lossless=False)]
            for q in self.facts.readers[t]:
                exact = [*self.stored(t, exact=True), (1.0, self.recompute[t]), (-1.0, self.rerun[q])]
                self.at_least(exact, 0)
                self.at_most([*lossy, (1.0, self.rerun[q])], 1)

    def _forward_runs(self) -> None:
        """n_o: an op that only serves backward runs in forward where something stored depends on it."""
        problem, facts = self.problem, self.facts
        for o in range(len(problem.forward)):
            if o not in facts.needed:
                self.runs[o] = self.column("n")
                if o in problem.fused_masks:  # its seconds are what keeping the mask costs
                    self._costs.append((self._cost(o), self.runs[o]))
        for o, op in enumerate(problem.forward):
            if o in facts.needed:
                continue
            for t in op.outputs:
                if t in self.save:
                    self.at_least([(1, self.runs[o]), *((-x, v) for x, v in self.stored(t))], 0)
                for j in facts.optional_readers[t]:
                    self.at_least([(1, self.runs[o]), (-1, self.runs[j])], 0)
            if o in self.rerun:
                twice = self.column("twice")
                self.at_least([(1, twice), (-1, self.rerun[o]), (-1, self.runs[o])], -1)
                self._costs.append((self._cost(o), twice))

    def _error(self, max_error: float) -> None:
        terms = [
            (ERROR_SCALE * (o.error / max_error) ** 2, c)
            for t in self.facts.decided
            for o, c in zip(self.facts.options[t], self.compress[t], strict=True)
            if o.error > 0
        ]
        self.at_most(terms, ERROR_SCALE)

    def moved(self, o: int, p: int) -> Literal:
        """m_op: whether o has run again at or before backward position p."""
        if o not in self.rerun or p < self.facts.earliest[o]:
            return 0
        if p >= self.facts.latest[o]:
            return self.rerun[o]
        if (o, p) not in self._moved:
            self._activate(p)
        return self._moved[o, p]

    def _activate(self, p: int) -> None:
        """Makes m_op for all ops whose rerun may fall on either side of p."""
        facts = self.facts
        chains = chain_seconds(self.problem, facts.needed, p)
        open_ops = [o for o in sorted(self.rerun) if facts.earliest[o] <= p < facts.latest[o]]
        ops = [o for o in open_ops if o in chains and chains[o] <= facts.cutoff_s * (1 + 1e-9)]
        self._moved.update(((o, p), 0) for o in open_ops)
        self._moved.update(((o, p), self.column("m")) for o in ops)
        for o in ops:
            moved = self._moved[o, p]
            self.at_most([(1, moved), (-1, self.rerun[o])], 0)
            wanted: list[Term] = []
            made = [t for t in self.problem.forward[o].outputs if t in self.save]
            for t in made:
                if facts.first.get(t, p + 1) <= p:
                    wanted.append((-1.0, self.recompute[t]))
                    self.at_least([(1, moved), (-1, self.recompute[t])], 0)
                for q in facts.readers[t]:
                    reader = self.moved(q, p)
                    wanted.append((-1.0, reader))
                    if not isinstance(reader, int):
                        self.at_least([(1, moved), *self.stored(t, exact=True), (-1, reader)], 0)
            if facts.unsure.isdisjoint(self.problem.forward[o].outputs):
                self.at_most([(1, moved), *wanted], 0)

    def forbid(self, actions: Mapping[int, Action], reached: Sequence[int]) -> None:
        """Cuts off exactly the plans that choose these actions for all reached tensors."""
        chosen: list[Term] = []
        for t in reached:
            action = actions[t]
            if isinstance(action, Compress):
                codecs = [o.codec for o in self.facts.options[t]]
                chosen.append((1.0, self.compress[t][codecs.index(action.codec)]))
            else:
                chosen.append((1.0, self.save[t] if action is SAVE else self.recompute[t]))
        self.at_most(chosen, len(chosen) - 1)

    def actions(self) -> dict[int, Action]:
        """The actions that the variables' values say."""
        chosen: dict[int, Action] = {}
        for t in self.facts.decided:
            chosen[t] = RECOMPUTE if _is_set(self.recompute[t]) else SAVE
            for option, c in zip(self.facts.options[t], self.compress[t], strict=True):
                if _is_set(c):
                    chosen[t] = Compress(option.codec)
        return chosen

    def start(self, actions: Mapping[int, Action]) -> dict[str, float]:
        """Values by name of the whole-number variables for ``actions``, which name what backward reaches."""
        values: dict[str, float] = {}
        for t in self.facts.decided:
            action = actions.get(t)
            for option, c in zip(self.facts.options[t], self.compress[t], strict=True):
                values[c.name] = float(isinstance(action, Compress) and action.codec == option.codec)
            if not isinstance(self.recompute[t], int):
                again = float(action is RECOMPUTE)
                rerun = self.rerun[self.problem.producer[t]].name
                values[self.recompute[t].name] = again
                values[rerun] = max(again, values.get(rerun, 0.0))
        for count, choices in self.counts:
            values[count.name] = sum(values[x.name] for x in choices)
        return values


def _expression(terms: Sequence[Term]) -> Any:
    total: dict[Literal, float] = {}
    for coefficient, literal in terms:
        total[literal] = total.get(literal, 0.0) + coefficient
    return pulp.LpAffineExpression(total)


def _is_set(literal: Literal) -> bool:
    return not isinstance(literal, int) and (literal.varValue or 0.0) > 0.5
