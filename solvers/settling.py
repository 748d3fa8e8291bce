"""What follows when a few tensors change: who is needed, who runs again, who lives from where to where.

Two facts of ``lower`` make this local. An op runs again at most once, where the first of its recomputed outputs
is first needed: ``use[t] = min(first backward read, rerun[o] for readers o)``, ``rerun[o] = min use[t] over its
recomputed outputs t``. And what happens between two ops of the grid (encodings after a forward op, decodings and
reruns before a backward op: a group) is the same relative to the height after it, wherever that is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.grid import FIRST_CODEC, NEVER, RECOMPUTED, Ints
from fxhybrid.solvers.lives import NO_GROUP, Life, Lives


class Settling(Lives):
    """The present state with what follows from it, kept up to date, and with what it was before the last move."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._live = self.base_live.copy()
        self._heights: Ints | None = None
        self._top = self.base_top.copy()
        self._group = np.full(self.n_slots, NO_GROUP, np.int64)
        self._seconds, self._error2 = self.base_s, 0.0
        self._lossy = self._invalid = 0
        self._trying = False  # nobody will look at the heights of this move
        self._begin()

    def _begin(self) -> None:
        """What changes from here on, ``undo`` can take back."""
        self._steps: defaultdict[int, int] = defaultdict(int)
        self._old: list[tuple[Any, int, Any]] = []
        self._put_or_taken: list[tuple[int, int, bool]] = []
        self._before = (self._live, self._heights, self._seconds, self._error2, self._lossy, self._invalid)

    def undo(self) -> None:
        """Takes the last move back."""
        for values, key, old in reversed(self._old):
            values[key] = old
        for slot, member, put in reversed(self._put_or_taken):
            (self._members[slot].discard if put else self._members[slot].add)(member)
        self._live, self._heights, self._seconds, self._error2, self._lossy, self._invalid = self._before

    def _set(self, values: Any, key: int, new: object) -> None:
        self._old.append((values, key, values[key]))
        values[key] = new

    def _settle(self, ops: Iterable[int], dirty: set[int]) -> None:
        """Works out anew what depends on ``ops`` and on the tensors in ``dirty``."""
        slots: set[int] = set()
        self._settle_ops(ops, dirty, slots)
        self._settle_lives(dirty, slots)
        if self._trying:
            return
        self._heights = None
        if self._steps:
            steps = np.zeros(self.n_slots, np.int64)
            steps[list(self._steps)] = list(self._steps.values())
            self._live = self._live + np.cumsum(steps)
        for slot in slots:
            self._set(self._group, slot, self._group_height(slot))

    def _settle_ops(self, ops: Iterable[int], dirty: set[int], slots: set[int]) -> None:
        """Who is needed from when and who runs again, readers first; whose lives that may alter is ``dirty`` then."""
        state, use, rerun, old = self.state, self.use, self.rerun, self._old
        heap = [-o for o in ops]
        heapify(heap)
        queued = set(heap)
        while heap:
            o = -heappop(heap)
            at = NEVER
            for t in self.made[o]:
                first = self.first_run[t]
                for r in self.readers[t]:
                    if rerun[r] < first:
                        first = rerun[r]
                if first != use[t]:
                    old.append((use, t, use[t]))
                    use[t] = first
                    dirty.add(t)
                if first < at and state[t] == RECOMPUTED:
                    at = first
            changed = at != rerun[o]
            if changed:
                self._run_again(o, at, slots)
            if o in self.optional and self._settle_run(o):
                changed = True
            if changed:
                dirty.update(self.touched[o])
                for source in self.sources[o]:
                    if -source not in queued:
                        queued.add(-source)
                        heappush(heap, -source)

    def _run_again(self, o: int, at: int, slots: set[int]) -> None:
        """Lets ``o`` run again before the backward op ``at``."""
        old = self.rerun[o]
        self._set(self.rerun, o, at)
        fused = o in self.fused_at
        if not self._trying:
            if fused:
                slot = self.fused_at[o]
                self._set(self._top, slot, self.fused_top[o] if at < NEVER else self.base_top[slot])
            else:
                for p, put in ((old, False), (at, True)):
                    if p < NEVER:
                        self._put(self.slot(p), ~o, put, slots)
        if (at < NEVER) != (old < NEVER):
            sign = 1 if at < NEVER else -1
            op = self.problem.forward[o]
            if not fused:
                self._seconds += sign * op.seconds
            if not op.recomputable:
                self._invalid += sign
            for t in self.read[o]:
                if self.state[t] >= FIRST_CODEC and self.lossy(t, self.state[t]):
                    self._invalid += sign

    def _settle_run(self, o: int) -> bool:
        """Whether ``o``, which only serves the backward pass, runs in the forward pass; says whether that changed."""
        stored = any(self.use[t] < NEVER and self.state[t] != RECOMPUTED for t in self.made[o])
        runs = stored or any(self._runs[r] for t in self.made[o] for r in self.readers[t])
        if runs == self._runs[o]:
            return False
        self._set(self._runs, o, runs)
        self._seconds += (1 if runs else -1) * self.problem.forward[o].seconds
        if not self._trying:
            self._set(self._top, o, self.optional[o] if runs else 0)
        return True

    def _settle_lives(self, dirty: set[int], slots: set[int]) -> None:
        """Who lives from where to where, and what that costs."""
        steps, trying = self._steps, self._trying
        for t in dirty:
            read, last = self._last_uses(t)
            old, new = self._lives[t], self._life(t, read, last)
            if not trying and last // 2 != self.last_use[t]:
                self._set(self.last_use, t, last // 2)
            if old is new or old == new:
                continue
            for at, size in old.steps:
                steps[at] -= size
            for at, size in new.steps:
                steps[at] += size
            if old.code >= FIRST_CODEC:
                self._count(old, -1)
            if new.code >= FIRST_CODEC:
                self._count(new, 1)
            if not trying:
                self._set(self._lives, t, new)
                self._settle_groups(t, old, new, slots)

    def _count(self, life: Life, sign: int) -> None:
        self._seconds += sign * life.seconds
        self._lossy += sign * life.lossy
        self._error2 += sign * life.error2

    def _settle_groups(self, t: int, old: Life, new: Life, slots: set[int]) -> None:
        """Notes the slots whose decodings and reruns are others, as ``t`` has a ``new`` life."""
        for life, put in ((old, False), (new, True)):
            if life.code >= FIRST_CODEC:
                self._put(life.encoded_at, t, put, slots)
                self._put(life.decoded_at, t, put, slots)
            if life.group_death >= 0:
                slots.add(life.group_death)
        rerun = self.rerun[self.producer[t]]
        if rerun < NEVER:
            slots.add(self.slot(rerun))

    def _put(self, slot: int, member: int, put: bool, slots: set[int]) -> None:
        if put:
            self._members[slot].add(member)
        else:
            self._members[slot].discard(member)
        self._put_or_taken.append((slot, member, put))
        slots.add(slot)
