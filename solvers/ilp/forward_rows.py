"""Memory rows of forward program points: what is alive before an op, or while a tensor is encoded.

A tensor counts with its size up to its last forward read. After that it counts with its size if it is saved, and with
its encoded bytes if it is encoded; reads by ops that only some plans run move that point for these plans.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import certain_forward
from fxhybrid.solvers.ilp.program_points import ProgramPoint

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Term


class ForwardTerms:
    """Writes the rows of one model's forward program points."""

    def __init__(self, model: IlpModel) -> None:
        self.model = model
        self.problem = model.problem
        self.presolved = model.presolved
        self._certain = certain_forward(self.problem, self.presolved)

    def of(self, at: ProgramPoint) -> tuple[list[Term], float]:
        """Returns the terms of the row of one program point, and the bytes that no decision changes."""
        terms: list[Term] = []
        encoding = at.tensor >= 0
        position = at.op + 1 if encoding else at.op
        for t in self.presolved.decided:
            if self.problem.producer[t] < position:
                self._tensor(terms, t, position, at)
        if encoding:
            self._encode(terms, at)
        else:
            terms.append((self.problem.top_bytes(self.problem.forward[at.op]), self.model.runs[at.op]))
        return terms, float(self._certain[position])

    def _tensor(self, terms: list[Term], t: int, position: int, at: ProgramPoint) -> None:
        model, size = self.model, self.problem.tensors[t].size_bytes
        held = t in self.presolved.held
        if self.presolved.last_forward[t] >= position:
            if self.problem.producer[t] not in self.presolved.required and not held:
                terms.append((size, model.runs[self.problem.producer[t]]))
            return
        later = [model.runs[j] for j in self.presolved.optional_readers[t] if j >= position]
        waits = at.tensor >= 0 and t >= at.tensor and not held and self._last_reads(t, at.op)
        options = [*model.encoded(t, lossless=True), *model.encoded(t, lossless=False)]
        if later:
            if not held:
                terms.append((size, self.model.at_least_each([[(1.0, model.save[t])], *([(1.0, n)] for n in later)])))
            for encoded_bytes, c in options:
                terms.append((encoded_bytes, self.model.at_least_each([[(1, c), *((-1.0, n) for n in later)]])))
            return
        if not held:
            terms.append((size, model.save[t]))
        terms.extend((size if waits else encoded_bytes, c) for encoded_bytes, c in options)

    def _last_reads(self, t: int, op: int) -> bool:
        return self.presolved.last_forward[t] == op and not self.presolved.optional_readers[t]

    def _encode(self, terms: list[Term], at: ProgramPoint) -> None:
        t, model = at.tensor, self.model
        if t not in self.presolved.decided:
            return
        later = [model.runs[j] for j in self.presolved.optional_readers[t] if j > at.op]
        reads_now = at.op == self.presolved.last_forward[t]
        for option, c in zip(self.presolved.options[t], model.compress[t], strict=True):
            happens = c
            if later or not reads_now:
                now = [] if reads_now else [(1.0, model.runs[at.op]), (-1.0, 1)]
                happens = self.model.at_least_each([[(1, c), *now, *((-1.0, n) for n in later)]])
            terms.append((max(option.encode_alloc_peak_bytes, option.encoded_bytes), happens))
