"""Which actions each tensor may take, and what must follow when one changes."""

from __future__ import annotations

from fxhybrid.ir.problem import CodecOption
from fxhybrid.solvers.mps.plan_state import Footprints
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, SAVED

Changes = dict[int, int]
Todo = list[tuple[int, int]]  # tensors changed, and how many ops away from each more may be recomputed
MAX_CHAIN = 12


class Choices:
    """The codes that each tensor may take, dominated codecs left out."""

    def __init__(self, base: Footprints, max_error: float) -> None:
        problem = base.problem
        self.base = base
        self.codes: dict[int, list[int]] = {}
        self.lossless: dict[int, int] = {}  # smallest exact stored form
        for t in problem.candidates:
            options = problem.tensors[t].codecs
            kept = [
                j
                for j, o in enumerate(options)
                if o.encoded_bytes < problem.tensors[t].size_bytes and (o.lossless or o.error <= max_error)
            ]
            kept = [j for j in kept if not any(_dominates(options[k], options[j], k < j) for k in kept if k != j)]
            exact = [j for j in kept if options[j].lossless]
            smallest = min(exact, key=lambda j: options[j].encoded_bytes, default=None)
            self.lossless[t] = SAVED if smallest is None else FIRST_CODEC + smallest
            codes = [SAVED, *(FIRST_CODEC + j for j in kept)]
            if self.may_recompute(t):
                codes.append(RECOMPUTED)
            self.codes[t] = codes

    def may_recompute(self, t: int) -> bool:
        """Whether RECOMPUTE is offered at all."""
        op = self.base.producer[t]
        return self.base.default[t] == RECOMPUTED or self.base.problem.forward[op].recomputable

    def stored_bytes(self, t: int, code: int) -> int:
        """What the tensor occupies between forward and backward."""
        if code == SAVED:
            return self.base.sizes[t]
        return 0 if code == RECOMPUTED else self.base.problem.tensors[t].codecs[code - FIRST_CODEC].encoded_bytes

    def error2(self, t: int, code: int) -> float:
        """Squared error that ``code`` adds."""
        return self.base.problem.tensors[t].codecs[code - FIRST_CODEC].error ** 2 if self.base.lossy(t, code) else 0.0

    def complete(self, t: int, code: int, depth: int) -> Changes | None:
        """The change of ``t`` to ``code`` with all that must follow; None if impossible.

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
            ok = self._free_readers(u, changes, todo, depth)
            if not ok or (changes[u] == RECOMPUTED and not self._fix_sources(u, changes, todo, depth)):
                return None
            if len(changes) > MAX_CHAIN:
                return None
        return changes

    def _free_readers(self, u: int, changes: Changes, todo: Todo, depth: int) -> bool:
        base = self.base
        if not base.lossy(u, changes[u]):
            return True
        for i in base.readers[u]:
            for q in base.made[i]:
                if base.use[q] == NEVER or changes.get(q, base.state[q]) != RECOMPUTED or q in base.held:
                    continue
                if q in changes:
                    return False
                codes = [c for c in self.codes[q] if base.lossy(q, c)] if depth else []
                changes[q] = min(codes, key=lambda c: self.error2(q, c)) if codes else self.lossless[q]
                todo.append((q, depth))
        return True

    def _fix_sources(self, u: int, changes: Changes, todo: Todo, depth: int) -> bool:
        base = self.base
        for s in base.read[base.producer[u]]:
            if s in base.held:
                continue
            needed = base.use[s] < NEVER
            code = changes.get(s, base.state[s])
            if base.lossy(s, code):
                if s in changes:
                    return False
            elif needed or s in changes:
                continue
            again = self.may_recompute(s) and (depth > 0 or base.default[s] == RECOMPUTED)
            changes[s] = RECOMPUTED if again else self.lossless[s] if needed else SAVED
            if again:
                todo.append((s, max(depth - 1, 0)))
        return True


def _dominates(a: CodecOption, b: CodecOption, first: bool) -> bool:
    mine = (
        a.encoded_bytes,
        a.encode_s + a.decode_s,
        a.error,
        not a.lossless,
        a.encode_alloc_peak_bytes,
        a.decode_alloc_peak_bytes,
    )
    other = (
        b.encoded_bytes,
        b.encode_s + b.decode_s,
        b.error,
        not b.lossless,
        b.encode_alloc_peak_bytes,
        b.decode_alloc_peak_bytes,
    )
    return all(x <= y for x, y in zip(mine, other, strict=True)) and (mine != other or first)
