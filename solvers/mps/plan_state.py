"""One plan with its cost, kept up to date while a few tensors change at a time.

Problem
    What a change of some tensors' codes does to the heights, the overhead and the error, without lowering and
    simulating the whole plan again.

Data
    f[t]     first backward op that reads tensor t          R(t)   forward ops that read t
    O(o)     tensors that op o makes                        A      tensors whose code is RECOMPUTED

Method
    Two facts of ``lower`` make the effect of a change local. An op runs again at most once, where the first of its
    recomputed outputs is first needed:

        use[t]   = min(f[t], min over o in R(t) of rerun[o])
        rerun[o] = min over t in O(o) and A of use[t]

    And the instructions between two ops reach equally high above the height after them, wherever that is
    (``instruction_groups``). So ``apply`` walks from the changed tensors' ops to their sources as long as something
    differs, then adds the differences of live ranges. ``undo`` restores the values that the last ``apply`` replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from fxhybrid.ir.plan import Action
from fxhybrid.solvers.mps.instruction_groups import NO_GROUP, group_height
from fxhybrid.solvers.mps.live_ranges import LiveRange, LiveRanges
from fxhybrid.solvers.mps.plan_arrays import PlanArrays, exact_overhead_s
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, Ints, ProblemTables

ROUNDING = 1e-12  # of the step: what sums of differences may leave of an overhead of nothing
Effect = tuple[dict[int, int], float, float]  # bytes that come or go from a slot on, overhead in s, squared error


@dataclass(frozen=True)
class PlanCost:
    """What one plan costs.

    Attributes:
        peak_bytes: highest point of the step.
        overhead_s: seconds beyond running every op once.
        error2: sum of squared lossy errors.
    """

    peak_bytes: int
    overhead_s: float
    error2: float


class PlanState:
    """Evaluates plans of one problem, each by what differs from the one before.

    Attributes:
        tables: of the problem.
        codes: per tensor, its present code; read only.
        use: per tensor, backward op before which it is first needed, or NEVER; read only.
        rerun: per forward op, backward op before which it runs again, or NEVER; read only.
        n_applied: how many changes have been applied so far; the measure of a search's work.
    """

    def __init__(self, tables: ProblemTables) -> None:
        self.tables = tables
        self._plan = PlanArrays.empty(tables)
        self.codes, self.use, self.rerun = self._plan.codes, self._plan.use, self._plan.rerun
        self._ranges = LiveRanges(tables)
        # what every evaluation reads; a cached property takes longer to read
        self._use_tables = (tables.base_read, tables.base_last, tables.readers, tables.optional_users, tables.fused_at)
        self._first_backward_slot = tables.slot(0)
        self._live = tables.base_live
        self._heights: Ints | None = None
        self._top = tables.base_top.copy()
        self._group = np.full(tables.n_slots, NO_GROUP, np.int64)
        self._seconds, self._error2 = tables.base_s, 0.0
        self._n_lossy = self._n_invalid = 0
        self.n_applied = 0
        self._begin()
        self._propagate(range(tables.n_forward), set(tables.problem.producer))

    # -- what the present plan costs -----------------------------------------------------------------------

    @property
    def valid(self) -> bool:
        """Whether every recomputation is allowed and reads exact tensors."""
        return self._n_invalid == 0

    def heights(self) -> Ints:
        """Returns bytes per slot, the highest within the slot."""
        if self._heights is None:
            self._heights = self._live + np.maximum(self._top, self._group)
        return self._heights

    def cost(self) -> PlanCost:
        """Returns the figures of the present plan."""
        return PlanCost(int(self.heights().max()), self.overhead_s, self.error2)

    @property
    def overhead_s(self) -> float:
        """Seconds beyond running every op once; what rounding leaves of nothing is nothing."""
        return self._seconds if self._seconds > ROUNDING * self.tables.problem.step_s else 0.0

    def exact_overhead_s(self) -> float:
        """Returns ``overhead_s`` summed up from nothing, to the last bit as the simulator has it."""
        return exact_overhead_s(self.tables, self._plan)

    @property
    def error2(self) -> float:
        """Sum of squared lossy errors."""
        return max(self._error2, 0.0) if self._n_lossy else 0.0

    def actions(self) -> dict[int, Action]:
        """Returns the plan as actions; defaults and what backward does not want are left out."""
        named = self.tables.actions
        changed = self.changes_to(bytes(self.tables.default_codes))
        return {t: named[t][self.codes[t]] for t in changed if t in named and self.use[t] < NEVER}

    def changes_to(self, codes: bytes) -> dict[int, int]:
        """Returns the tensors whose codes differ in another plan, with its codes."""
        there, here = np.frombuffer(codes, np.uint8), np.frombuffer(bytes(self.codes), np.uint8)
        changed: list[int] = np.flatnonzero(there != here).tolist()
        return {t: codes[t] for t in changed}

    # -- changes -------------------------------------------------------------------------------------------

    def apply(self, changes: Mapping[int, int]) -> list[int]:
        """Gives the tensors in ``changes`` new codes; returns those whose code is another one now."""
        return self._apply(changes, trial=False)

    def evaluate(self, codes: bytes) -> PlanCost | None:
        """Applies all codes of another plan; returns its cost, or None if it recomputes from a lossy tensor."""
        self.apply(self.changes_to(codes))
        return self.cost() if self.valid else None

    def effect(self, changes: Mapping[int, int]) -> Effect | None:
        """Returns what ``apply`` would do; None if the plan would be invalid."""
        if len(changes) == 1:
            ((t, code),) = changes.items()
            if RECOMPUTED not in (code, self.codes[t]) and self.use[t] < NEVER:
                return self._effect_of_storing(t, code)
        seconds, error2 = self._seconds, self._error2
        self._apply(changes, trial=True)
        found = (self._steps, self._seconds - seconds, self._error2 - error2) if self.valid else None
        self.undo()
        return found

    def undo(self) -> None:
        """Takes the last ``apply`` back."""
        for values, key, old in reversed(self._replaced):
            values[key] = old
        members = self._plan.members
        for slot, member, put in reversed(self._regrouped):
            (members[slot].discard if put else members[slot].add)(member)
        self._live, self._heights, self._seconds, self._error2, self._n_lossy, self._n_invalid = self._before

    def _effect_of_storing(self, t: int, code: int) -> Effect | None:
        """``effect`` of storing ``t`` in another form: nothing else is needed earlier or later for it."""
        tables, old = self.tables, self._plan.ranges[t]
        is_lossy = tables.is_lossy[t]
        lossy = is_lossy[code] - is_lossy[self.codes[t]]
        if self._n_invalid + lossy * sum(self.rerun[o] < NEVER for o in tables.readers[t]):
            return None
        new = self._ranges.of(t, code, self.use[t], self.rerun[tables.producer[t]], *self._last_uses(t))
        steps = dict(new.steps)
        for at, size in old.steps:
            steps[at] = steps.get(at, 0) - size
        return steps, new.seconds - old.seconds, new.error2 - old.error2

    def _begin(self) -> None:
        """Starts the record of what ``undo`` takes back."""
        self._steps: defaultdict[int, int] = defaultdict(int)
        self._replaced: list[tuple[Any, int, Any]] = []
        self._regrouped: list[tuple[int, int, bool]] = []
        self._before = (self._live, self._heights, self._seconds, self._error2, self._n_lossy, self._n_invalid)

    def _apply(self, changes: Mapping[int, int], *, trial: bool) -> list[int]:
        self.n_applied += 1
        self._begin()
        tables, codes = self.tables, self.codes
        changed = [t for t, code in changes.items() if code != codes[t]]
        for t in changed:
            is_lossy = tables.is_lossy[t]
            lossy = is_lossy[changes[t]] - is_lossy[codes[t]]
            if lossy:
                self._n_invalid += lossy * sum(self.rerun[o] < NEVER for o in tables.readers[t])
            self._set(codes, t, changes[t])
        self._propagate({tables.producer[t] for t in changed}, set(changed), trial=trial)
        return changed

    def _set(self, values: Any, key: int, new: object) -> None:
        self._replaced.append((values, key, values[key]))
        values[key] = new

    # -- what follows --------------------------------------------------------------------------------------

    def _propagate(self, ops: Iterable[int], dirty: set[int], *, trial: bool = False) -> None:
        """Derives anew what depends on ``ops`` and on the tensors in ``dirty``; a ``trial`` needs no heights."""
        slots: set[int] = set()
        self._propagate_ops(ops, dirty, slots, trial)
        self._propagate_ranges(dirty, slots, trial)
        if trial:
            return
        self._heights = None
        if self._steps:
            steps = np.zeros(self.tables.n_slots, np.int64)
            steps[list(self._steps)] = list(self._steps.values())
            self._live = self._live + np.cumsum(steps)
        for slot in slots:
            self._set(self._group, slot, group_height(self.tables, self._plan, slot))

    def _propagate_ops(self, ops: Iterable[int], dirty: set[int], slots: set[int], trial: bool) -> None:
        """Derives first uses and reruns, readers before sources; adds tensors that they concern to ``dirty``."""
        rerun, optional = self.rerun, self.tables.optional
        touched, sources = self.tables.touched, self.tables.sources
        heap = [-o for o in ops]
        heapify(heap)
        queued = set(heap)
        while heap:
            o = -heappop(heap)
            at = self._propagate_uses(o, dirty)
            changed = at != rerun[o]
            if changed:
                self._run_again(o, at, slots, trial)
            if o in optional and self._propagate_run(o, trial):
                changed = True
            if changed:
                dirty.update(touched[o])
                for source in sources[o]:
                    if -source not in queued:
                        queued.add(-source)
                        heappush(heap, -source)

    def _propagate_uses(self, o: int, dirty: set[int]) -> int:
        """Derives the first uses of what ``o`` makes; returns the backward op before which ``o`` reruns, or NEVER."""
        tables, codes, use, rerun = self.tables, self.codes, self.use, self.rerun
        readers, first_read = tables.readers, tables.first_read
        at = NEVER
        for t in tables.made[o]:
            first = first_read[t]
            for r in readers[t]:
                if rerun[r] < first:
                    first = rerun[r]
            if first != use[t]:
                self._replaced.append((use, t, use[t]))
                use[t] = first
                dirty.add(t)
            if first < at and codes[t] == RECOMPUTED:
                at = first
        return at

    def _run_again(self, o: int, at: int, slots: set[int], trial: bool) -> None:
        """Lets ``o`` run again before the backward op ``at``, or not if that is NEVER."""
        tables, old = self.tables, self.rerun[o]
        self._set(self.rerun, o, at)
        fused = o in tables.fused_at
        if fused and not trial:
            slot = tables.fused_at[o]
            self._set(self._top, slot, tables.fused_top_bytes[o] if at < NEVER else tables.base_top[slot])
        elif not trial:
            for p, put in ((old, False), (at, True)):
                if p < NEVER:
                    self._put(tables.slot(p), ~o, put, slots)
        if (at < NEVER) != (old < NEVER):
            sign = 1 if at < NEVER else -1
            op = tables.problem.forward[o]
            if not fused:
                self._seconds += sign * op.seconds
            n_lossy = sum(tables.is_lossy[t][self.codes[t]] for t in tables.read[o])
            self._n_invalid += sign * (n_lossy + (not op.recomputable))

    def _propagate_run(self, o: int, trial: bool) -> bool:
        """Derives whether the optional op ``o`` runs in the forward pass; returns whether that changed."""
        tables, plan = self.tables, self._plan
        kept = any(plan.is_kept(t) for t in tables.made[o])
        runs = kept or any(plan.runs[r] for t in tables.made[o] for r in tables.readers[t])
        if runs == plan.runs[o]:
            return False
        self._set(plan.runs, o, runs)
        self._seconds += (1 if runs else -1) * tables.problem.forward[o].seconds
        if not trial:
            self._set(self._top, o, tables.op_top_bytes[o] if runs else 0)
        return True

    def _propagate_ranges(self, dirty: set[int], slots: set[int], trial: bool) -> None:
        """Derives the live ranges of ``dirty`` and what they cost; adds slots whose groups change to ``slots``."""
        plan, steps, producer, range_of = self._plan, self._steps, self.tables.producer, self._ranges.of
        for t in dirty:
            read, last = self._last_uses(t)
            old = plan.ranges[t]
            new = range_of(t, self.codes[t], self.use[t], self.rerun[producer[t]], read, last)
            if not trial and last // 2 != plan.last_use[t]:
                self._set(plan.last_use, t, last // 2)
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
            if not trial:
                self._set(plan.ranges, t, new)
                self._regroup(t, old, new, slots)

    def _last_uses(self, t: int) -> tuple[int, int]:
        """Returns the last uses of ``t`` in the forward and the backward pass, as ``live_ranges`` encodes them."""
        base_read, base_last, readers, optional_users, fused_at = self._use_tables
        read, last, rerun, first_slot = base_read[t], base_last[t], self.rerun, self._first_backward_slot
        for o in readers[t]:
            if rerun[o] < NEVER:
                use = 2 * (first_slot + rerun[o]) + (o in fused_at)
                if use > last:
                    last = use
        for o in optional_users[t]:
            if self._plan.runs[o] and o > read:
                read = o
        return read, last

    def _count(self, live: LiveRange, sign: int) -> None:
        self._seconds += sign * live.seconds
        self._n_lossy += sign * live.lossy
        self._error2 += sign * live.error2

    def _regroup(self, t: int, old: LiveRange, new: LiveRange, slots: set[int]) -> None:
        """Notes the slots whose decodings and reruns are others, as ``t`` has a ``new`` live range."""
        for live, put in ((old, False), (new, True)):
            if live.code >= FIRST_CODEC:
                self._put(live.encoded_at, t, put, slots)
                self._put(live.decoded_at, t, put, slots)
            if live.group_death >= 0:
                slots.add(live.group_death)
        rerun = self.rerun[self.tables.producer[t]]
        if rerun < NEVER:
            slots.add(self.tables.slot(rerun))

    def _put(self, slot: int, member: int, put: bool, slots: set[int]) -> None:
        members = self._plan.members[slot]
        (members.add if put else members.discard)(member)
        self._regrouped.append((slot, member, put))
        slots.add(slot)
