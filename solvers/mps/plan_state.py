"""What follows when a few tensors change: who is needed, who runs again, who lives from where to where.

Two facts of ``lower`` make this local. An op runs again at most once, where the first of its recomputed outputs
is first needed: ``use[t] = min(first backward read, rerun[o] for readers o)``, ``rerun[o] = min use[t] over its
recomputed outputs t``. And what happens between two ops of the grid (encodings after a forward op, decodings and
reruns before a backward op: a group) is the same relative to the height after it, wherever that is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.mps.live_ranges import NO_GROUP, Life, Lives
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, Ints, State


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


@dataclass(frozen=True)
class Footprint:
    """What one state costs.

    Attributes:
        peak_bytes: highest point of the step.
        overhead_s: seconds beyond running every op once.
        error2: sum of squared lossy errors.
    """

    peak_bytes: int
    overhead_s: float
    error2: float


class Footprints(Settling):
    """Measures states of one problem, each by what differs from the one before.

    Attributes:
        moves: how many have been made so far.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._default = bytes(self.default)
        self._named: dict[int, list[Action]] = {
            t: [SAVE, RECOMPUTE, *(Compress(o.codec) for o in problem.tensors[t].codecs)] for t in problem.candidates
        }
        self.moves = 0
        self._settle(range(self.n_forward), set(problem.producer))

    # -- what the present state costs ----------------------------------------------------------------------

    @property
    def valid(self) -> bool:
        """Whether every recomputation is allowed and reads exact tensors."""
        return self._invalid == 0

    def heights(self) -> Ints:
        """Bytes per slot of the grid, the highest within the slot."""
        if self._heights is None:
            self._heights = self._live + np.maximum(self._top, self._group)
        return self._heights

    def footprint(self) -> Footprint:
        """The figures of the present state."""
        peak = int(self.heights().max()) if self.n_ops else self.problem.resident_bytes
        return Footprint(peak, self.overhead_s, self.error2)

    @property
    def overhead_s(self) -> float:
        """Seconds beyond running every op once; what rounding leaves of nothing is nothing."""
        return self._seconds if self._seconds > 1e-12 * self.problem.step_s else 0.0

    def exact_overhead_s(self) -> float:
        """``overhead_s`` summed up from nothing, to the last bit as the simulator has it."""
        forward = self.problem.forward
        seconds = [op.seconds for op in self.problem.backward]
        seconds += [op.seconds for op, runs in zip(forward, self._runs, strict=True) if runs]
        seconds += [forward[o].seconds for o, at in enumerate(self.rerun) if at < NEVER and o not in self.fused_at]
        for t in np.flatnonzero(np.frombuffer(bytes(self.state), np.uint8) >= FIRST_CODEC).tolist():
            if self.use[t] < NEVER:
                option = self.option(t, self.state[t])
                seconds += [option.encode_s, option.decode_s]
        return max(math.fsum(seconds) - self.problem.step_s, 0.0)

    @property
    def error2(self) -> float:
        """Sum of squared lossy errors."""
        return max(self._error2, 0.0) if self._lossy else 0.0

    def measure(self, state: State) -> Footprint | None:
        """Moves to ``state``; its footprint, or None if an op would be recomputed from a lossy tensor."""
        self.move(self.changes_to(bytes(state)))
        return self.footprint() if self.valid else None

    def actions(self) -> dict[int, Action]:
        """The state as actions; defaults and what backward does not want are left out."""
        state, use, named = self.state, self.use, self._named
        return {t: named[t][state[t]] for t in self.changes_to(self._default) if t in named and use[t] < NEVER}

    def codes(self, actions: Actions) -> bytes | None:
        """The state in which ``actions`` are taken, and the default where they name nothing; None if there is none.

        Plans from elsewhere may hold what no state stands for: tensors made again more than once.
        """
        state = self.default.copy()
        for t, action in actions.items():
            if action not in self._named.get(t, ()):
                return None
            state[t] = self._named[t].index(action)
        return bytes(state)

    def changes_to(self, codes: bytes) -> dict[int, int]:
        """What differs in another state, with its codes."""
        there, here = np.frombuffer(codes, np.uint8), np.frombuffer(bytes(self.state), np.uint8)
        changed: list[int] = np.flatnonzero(there != here).tolist()
        return {t: codes[t] for t in changed}

    # -- moving to another state ---------------------------------------------------------------------------

    def effect(self, changes: Mapping[int, int]) -> tuple[dict[int, int], float, float] | None:
        """What a move would do: bytes that come or go from a slot on, added seconds and squared error.

        None if it is invalid.
        """
        if len(changes) == 1:
            ((t, code),) = changes.items()
            if RECOMPUTED not in (code, self.state[t]) and self.use[t] < NEVER:
                return self._swap(t, code)
        seconds, error2 = self._seconds, self._error2
        self._trying = True
        self.move(changes)
        found = (self._steps, self._seconds - seconds, self._error2 - error2) if self.valid else None
        self.undo()
        self._trying = False
        return found

    def _swap(self, t: int, code: int) -> tuple[dict[int, int], float, float] | None:
        """``effect`` of storing ``t`` in another form: nothing else is needed earlier or later for it."""
        before = self.state[t]
        lossy = self.lossy(t, code) - self.lossy(t, before)
        if self._invalid + lossy * sum(self.rerun[o] < NEVER for o in self.readers[t]):
            return None
        self.state[t] = code
        old, new = self._lives[t], self._life(t, *self._last_uses(t))
        self.state[t] = before
        steps = dict(new.steps)
        for at, size in old.steps:
            steps[at] = steps.get(at, 0) - size
        return steps, new.seconds - old.seconds, new.error2 - old.error2

    def move(self, changes: Mapping[int, int]) -> dict[int, int]:
        """Gives the tensors in ``changes`` new codes; returns the changes that lead back."""
        self.moves += 1
        self._begin()
        back = {t: self.state[t] for t, code in changes.items() if code != self.state[t]}
        for t, old in back.items():
            lossy = self.lossy(t, changes[t]) - self.lossy(t, old)
            if lossy:
                self._invalid += lossy * sum(self.rerun[o] < NEVER for o in self.readers[t])
            self._set(self.state, t, changes[t])
        self._settle({self.producer[t] for t in back}, set(back))
        return back
