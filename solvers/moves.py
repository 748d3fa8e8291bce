"""Moves between plans, with estimates of what each does to the heights, the added time and the error.

A move changes one tensor's action and whatever must follow (``Choices.complete``). An estimate is a few
intervals of slots with the bytes that come or go there; ``Footprints.measure`` has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fxhybrid.solvers.choices import Changes, Choices
from fxhybrid.solvers.footprint import Footprint
from fxhybrid.solvers.grid import FIRST_CODEC, RECOMPUTED, SAVED, State

Interval = tuple[int, int, int]
MAX_INTERVALS = 12
Floats = npt.NDArray[np.float64]


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
        kept_s = problem.forward[producer].seconds if producer in problem.fused_masks else 0.0
        seconds = kept_s if new != RECOMPUTED else 0.0
        if new >= FIRST_CODEC:
            seconds += codecs[new - FIRST_CODEC].encode_s + codecs[new - FIRST_CODEC].decode_s
        elif new == RECOMPUTED and producer not in mark.reruns:
            seconds += op_s
        if mark.needed[u]:
            old = state[u]
            seconds -= kept_s if old != RECOMPUTED else 0.0
            if old >= FIRST_CODEC:
                seconds -= codecs[old - FIRST_CODEC].encode_s + codecs[old - FIRST_CODEC].decode_s
            elif old == RECOMPUTED:
                others = problem.forward[producer].outputs
                if not any(q != u and mark.needed[q] and state[q] == RECOMPUTED for q in others):
                    seconds -= op_s
        return seconds

    def _own(self, intervals: list[Interval], u: int, new: int, old: int | None, use: int, mark: Footprint) -> None:
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
