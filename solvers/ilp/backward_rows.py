"""Memory rows of backward program points: what is alive before an op, a recomputation or a decoding.

A batch p is backward op p with the recomputations and decodings right before it. With at(q) = m_qp for an op q whose
turn in batch p comes before the program point, and m_q,p-1 for one whose turn comes after it, a decided
tensor t counts in backward with

* its size between its first and last direct read: it is there whatever was chosen;
* before: live_t >= k_t + at(o(t)), and live_t >= at(q) for q in R(t), who found it there; its encoded bytes
  with c_tb, unless one of these q came by;
* after, and if backward never reads it: live_t >= what is there + (r_q - at(q)) - 1 for q in R(t) to come.

An op that makes a mask is not recomputed: with r_o the mask's reader p takes its fused form. The mask is not there
then, p rises as far as that form does, and o reads its sources not before, but together with p.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fxhybrid.ir.problem import Op
from fxhybrid.ir.schedule import fused_op
from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import certain_backward
from fxhybrid.solvers.ilp.program_points import ProgramPoint

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Literal, Term


class BackwardTerms:
    """Writes the rows of one model's backward program points."""

    def __init__(self, model: IlpModel) -> None:
        self.model = model
        self.problem = model.problem
        self.presolved = model.presolved
        self._decided = set(self.presolved.decided)
        self._certain = certain_backward(self.problem)

    def of(self, at: ProgramPoint) -> tuple[list[Term], float]:
        """Returns the terms of the row of one program point, and the bytes that no decision changes."""
        terms: list[Term] = []
        for t in self.presolved.decided:
            if t not in self.problem.outputs:
                self._tensor(terms, t, at)
        base = float(self._certain[at.op])
        for t, first in self.presolved.first.items():  # pruned: there for certain between their direct reads
            if t not in self._decided and t not in self.problem.outputs and self._after_first(t, first, at):
                base += self.problem.tensors[t].size_bytes if at.op <= self.presolved.last[t] else 0
        if at.tensor >= 0:
            self._decode(terms, at)
        elif at.rerun < len(self.problem.forward):
            top = self.problem.top_bytes(self.problem.forward[at.rerun])
            terms.append((top, self.model.moved(at.rerun, at.op)))
            terms.append((-top, self.model.moved(at.rerun, at.op - 1)))
        else:
            base += self._own(terms, self.problem.backward[at.op])
        return terms, base

    def _own(self, terms: list[Term], op: Op) -> int:
        """Adds how far a backward op rises; returns the part that no decision changes."""
        top = self.problem.top_bytes(op)
        if op.fusion:
            fused_top = self.problem.top_bytes(fused_op(self.problem, op, op.fusion))
            terms.append((fused_top - top, self._fused(op.fusion.op)))
        return top

    def _after_first(self, t: int, first: int, at: ProgramPoint) -> bool:
        if first == at.op and at.rerun == len(self.problem.forward):
            return at.tensor < 0 or t < at.tensor
        return first < at.op

    def _fused(self, o: int) -> Literal:
        """Says whether a backward op reads the sources of the mask that forward op o makes, instead of the mask."""
        return self.model.rerun.get(o, 0) if o in self.problem.fused_masks else 0

    def _turn(self, q: int) -> int:
        """Returns the turn of q among the recomputations of a batch; a fused one comes with the batch's own op."""
        return len(self.problem.forward) if q in self.problem.fused_masks else q

    def _ran(self, q: int, at: ProgramPoint) -> Literal:
        """Says whether q has been recomputed before the program point."""
        return self.model.moved(q, at.op if self._turn(q) < at.rerun else at.op - 1)

    def _found(self, t: int, q: int, at: ProgramPoint) -> Literal:
        """Says whether q, which reads t, has been recomputed or is about to be, so that t is there decoded."""
        if self._turn(q) == at.rerun:
            inputs = self.problem.forward[q].inputs
            fused = q != at.rerun
            decoded = at.tensor < 0 or (t < at.tensor if fused else inputs.index(t) < inputs.index(at.tensor))
            return self.model.moved(q, at.op if decoded else at.op - 1)
        return self._ran(q, at)

    def _made(self, t: int, at: ProgramPoint) -> Literal:
        """Says whether t is there because its op was recomputed."""
        o = self.problem.producer[t]
        if o not in self.model.rerun or o in self.problem.fused_masks:
            return 0
        ran, recompute = self._ran(o, at), self.model.recompute[t]
        if recompute is self.model.rerun[o] or isinstance(ran, int):
            return ran
        if ran is self.model.rerun[o]:
            return recompute
        return self.model.at_least_each([[(1, ran), (1, recompute), (-1, 1)]])

    def _tensor(self, terms: list[Term], t: int, at: ProgramPoint) -> None:
        presolved, model = self.presolved, self.model
        size = self.problem.tensors[t].size_bytes
        first = presolved.first.get(t)
        if first is not None and at.op <= presolved.last[t]:
            if self._after_first(t, first, at):
                terms += [(size, 1), (-size, self._fused(self.problem.producer[t]))]
                return
            found = self._some(self._found(t, q, at) for q in presolved.readers[t])
            there: list[Term] = [(1, model.save[t]), (1, self._made(t, at))]
            if found:
                terms.append((size, self.model.at_least_each([there, *([(1.0, f)] for f in found)])))
            else:
                terms.extend((size * x, v) for x, v in there)
            self._encoded(terms, t, found)
            terms.extend(model.encoded(t, lossless=False))
            return
        self._after_direct(terms, t, at, first is not None)

    def _after_direct(self, terms: list[Term], t: int, at: ProgramPoint, read: bool) -> None:
        """Adds t after its last direct read, or without one: only recomputations still to come hold it."""
        model, size = self.model, self.problem.tensors[t].size_bytes
        ran = {q: self._ran(q, at) for q in self.presolved.readers[t]}
        coming = [q for q, r in ran.items() if r is not model.rerun[q]]
        if not coming:
            return
        if read:
            lower: list[list[Term]] = [[(1, model.rerun[q]), (-1, ran[q])] for q in coming]
            terms.append((size, self.model.at_least_each(lower)))
            return
        found = {q: self._found(t, q, at) for q in self.presolved.readers[t]}
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
            terms.append((size, self.model.at_least_each(lower)))
        self._encoded(terms, t, some)

    def _encoded(self, terms: list[Term], t: int, found: list[Literal]) -> None:
        """Lossless forms: there until a rerun finds t decoded."""
        for encoded_bytes, c in self.model.encoded(t, lossless=True):
            happens = self.model.at_least_each([[(1, c), *((-1.0, f) for f in found)]]) if found else c
            terms.append((encoded_bytes, happens))

    def _decode(self, terms: list[Term], at: ProgramPoint) -> None:
        t, model = at.tensor, self.model
        if t not in self._decided:
            return
        found = self._some(self._found(t, q, at) for q in self.presolved.readers[t])
        own = self.problem.backward[at.op]
        direct = at.rerun == len(self.problem.forward) and t in own.inputs
        reader = own.fusion.op if own.fusion and at.rerun == len(self.problem.forward) else at.rerun
        for option, c in zip(self.presolved.options[t], model.compress[t], strict=True):
            if not direct and not option.lossless:
                continue
            lower: list[Term] = [(1, c), *((-1.0, f) for f in found)]
            if not direct:
                lower += [(1, model.moved(reader, at.op)), (-1, 1)]
            happens = c if len(lower) == 1 or not option.lossless else self.model.at_least_each([lower])
            terms.append((max(option.decode_alloc_peak_bytes, self.problem.tensors[t].size_bytes), happens))

    @staticmethod
    def _some(literals: Iterable[Literal]) -> list[Literal]:
        return [v for v in literals if not isinstance(v, int)]
