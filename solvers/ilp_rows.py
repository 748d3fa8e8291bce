"""Memory rows of the integer program: one moment of the schedule, one row.

With at(q) = m_qp for what stands before the moment in batch p and m_q,p-1 for what stands after it, a decided
tensor t counts in backward with

* its size between its first and last direct read: it is there whatever was chosen;
* before: live_t >= k_t + at(o(t)), and live_t >= at(q) for q in R(t), who found it there; its encoded bytes
  with c_tb, unless one of these q came by;
* after, and if backward never reads it: live_t >= what is there + (r_q - at(q)) - 1 for q in R(t) to come.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fxhybrid.problem import Problem
from fxhybrid.schedule import Schedule
from fxhybrid.solvers.ilp_facts import Facts, certain_backward, certain_forward, saved_bytes, top_bytes
from fxhybrid.solvers.ilp_model import IlpModel, Literal, Term
from fxhybrid.solvers.moments import Moment, moments_of
from fxhybrid.timeline import Timeline

ROW_SCALE = 1e3  # the budget in the rows' units


class MemoryRows:
    """Adds memory rows to a model, and tightens them; ``spread`` is bytes on top of the budget, times a variable."""

    def __init__(self, model: IlpModel, budget_bytes: int, *, spread: Term = (0.0, 0)) -> None:
        self.model = model
        self.spread = spread
        self.problem: Problem = model.problem
        self.facts: Facts = model.facts
        self.budget_bytes = budget_bytes
        self.rows: dict[Moment, Any] = {}
        self._rooms: dict[Moment, float] = {}
        self.unit = max(budget_bytes, 1) / ROW_SCALE
        self._decided = set(self.facts.decided)
        self._forward_base = certain_forward(self.problem, self.facts)
        self._backward_base = certain_backward(self.problem, self._decided)
        self._reserve: tuple[list[int], list[int]] | None = None

    def add(self, at: Moment) -> None:
        """Adds the row of one moment."""
        terms: list[Term] = [(-self.spread[0], self.spread[1])]
        base = self._forward(terms, at) if at.forward else self._backward(terms, at)
        scaled = [(b / self.unit, literal) for b, literal in terms]
        rhs = (self.budget_bytes - base - self._reserved(at)) / self.unit
        self.rows[at] = row = self.model.at_most(scaled, rhs)
        if row is not None:
            self._rooms[at] = -row.constant * self.unit + self._reserved(at)

    def add_highest(
        self, schedule: Schedule, timeline: Timeline, *, above_bytes: float, most: int, apart: int = 0
    ) -> bool:
        """Adds rows for the highest moments of a plan that have none; False if all of these have theirs.

        Args:
            schedule: of the plan.
            timeline: of the schedule.
            above_bytes: lower moments do not matter.
            most: rows added at most.
            apart: instructions between two of them: neighbours say nearly the same.
        """
        during, moments = timeline.during_bytes, moments_of(self.problem, schedule)
        chosen: dict[int, Moment] = {}
        for at in np.argsort(-during, kind="stable").tolist():
            if during[at] <= above_bytes or len(chosen) == most:
                break
            new = moments[at] not in self.rows and moments[at] not in chosen.values()
            if new and all(abs(at - c) > apart for c in chosen):
                chosen[at] = moments[at]
        for moment in chosen.values():
            self.add(moment)
        return bool(chosen)

    def duals(self) -> float:
        """By how much the objective falls for one byte more in every row; after a linear solve."""
        return -sum(row.pi or 0.0 for row in self.rows.values() if row is not None) / self.unit

    def tighten(self, at: Moment, excess_bytes: float) -> bool:
        """Takes room from a row; False where the row holds no variable."""
        row = self.rows[at]
        if row is None:
            return False
        row.changeRHS(-row.constant - excess_bytes / self.unit)
        return True

    def release(self) -> None:
        """Gives every row its full room back, so that bounds are true again."""
        self._reserve = None
        for at, room in self._rooms.items():
            self.rows[at].changeRHS(room / self.unit)

    def reserve(self) -> bool:
        """From now on keeps room for the pruned tensors, which are saved; False if that was so already."""
        if self._reserve is not None or not self.facts.pruned:
            return False
        self._reserve = saved_bytes(self.problem, self.facts)
        for at in self.rows:
            self.tighten(at, self._reserved(at))
        return True

    def _reserved(self, at: Moment) -> int:
        if self._reserve is None:
            return 0
        forward, backward = self._reserve
        return forward[at.op] if at.forward else backward[at.op]

    def _column(self, lower: list[list[Term]]) -> Literal:
        """A variable that is at least each of the given sums."""
        variable = self.model.column("live")
        for terms in lower:
            self.model.at_least([(1, variable), *((-x, v) for x, v in terms)], 0)
        return variable

    # forward

    def _forward(self, terms: list[Term], at: Moment) -> float:
        model, encoding = self.model, at.tensor >= 0
        position = at.op + 1 if encoding else at.op
        for t in self.facts.decided:
            if self.problem.producer[t] < position:
                self._forward_tensor(terms, t, position, at)
        if encoding:
            self._encode(terms, at)
        else:
            terms.append((top_bytes(self.problem, self.problem.forward[at.op]), model.runs[at.op]))
        return float(self._forward_base[position])

    def _forward_tensor(self, terms: list[Term], t: int, position: int, at: Moment) -> None:
        model, size = self.model, self.problem.tensors[t].size_bytes
        held = t in self.facts.held
        if self.facts.last_forward[t] >= position:
            if self.problem.producer[t] not in self.facts.needed and not held:
                terms.append((size, model.runs[self.problem.producer[t]]))
            return
        later = [model.runs[j] for j in self.facts.optional_readers[t] if j >= position]
        waits = at.tensor >= 0 and t >= at.tensor and not held and self._last_reads(t, at.op)
        options = [*model.kept(t, lossless=True), *model.kept(t, lossless=False)]
        if later:
            if not held:
                terms.append((size, self._column([[(1.0, model.save[t])], *([(1.0, n)] for n in later)])))
            for encoded_bytes, c in options:
                terms.append((encoded_bytes, self._column([[(1, c), *((-1.0, n) for n in later)]])))
            return
        if not held:
            terms.append((size, model.save[t]))
        terms.extend((size if waits else encoded_bytes, c) for encoded_bytes, c in options)

    def _last_reads(self, t: int, op: int) -> bool:
        return self.facts.last_forward[t] == op and not self.facts.optional_readers[t]

    def _encode(self, terms: list[Term], at: Moment) -> None:
        t, model = at.tensor, self.model
        if t not in self._decided:
            return
        later = [model.runs[j] for j in self.facts.optional_readers[t] if j > at.op]
        reads_now = at.op == self.facts.last_forward[t]
        for option, c in zip(self.facts.options[t], model.compress[t], strict=True):
            happens = c
            if later or not reads_now:
                now = [] if reads_now else [(1.0, model.runs[at.op]), (-1.0, 1)]
                happens = self._column([[(1, c), *now, *((-1.0, n) for n in later)]])
            terms.append((max(option.encode_rise_bytes, option.encoded_bytes), happens))

    # backward

    def _backward(self, terms: list[Term], at: Moment) -> float:
        for t in self.facts.decided:
            if t not in self.problem.outputs:
                self._backward_tensor(terms, t, at)
        base = float(self._backward_base[at.op])
        for t, first in self.facts.first.items():  # pruned: there for certain between their direct reads
            if t not in self._decided and t not in self.problem.outputs and self._after_first(t, first, at):
                base += self.problem.tensors[t].size_bytes if at.op <= self.facts.last[t] else 0
        if at.tensor >= 0:
            self._decode(terms, at)
        elif at.rerun < len(self.problem.forward):
            top = top_bytes(self.problem, self.problem.forward[at.rerun])
            terms.append((top, self.model.moved(at.rerun, at.op)))
            terms.append((-top, self.model.moved(at.rerun, at.op - 1)))
        else:
            base += top_bytes(self.problem, self.problem.backward[at.op])
        return base

    def _after_first(self, t: int, first: int, at: Moment) -> bool:
        if first == at.op and at.rerun == len(self.problem.forward):
            return at.tensor < 0 or t < at.tensor
        return first < at.op

    def _ran(self, q: int, at: Moment) -> Literal:
        """Whether q has run again before the moment."""
        return self.model.moved(q, at.op if q < at.rerun else at.op - 1)

    def _found(self, t: int, q: int, at: Moment) -> Literal:
        """Whether q, which reads t, has run again or is about to, so that t stands decoded."""
        if q == at.rerun:
            inputs = self.problem.forward[q].inputs
            decoded = at.tensor < 0 or inputs.index(t) < inputs.index(at.tensor)
            return self.model.moved(q, at.op if decoded else at.op - 1)
        return self._ran(q, at)

    def _made(self, t: int, at: Moment) -> Literal:
        """Whether t stands because its op ran again."""
        o = self.problem.producer[t]
        if o not in self.model.rerun:
            return 0
        ran, recompute = self._ran(o, at), self.model.recompute[t]
        if recompute is self.model.rerun[o] or isinstance(ran, int):
            return ran
        if ran is self.model.rerun[o]:
            return recompute
        return self._column([[(1, ran), (1, recompute), (-1, 1)]])

    def _backward_tensor(self, terms: list[Term], t: int, at: Moment) -> None:
        facts, model = self.facts, self.model
        size = self.problem.tensors[t].size_bytes
        first = facts.first.get(t)
        if first is not None and at.op <= facts.last[t]:
            if self._after_first(t, first, at):
                terms.append((size, 1))
                return
            found = self._some(self._found(t, q, at) for q in facts.readers[t])
            there: list[Term] = [(1, model.save[t]), (1, self._made(t, at))]
            if found:
                terms.append((size, self._column([there, *([(1.0, f)] for f in found)])))
            else:
                terms.extend((size * x, v) for x, v in there)
            self._encoded(terms, t, found)
            terms.extend(model.kept(t, lossless=False))
            return
        self._after_direct(terms, t, at, first is not None)

    def _after_direct(self, terms: list[Term], t: int, at: Moment, read: bool) -> None:
        """After the last direct read, or without one: only reruns still to come hold t."""
        model, size = self.model, self.problem.tensors[t].size_bytes
        ran = {q: self._ran(q, at) for q in self.facts.readers[t]}
        coming = [q for q, r in ran.items() if r is not model.rerun[q]]
        if not coming:
            return
        if read:
            lower: list[list[Term]] = [[(1, model.rerun[q]), (-1, ran[q])] for q in coming]
            terms.append((size, self._column(lower)))
            return
        found = {q: self._found(t, q, at) for q in self.facts.readers[t]}
        some = self._some(found.values())
        there: list[Term] = [(1, model.save[t]), (1, self._made(t, at))]
        if not some:
            terms.extend((size * x, v) for x, v in there)
        else:
            lower = [[*there, *((-1.0, r) for r in ran.values())]]
            for q in coming:
                still: list[Term] = [(1, model.rerun[q]), (-1, ran[q]), (-1, 1)]
                lower.append([*there, *still])
                lower.extend([(1, f), *still] for f in found.values() if not isinstance(f, int))
            terms.append((size, self._column(lower)))
        self._encoded(terms, t, some)

    def _encoded(self, terms: list[Term], t: int, found: list[Literal]) -> None:
        """Lossless forms: there until a rerun finds t decoded."""
        for encoded_bytes, c in self.model.kept(t, lossless=True):
            happens = self._column([[(1, c), *((-1.0, f) for f in found)]]) if found else c
            terms.append((encoded_bytes, happens))

    def _decode(self, terms: list[Term], at: Moment) -> None:
        t, model = at.tensor, self.model
        if t not in self._decided:
            return
        found = self._some(self._found(t, q, at) for q in self.facts.readers[t])
        at_end = at.rerun == len(self.problem.forward)
        for option, c in zip(self.facts.options[t], model.compress[t], strict=True):
            if not at_end and not option.lossless:
                continue
            lower: list[Term] = [(1, c), *((-1.0, f) for f in found)]
            if not at_end:
                lower += [(1, model.moved(at.rerun, at.op)), (-1, 1)]
            happens = c if len(lower) == 1 or not option.lossless else self._column([lower])
            terms.append((max(option.decode_rise_bytes, self.problem.tensors[t].size_bytes), happens))

    @staticmethod
    def _some(literals: Iterable[Literal]) -> list[Literal]:
        return [v for v in literals if not isinstance(v, int)]
