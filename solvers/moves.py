"""Moves between plans, with estimates of what each does to the heights, the added time and the error.

A move changes one tensor's action and whatever must follow: readers that were recomputed from it when it turns
lossy, sources that must be exact when it is recomputed. An estimate is a few intervals of slots with the bytes
that come or go there; ``Footprints.measure`` has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from fxhybrid.problem import CodecOption
from fxhybrid.solvers.footprint import FIRST_CODEC, RECOMPUTED, SAVED, Footprint, Footprints, State

Changes = dict[int, int]
Interval = tuple[int, int, int]
MAX_INTERVALS = 12
MAX_CHAIN = 12
Floats = npt.NDArray[np.float64]


class Choices:
    """The codes that each tensor may take, dominated codecs left out."""

    def __init__(
        self, base: Footprints, max_error: float, allow: Callable[[CodecOption], bool], recompute: bool
    ) -> None:
        problem = base.problem
        self.base = base
        self.recompute = recompute
        self.codes: dict[int, list[int]] = {}
        self.lossless: dict[int, int] = {}  # smallest exact stored form
        count = len(problem.tensors)
        self.readers: list[list[int]] = [[] for _ in range(count)]
        for i, op in enumerate(problem.forward):
            for t in op.inputs:
                self.readers[t].append(i)
        for t in problem.candidates:
            options = problem.tensors[t].codecs
            kept = [
                j
                for j, o in enumerate(options)
                if o.encoded_bytes < problem.tensors[t].size_bytes and allow(o) and (o.lossless or o.error <= max_error)
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
        return self.base.default[t] == RECOMPUTED or (self.recompute and self.base.problem.forward[op].recomputable)

    def lossy(self, t: int, code: int) -> bool:
        """Whether ``code`` gives back other bits."""
        return code >= FIRST_CODEC and not self.base.problem.tensors[t].codecs[code - FIRST_CODEC].lossless

    def stored_bytes(self, t: int, code: int) -> int:
        """What the tensor occupies between forward and backward."""
        if code == SAVED:
            return int(self.base.size[t])
        return 0 if code == RECOMPUTED else self.base.problem.tensors[t].codecs[code - FIRST_CODEC].encoded_bytes

    def error2(self, t: int, code: int) -> float:
        """Squared error that ``code`` adds."""
        return self.base.problem.tensors[t].codecs[code - FIRST_CODEC].error ** 2 if self.lossy(t, code) else 0.0

    def complete(self, state: State, needed: bytearray, t: int, code: int, deep: bool) -> Changes | None:
        """The change of ``t`` to ``code`` with all that must follow; None if impossible.

        Args:
            state: present codes.
            needed: which tensors backward wants at present.
            t: tensor to change.
            code: its new code.
            deep: recompute missing sources too (else keep them); let readers turn lossy too (else keep them exact).
        """
        changes: Changes = {t: code}
        todo = [t]
        while todo:
            u = todo.pop()
            ok = self._free_readers(state, needed, u, changes, todo, deep)
            if not ok or (changes[u] == RECOMPUTED and not self._fix_sources(state, needed, u, changes, todo, deep)):
                return None
            if len(changes) > MAX_CHAIN:
                return None
        return changes

    def _free_readers(
        self, state: State, needed: bytearray, u: int, changes: Changes, todo: list[int], deep: bool
    ) -> bool:
        if not self.lossy(u, changes[u]):
            return True
        for i in self.readers[u]:
            for q in self.base.problem.forward[i].outputs:
                if not needed[q] or changes.get(q, state[q]) != RECOMPUTED or q in self.base.held:
                    continue
                if q in changes:
                    return False
                codes = [c for c in self.codes[q] if c >= FIRST_CODEC and self.lossy(q, c)] if deep else []
                changes[q] = min(codes, key=lambda c: self.error2(q, c)) if codes else self.lossless[q]
                todo.append(q)
        return True

    def _fix_sources(
        self, state: State, needed: bytearray, u: int, changes: Changes, todo: list[int], deep: bool
    ) -> bool:
        for s in self.base.problem.forward[self.base.producer[u]].inputs:
            if s in self.base.held:
                continue
            code = changes.get(s, state[s])
            if self.lossy(s, code):
                if s in changes:
                    return False
            elif needed[s] or s in changes:
                continue
            again = self.may_recompute(s) and (deep or self.base.default[s] == RECOMPUTED)
            changes[s] = RECOMPUTED if again else self.lossless[s] if needed[s] else SAVED
            if again:
                todo.append(s)
        return True


def _dominates(a: CodecOption, b: CodecOption, first: bool) -> bool:
    mine = (a.encoded_bytes, a.encode_s + a.decode_s, a.error, not a.lossless, a.encode_rise_bytes, a.decode_rise_bytes)
    other = (b.encoded_bytes, b.encode_s + b.decode_s, b.error, not b.lossless, b.encode_rise_bytes, b.decode_rise_bytes)
    return all(x <= y for x, y in zip(mine, other, strict=True)) and (mine != other or first)


class MoveTable:
    """Every move from a state, as arrays: one row per tensor, target code and variant."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.base = choices.base
        floor = int(self.base.size.sum()) * 1e-6
        self.rows_of: dict[int, list[int]] = {}
        self.row: list[tuple[int, int, bool]] = []
        for t, codes in choices.codes.items():
            if len(codes) < 2 or self.base.size[t] <= floor or t in self.base.held:
                continue
            first = len(self.row)
            for code in codes:
                self.row.append((t, code, False))
                if code != SAVED and (code == RECOMPUTED or choices.lossy(t, code)):
                    self.row.append((t, code, True))
            self.rows_of[t] = list(range(first, len(self.row)))
        n = len(self.row)
        self.begin = np.zeros((n, MAX_INTERVALS), np.int64)
        self.end = np.zeros((n, MAX_INTERVALS), np.int64)
        self.delta = np.zeros((n, MAX_INTERVALS))
        self.seconds = np.zeros(n)
        self.error2 = np.zeros(n)
        self.valid = np.zeros(n, bool)
        self.changes: list[Changes | None] = [None] * n

    def refresh(self, state: State, mark: Footprint, tensors: Iterable[int] | None = None) -> None:
        """Estimates the moves of ``tensors`` (all if None) anew."""
        for t in self.rows_of if tensors is None else tensors:
            seen: list[Changes] = []
            for r in self.rows_of.get(t, ()):
                _, code, deep = self.row[r]
                self.valid[r] = False
                if not mark.needed[t] or state[t] == code:
                    continue
                changes = self.choices.complete(state, mark.needed, t, code, deep)
                if changes is not None and changes not in seen:
                    seen.append(changes)
                    self._estimate(r, t, changes, state, mark)

    def near(self, changed: Iterable[int]) -> set[int]:
        """Tensors whose estimates a change of ``changed`` may alter: two steps along sources and readers."""
        found = set(changed)
        edge = set(found)
        forward = self.base.problem.forward
        for _ in range(2):
            step: set[int] = set()
            for t in edge:
                step.update(forward[self.base.producer[t]].inputs)
                for i in self.choices.readers[t][:8]:
                    step.update(forward[i].outputs)
            edge = step - found
            found |= edge
        return found

    def gains(self, price: Floats) -> Floats:
        """Price-weighted bytes that each row frees; ``price`` is per slot."""
        total = np.concatenate([[0.0], np.cumsum(price)])
        result: Floats = -(self.delta * (total[self.end] - total[self.begin])).sum(1)
        return result

    def _estimate(self, r: int, t: int, changes: Changes, state: State, mark: Footprint) -> None:
        intervals: list[Interval] = []
        seconds = error2 = 0.0
        for u, new in changes.items():
            needed = bool(mark.needed[u])
            seconds += self._seconds(u, new, mark, changes, state)
            error2 += self.choices.error2(u, new)
            if needed:
                error2 -= self.choices.error2(u, state[u])
            use = mark.use[u] if needed else mark.use[t]
            self._own(intervals, u, new, state[u] if needed else None, use, mark)
            if new == RECOMPUTED:
                self._lengthen(intervals, u, use, changes, state, mark)
            elif needed and state[u] == RECOMPUTED:
                self._shorten(intervals, u, use, state, mark)
        intervals = [(a, b, d) for a, b, d in intervals if a < b and d]
        if len(intervals) > MAX_INTERVALS:
            return
        self.begin[r] = self.end[r] = 0
        self.delta[r] = 0.0
        for k, (a, b, d) in enumerate(intervals):
            self.begin[r, k], self.end[r, k], self.delta[r, k] = a, b, d
        self.seconds[r], self.error2[r] = seconds, error2
        self.changes[r] = changes
        self.valid[r] = True

    def _seconds(self, u: int, new: int, mark: Footprint, changes: Changes, state: State) -> float:
        problem = self.base.problem
        codecs = problem.tensors[u].codecs
        producer = self.base.producer[u]
        op_s = 0.0 if producer in problem.deferrable else problem.forward[producer].seconds
        seconds = 0.0
        if new >= FIRST_CODEC:
            seconds += codecs[new - FIRST_CODEC].encode_s + codecs[new - FIRST_CODEC].decode_s
        elif new == RECOMPUTED and producer not in mark.reruns:
            seconds += op_s
        if mark.needed[u]:
            old = state[u]
            if old >= FIRST_CODEC:
                seconds -= codecs[old - FIRST_CODEC].encode_s + codecs[old - FIRST_CODEC].decode_s
            elif old == RECOMPUTED:
                others = problem.forward[producer].outputs
                if not any(q != u and mark.needed[q] and state[q] == RECOMPUTED for q in others):
                    seconds -= op_s
        return seconds

    def _own(
        self, intervals: list[Interval], u: int, new: int, old: int | None, use: int, mark: Footprint
    ) -> None:
        stored = self.choices.stored_bytes(u, new)
        before = 0 if old is None else self.choices.stored_bytes(u, old)
        begin = max(mark.last_read[u], self.base.producer[u]) + 1
        intervals.append((begin, use, stored - before))
        if old is None:
            intervals.append((use, use + 1, int(self.base.size[u])))
        was = before if old is not None and old >= FIRST_CODEC else 0
        intervals.append((use, use + 1, (stored if new >= FIRST_CODEC else 0) - was))

    def _lengthen(
        self, intervals: list[Interval], u: int, use: int, changes: Changes, state: State, mark: Footprint
    ) -> None:
        """The sources of a recomputation live until it."""
        for s in self.base.problem.forward[self.base.producer[u]].inputs:
            if s in self.base.held or not mark.needed[s]:
                continue
            size = int(self.base.size[s])
            if mark.last_use[s] < use:
                intervals.append((mark.last_use[s] + 1, use + 1, size))
            code = changes.get(s, state[s])
            if code != SAVED and use < mark.use[s]:
                intervals.append((use, mark.use[s], size - self.choices.stored_bytes(s, code)))

    def _shorten(self, intervals: list[Interval], u: int, use: int, state: State, mark: Footprint) -> None:
        """Sources read by no other recomputation die earlier, or are made later."""
        producer = self.base.producer[u]
        for s in self.base.problem.forward[producer].inputs:
            if s in self.base.held or any(i != producer and i in mark.reruns for i in self.choices.readers[s]):
                continue
            size, stored = int(self.base.size[s]), self.choices.stored_bytes(s, state[s])
            first, last = int(self.base.first_run[s]), int(self.base.last_run[s])
            if first < 0:
                intervals.append((mark.last_read[s] + 1, use, -stored))
                intervals.append((use, use + 1, -size))
                continue
            first, last = first + self.base.n_forward, last + self.base.n_forward
            if last < use:
                intervals.append((last + 1, use + 1, -size))
            if state[s] != SAVED and use < first:
                intervals.append((use, first, stored - size))
