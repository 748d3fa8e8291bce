"""Every move from a plan, with what it does to the heights, the overhead and the error, as arrays.

A move changes one tensor's code and repairs the plan (``Neighbourhood.repair``). Its effect is evaluated by applying
and undoing it: exact at the present plan, a good guess at a later one. Effects are remembered for when the tensor's
surroundings, two ops wide, are the same again, which in a search they often are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from fxhybrid.solvers.mps.live_ranges import Interval
from fxhybrid.solvers.mps.neighbourhood import MAX_CHAIN, Changes, Neighbourhood
from fxhybrid.solvers.mps.problem_tables import NEVER, RECOMPUTED, Ints

DEPTHS = (2, 3, MAX_CHAIN)  # of chains recomputed, in addition to single ops
AROUND = 2  # ops between a tensor and those whose codes its moves depend on, as a rule
MAX_SEGMENTS = 10
NARROW = 3  # segments of most rows
SMALL_SHARE = 1e-6  # of all bytes: tensors below that are left as they are
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
ALL = slice(0, None)


class MoveTable:
    """Holds every move from the present plan, one row per tensor, target code and depth.

    Attributes:
        row: tensor, code and depth of each row.
        rows_of: rows of each tensor.
        begin, end, delta: slots and bytes that come or go there, several segments per row.
        segments: the same as lists.
        seconds: overhead that each row adds.
        error2: squared error that each row adds.
        valid: whether the row is a move at all.
        changes: new codes that make the move.
        stale: tensors whose rows were evaluated at another plan that may differ for them.
    """

    def __init__(self, neighbourhood: Neighbourhood) -> None:
        self.neighbourhood = neighbourhood
        self.state, self.tables = neighbourhood.state, neighbourhood.tables
        self.rows_of: dict[int, range] = {}
        self.row: list[tuple[int, int, int]] = []
        self._list_moves()
        self._allocate(len(self.row))
        self.stale = set(self.rows_of)
        # one more than the neighbours, as itemgetter gives no tuple for one alone
        self._near = {t: itemgetter(*sorted(self.tables.near((t,), AROUND)), t) for t in self.rows_of}
        self._context: dict[int, Any] = {}
        self._known: dict[tuple[int, Any], Any] = {}

    def _list_moves(self) -> None:
        tables = self.tables
        least_bytes = sum(tables.size_bytes) * SMALL_SHARE
        for t, codes in self.neighbourhood.codes.items():
            if len(codes) < 2 or tables.size_bytes[t] <= least_bytes or t in tables.held:
                continue
            first = len(self.row)
            for code in codes:
                lossy = tables.is_lossy[t][code]
                depths = (0, *DEPTHS) if code == RECOMPUTED else (0, MAX_CHAIN) if lossy else (0,)
                self.row += [(t, code, depth) for depth in depths]
            self.rows_of[t] = range(first, len(self.row))

    def _allocate(self, n: int) -> None:
        # a segment's numbers of all rows lie together, as many rows are scored at once
        places = np.zeros((2 * MAX_SEGMENTS, n), np.int64)
        numbers = np.zeros((MAX_SEGMENTS + 2, n))
        flags = np.zeros((2, n), bool)
        self.begin, self.end = places[:MAX_SEGMENTS], places[MAX_SEGMENTS:]
        self.delta = numbers[:MAX_SEGMENTS]
        self.seconds, self.error2 = numbers[MAX_SEGMENTS:]
        self.valid, self._wide = flags
        self._arrays = (places, numbers, flags)
        self.changes: list[Changes] = [{}] * n
        self.segments: list[tuple[Interval, ...]] = [()] * n

    def refresh(self, tensors: Iterable[int] | None = None) -> None:
        """Evaluates the moves of those of ``tensors`` (all if None) that are stale."""
        for t in [t for t in (self.rows_of if tensors is None else tensors) if t in self.stale]:
            self.stale.discard(t)
            near = self._near[t]
            context = near(self.state.codes), near(self.state.use)
            if context == self._context.get(t):
                continue
            self._context[t] = context
            rows = slice(self.rows_of[t].start, self.rows_of[t].stop)
            known = self._known.get((t, context))
            if known is None:
                self._evaluate(t)
                evaluated = [array[:, rows].copy() for array in self._arrays]
                self._known[t, context] = evaluated, self.changes[rows], self.segments[rows]
                continue
            evaluated, self.changes[rows], self.segments[rows] = known
            for array, numbers in zip(self._arrays, evaluated, strict=True):
                array[:, rows] = numbers

    def mark_stale(self, changed: Iterable[int], *, at_once: bool = True) -> None:
        """Marks as stale what a change of ``changed`` may alter.

        The moves of ``changed`` themselves are others now, and would not be seen if they were only marked: they are
        evaluated ``at_once``.
        """
        self.stale |= self.tables.near(changed, AROUND).intersection(self.rows_of)
        if at_once:
            self.refresh(sorted(self.rows_of.keys() & changed))

    def possible(self, banned: Bools, error2: float, limit: float, rows: slice = ALL) -> Ints:
        """Returns valid moves of ``rows`` that are not ``banned`` and keep the error ``limit`` beyond ``error2``."""
        possible = self.valid[rows] & ~banned[rows] & (error2 + self.error2[rows] <= limit)
        places: Ints = rows.start + np.flatnonzero(possible)
        return places

    def weighed_change(self, change: Callable[[Floats], Floats], total: Floats, rows: Ints) -> Floats:
        """Returns per row the sum over its slots of ``change(delta)`` times weight; ``total`` is cumulative."""

        def part(rows: Ints, segments: slice) -> Floats:
            begin, end = self.begin[segments].take(rows, axis=1), self.end[segments].take(rows, axis=1)
            changed = change(self.delta[segments].take(rows, axis=1))
            found: Floats = (changed * (total.take(end) - total.take(begin))).sum(axis=0)
            return found

        found = part(rows, slice(NARROW))
        wide = np.flatnonzero(self._wide[rows])
        if len(wide):
            found[wide] += part(rows[wide], slice(NARROW, None))
        return found

    def add(self, height: Floats, r: int) -> None:
        """Adds what a move brings to ``height``."""
        for begin, end, size in self.segments[r]:
            height[begin:end] += size

    def keeps(self, height: Floats, top: int, r: int, target: int) -> bool:
        """Whether a move keeps ``height`` at or below a target; the slot at its ``top`` decides that for most."""
        room = target - height[top]
        for begin, end, size in self.segments[r]:
            if size > 0 and size > room and (begin <= top < end or height[begin:end].max() + size > target):
                return False
        return True

    def _evaluate(self, t: int) -> None:
        state, rows = self.state, self.rows_of[t]
        self.valid[rows.start : rows.stop] = False
        if state.use[t] == NEVER:
            return
        seen: list[Changes] = []
        alone = state.codes[t]  # a code that needs no repair, whatever the depth
        for r in rows:
            _, code, depth = self.row[r]
            if code == alone or code == state.codes[t]:
                continue
            changes = self.neighbourhood.repair(t, code, depth)
            if changes is None or changes in seen:
                continue
            if len(changes) == 1:
                alone = code
            seen.append(changes)
            self._evaluate_row(r, changes)

    def _evaluate_row(self, r: int, changes: Changes) -> None:
        effect = self.state.effect(changes)
        if effect is None:
            return
        steps, self.seconds[r], self.error2[r] = effect
        segments = _segments(steps, self.tables.n_slots)
        self.delta[:, r] = 0.0
        for k, (begin, end, size) in enumerate(segments):
            self.begin[k, r], self.end[k, r], self.delta[k, r] = begin, end, size
        self._wide[r] = len(segments) > NARROW
        self.segments[r] = tuple(segments)
        self.changes[r] = changes
        self.valid[r] = True


@dataclass
class Batch:
    """Controls how many moves are applied at once, and when to give up.

    Attributes:
        banned: rows that were refused alone.
        size: moves applied at once.
        most: of them.
        fails: moves refused in a row.
    """

    banned: Bools
    size: int
    most: int
    fails: int = 0

    def grow(self) -> None:
        """Doubles the size, after moves that stay applied."""
        self.fails, self.size = 0, min(2 * self.size, self.most)

    def shrink(self, rows: list[int]) -> None:
        """Makes the size a quarter, after moves that were undone; one refused alone is banned."""
        self.fails += 1
        if len(rows) == 1:
            self.banned[rows] = True
        self.size = max(1, len(rows) // 4)


def _segments(steps: dict[int, int], n_slots: int) -> list[Interval]:
    """Returns where ``steps`` lead to another height than 0; too many segments are joined at the higher one."""
    segments: list[Interval] = []
    level = begin = 0
    for at in sorted(steps):
        step = steps[at]
        if step:
            if level:
                segments.append((begin, at, level))
            level += step
            begin = at
    if level:
        segments.append((begin, n_slots, level))
    while len(segments) > MAX_SEGMENTS:
        k = min(range(len(segments) - 1), key=lambda k: segments[k + 1][1] - segments[k][0])
        (begin, _, a), (_, end, b) = segments[k : k + 2]
        segments[k : k + 2] = [(begin, end, max(a, b))]
    return segments


def sums(values: Floats) -> Floats:
    """Returns the sum of the values before each place, and of all."""
    found = np.zeros(len(values) + 1)
    np.cumsum(values, out=found[1:])
    return found


def lowest(keys: Floats, count: int) -> Ints:
    """Returns where the ``count`` lowest keys are, in the order of a stable sort; most others need no sorting."""
    low: Ints = np.arange(len(keys))
    if count < len(keys):
        low = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
    return low[np.argsort(keys[low], kind="stable")[:count]]
