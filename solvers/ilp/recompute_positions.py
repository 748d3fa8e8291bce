"""The integer program's variables for where in the backward pass an op is recomputed, made on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxhybrid.solvers.ilp.action_columns import ActionColumns
from fxhybrid.solvers.ilp.presolve import CUTOFF_SLACK, chain_seconds

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Literal, Term


class RecomputePositions:
    """Holds m_op of ``model``: whether op o has been recomputed at or before backward position p."""

    def __init__(self, columns: ActionColumns) -> None:
        self._columns = columns
        self._moved: dict[tuple[int, int], Literal] = {}

    def moved(self, o: int, p: int) -> Literal:
        """Returns m_op, with its rows."""
        rerun, presolved = self._columns.rerun, self._columns.presolved
        if o not in rerun or p < presolved.earliest[o]:
            return 0
        if p >= presolved.latest[o]:
            return rerun[o]
        if (o, p) not in self._moved:
            self._activate(p)
        return self._moved[o, p]

    def _activate(self, p: int) -> None:
        """Makes m_op for all ops whose recomputation may fall on either side of p."""
        columns, presolved = self._columns, self._columns.presolved
        chains = chain_seconds(columns.problem, presolved.required, p)
        open_ops = [o for o in sorted(columns.rerun) if presolved.earliest[o] <= p < presolved.latest[o]]
        ops = [o for o in open_ops if o in chains and chains[o] <= presolved.cutoff_s * CUTOFF_SLACK]
        self._moved.update(((o, p), 0) for o in open_ops)
        self._moved.update(((o, p), columns.program.column("m")) for o in ops)
        for o in ops:
            self._rows(o, p)

    def _rows(self, o: int, p: int) -> None:
        columns, presolved, program = self._columns, self._columns.presolved, self._columns.program
        moved = self._moved[o, p]
        program.at_most([(1, moved), (-1, columns.rerun[o])], 0)
        asked: list[Term] = []
        outputs = columns.problem.forward[o].outputs
        for t in [t for t in outputs if t in columns.save]:
            if presolved.first.get(t, p + 1) <= p:
                asked.append((-1.0, columns.recompute[t]))
                program.at_least([(1, moved), (-1, columns.recompute[t])], 0)
            for q in presolved.readers[t]:
                reader = self.moved(q, p)
                asked.append((-1.0, reader))
                if not isinstance(reader, int):
                    program.at_least([(1, moved), *columns.stored(t, exact=True), (-1, reader)], 0)
        if presolved.undecided.isdisjoint(outputs):
            program.at_most([(1, moved), *asked], 0)
