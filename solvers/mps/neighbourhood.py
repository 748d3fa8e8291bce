"""Moves from one plan to another: the codes that each tensor may take, and the repair that makes a change a valid plan.

Problem
    A change of one tensor may break the rule that nothing is recomputed from a lossy tensor. Find the closure of the
    change: the smallest set of further changes, by fixed choices, after which the rule holds again.

Method
    A tensor turned lossy: its recomputed readers are stored, exact or lossy. A tensor turned recomputed: each source
    that is lossy or not needed so far is recomputed, up to ``depth`` ops away, and stored exactly beyond. Both may ask
    for more changes, until nothing is left or the closure has more than ``MAX_CHAIN`` tensors.
"""

from __future__ import annotations

from fxhybrid.ir.dominance import undominated
from fxhybrid.solvers.mps.plan_state import PlanState
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, SAVED, ProblemTables

Changes = dict[int, int]
Todo = list[tuple[int, int]]  # tensors changed, and how many ops away from each more may be recomputed
MAX_CHAIN = 12


class Neighbourhood:
    """The codes that each tensor may take within an error limit, and the moves between them.

    Attributes:
        state: the plan from which moves lead.
        codes: per candidate tensor, its codes; dominated codecs are left out.
        lossless_code: per candidate tensor, the smallest form that gives back the same bits.
    """

    def __init__(self, state: PlanState, max_error: float) -> None:
        self.state = state
        self.tables = state.tables
        self.codes: dict[int, list[int]] = {}
        self.lossless_code: dict[int, int] = {}
        for t in self.tables.problem.candidates:
            codecs = _codec_codes(self.tables, t, max_error)
            self.lossless_code[t] = self._smallest_exact(t, codecs)
            self.codes[t] = [SAVED, *codecs, *([RECOMPUTED] if self.may_recompute(t) else [])]

    def _smallest_exact(self, t: int, codes: list[int]) -> int:
        exact = (code for code in codes if not self.tables.is_lossy[t][code])
        return min(exact, key=lambda code: self.stored_bytes(t, code), default=SAVED)

    def _most_exact(self, t: int) -> int | None:
        lossy = (code for code in self.codes[t] if self.tables.is_lossy[t][code])
        return min(lossy, key=lambda code: self.error2(t, code), default=None)

    def may_recompute(self, t: int) -> bool:
        """Whether RECOMPUTE is offered at all."""
        o = self.tables.producer[t]
        return self.tables.default_codes[t] == RECOMPUTED or self.tables.problem.forward[o].recomputable

    def stored_bytes(self, t: int, code: int) -> int:
        """Returns what the tensor occupies between forward and backward."""
        if code == SAVED:
            return self.tables.size_bytes[t]
        return 0 if code == RECOMPUTED else self.tables.option(t, code).encoded_bytes

    def error2(self, t: int, code: int) -> float:
        """Returns the squared error that ``code`` adds."""
        return self.tables.option(t, code).error ** 2 if self.tables.is_lossy[t][code] else 0.0

    def repair(self, t: int, code: int, depth: int) -> Changes | None:
        """Returns the change of ``t`` to ``code`` with its closure; None if there is no valid one.

        Args:
            t: tensor to change.
            code: its new code.
            depth: recompute missing sources up to so many ops away, and keep those beyond; if not 0, let readers turn
                lossy too (else exact).
        """
        changes: Changes = {t: code}
        todo = [(t, depth)]
        while todo:
            u, depth = todo.pop()
            ok = self._store_readers(u, changes, todo, depth)
            if not ok or (changes[u] == RECOMPUTED and not self._provide_sources(u, changes, todo, depth)):
                return None
            if len(changes) > MAX_CHAIN:
                return None
        return changes

    def _store_readers(self, u: int, changes: Changes, todo: Todo, depth: int) -> bool:
        """Stores what is recomputed from ``u`` if that turned lossy; False if an earlier change forbids it."""
        tables, state = self.tables, self.state
        if not tables.is_lossy[u][changes[u]]:
            return True
        for i in tables.readers[u]:
            for q in tables.made[i]:
                code = changes.get(q, state.codes[q])
                if state.use[q] == NEVER or code != RECOMPUTED or q in tables.held:
                    continue
                if q in changes:
                    return False
                lossy = self._most_exact(q) if depth else None
                changes[q] = self.lossless_code[q] if lossy is None else lossy
                todo.append((q, depth))
        return True

    def _provide_sources(self, u: int, changes: Changes, todo: Todo, depth: int) -> bool:
        """Recomputes or stores exactly what the op of ``u`` reads; False if an earlier change forbids it."""
        tables, state = self.tables, self.state
        for s in tables.read[tables.producer[u]]:
            if s in tables.held:
                continue
            needed = state.use[s] < NEVER
            if tables.is_lossy[s][changes.get(s, state.codes[s])]:
                if s in changes:
                    return False
            elif needed or s in changes:
                continue
            again = self.may_recompute(s) and (depth > 0 or tables.default_codes[s] == RECOMPUTED)
            changes[s] = RECOMPUTED if again else self.lossless_code[s] if needed else SAVED
            if again:
                todo.append((s, max(depth - 1, 0)))
        return True


def _codec_codes(tables: ProblemTables, t: int, max_error: float) -> list[int]:
    """Returns the codes of the codecs that save bytes within the error limit, dominated ones left out."""
    tensor = tables.problem.tensors[t]
    useful = (
        j
        for j, option in enumerate(tensor.codecs)
        if option.encoded_bytes < tensor.size_bytes and (option.lossless or option.error <= max_error)
    )
    return [FIRST_CODEC + j for j in undominated(tensor.codecs, useful)]
