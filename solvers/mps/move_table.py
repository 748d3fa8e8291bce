"""Moves between plans, and what each does to the heights, the added time and the error.

A move changes one tensor's action and whatever must follow (``Choices.complete``). Its effect is measured by
making it and taking it back: exact chain costs at the present state, a good guess at a later one. What was measured
is kept for when the tensor's surroundings, two ops wide, are the same again, which in a search they often are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from fxhybrid.solvers.mps.live_ranges import Interval
from fxhybrid.solvers.mps.neighbourhood import MAX_CHAIN, Changes, Choices
from fxhybrid.solvers.mps.problem_tables import NEVER, RECOMPUTED, Ints

DEPTHS = (2, 3, MAX_CHAIN)  # of chains made again, beside single ops
AROUND = 2  # ops between a tensor and those whose codes its moves depend on, as a rule
MAX_SEGMENTS = 10
NARROW = 3  # segments of most rows
SMALL_SHARE = 1e-6  # of all bytes: tensors below that are left as they are
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
ALL = slice(0, None)


class MoveTable:
    """Every move from the present state, as arrays: one row per tensor, target code and depth.

    Attributes:
        row: tensor, code and depth of each row.
        rows_of: rows of each tensor.
        begin, end, delta: slots and bytes that come or go there, several segments per row.
        segments: the same as lists.
        seconds: added seconds of each row.
        error2: squared error that each row adds.
        valid: whether the row is a move at all.
        changes: new codes that make the move.
        stale: tensors whose rows were measured at another state that may differ for them.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.base = choices.base
        floor = sum(self.base.sizes) * SMALL_SHARE
        self.rows_of: dict[int, range] = {}
        self.row: list[tuple[int, int, int]] = []
        for t, codes in choices.codes.items():
            if len(codes) < 2 or self.base.sizes[t] <= floor or t in self.base.held:
                continue
            first = len(self.row)
            for code in codes:
                again = code == RECOMPUTED
                depths = (0, *DEPTHS) if again else (0, MAX_CHAIN) if self.base.lossy(t, code) else (0,)
                self.row += [(t, code, depth) for depth in depths]
            self.rows_of[t] = range(first, len(self.row))
        n = len(self.row)
        # a segment's numbers of all rows lie together, as many rows are weighed at once
        places = np.zeros((2 * MAX_SEGMENTS, n), np.int64)
        numbers = np.zeros((MAX_SEGMENTS + 2, n))
        flags = np.zeros((2, n), bool)
        self.begin, self.end = places[:MAX_SEGMENTS], places[MAX_SEGMENTS:]
        self.delta = numbers[:MAX_SEGMENTS]
        self.seconds, self.error2 = numbers[MAX_SEGMENTS:]
        self.valid, self._wide = flags
        self._tables = (places, numbers, flags)
        self.changes: list[Changes] = [{}] * n
        self.segments: list[tuple[Interval, ...]] = [()] * n
        self.stale = set(self.rows_of)
        # one more than the neighbours, as itemgetter gives no tuple for one alone
        self._near = {t: itemgetter(*sorted(self.base.near((t,), AROUND)), t) for t in self.rows_of}
        self._context: dict[int, Any] = {}
        self._known: dict[tuple[int, Any], Any] = {}

    def refresh(self, tensors: Iterable[int] | None = None) -> None:
        """Measures the moves of those of ``tensors`` (all if None) that are stale."""
        for t in [t for t in (self.rows_of if tensors is None else tensors) if t in self.stale]:
            self.stale.discard(t)
            near = self._near[t]
            context = near(self.base.state), near(self.base.use)
            if context == self._context.get(t):
                continue
            self._context[t] = context
            rows = slice(self.rows_of[t].start, self.rows_of[t].stop)
            known = self._known.get((t, context))
            if known is None:
                self._measure(t)
                measured = [table[:, rows].copy() for table in self._tables]
                self._known[t, context] = measured, self.changes[rows], self.segments[rows]
                continue
            measured, self.changes[rows], self.segments[rows] = known
            for table, numbers in zip(self._tables, measured, strict=True):
                table[:, rows] = numbers

    def age(self, changed: AbstractSet[int], *, at_once: bool = True) -> None:
        """Marks as stale what a change of ``changed`` may alter.

        The moves of ``changed`` themselves are others now, and would not be seen if they were only marked: they are
        measured ``at_once``.
        """
        self.stale |= self.base.near(changed, AROUND).intersection(self.rows_of)
        if at_once:
            self.refresh(sorted(self.rows_of.keys() & changed))

    def possible(self, banned: Bools, error2: float, limit: float, rows: slice = ALL) -> Ints:
        """Valid moves of ``rows`` that are not ``banned`` and keep the error ``limit``, of which ``error2`` is used."""
        possible = self.valid[rows] & ~banned[rows] & (error2 + self.error2[rows] <= limit)
        places: Ints = rows.start + np.flatnonzero(possible)
        return places

    def weighed(self, change: Callable[[Floats], Floats], total: Floats, rows: Ints) -> Floats:
        """Per row: the sum over its slots of ``change(delta)`` times the slot's weight; ``total`` is cumulative."""

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

    def fits(self, height: Floats, top: int, r: int, target: int) -> bool:
        """Whether a move keeps ``height`` at or below a target; the slot at its ``top`` settles that for most."""
        room = target - height[top]
        for begin, end, size in self.segments[r]:
            if size > 0 and size > room and (begin <= top < end or height[begin:end].max() + size > target):
                return False
        return True

    def _measure(self, t: int) -> None:
        base, rows = self.base, self.rows_of[t]
        self.valid[rows.start : rows.stop] = False
        if base.use[t] == NEVER:
            return
        seen: list[Changes] = []
        alone = base.state[t]  # a code that nothing must follow, whatever the depth
        for r in rows:
            _, code, depth = self.row[r]
            if code == alone or code == base.state[t]:
                continue
            changes = self.choices.complete(t, code, depth)
            if changes is None or changes in seen:
                continue
            if len(changes) == 1:
                alone = code
            seen.append(changes)
            self._measure_row(r, changes)

    def _measure_row(self, r: int, changes: Changes) -> None:
        effect = self.base.effect(changes)
        if effect is None:
            return
        steps, self.seconds[r], self.error2[r] = effect
        segments = _segments(steps, self.base.n_slots)
        self.delta[:, r] = 0.0
        for k, (begin, end, size) in enumerate(segments):
            self.begin[k, r], self.end[k, r], self.delta[k, r] = begin, end, size
        self._wide[r] = len(segments) > NARROW
        self.segments[r] = tuple(segments)
        self.changes[r] = changes
        self.valid[r] = True


@dataclass
class Pace:
    """How many moves are made at once, and when to give up.

    Attributes:
        banned: rows that were refused alone.
        batch: moves made at once.
        most: of them.
        fails: moves refused in a row.
    """

    banned: Bools
    batch: int
    most: int
    fails: int = 0

    def quicken(self) -> None:
        """After moves that were made."""
        self.fails, self.batch = 0, min(2 * self.batch, self.most)

    def slow_down(self, rows: list[int]) -> None:
        """After moves that were taken back."""
        self.fails += 1
        if len(rows) == 1:
            self.banned[rows] = True
        self.batch = max(1, len(rows) // 4)


def _segments(steps: dict[int, int], n_slots: int) -> list[Interval]:
    """Where ``steps`` lead to another height than 0; where they are too many, neighbours join at the higher one."""
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
    """The sum of the values before each place, and of all."""
    found = np.zeros(len(values) + 1)
    np.cumsum(values, out=found[1:])
    return found


def lowest(keys: Floats, count: int) -> Ints:
    """Where the ``count`` lowest keys are, in the order of a stable sort; most of the others need no sorting."""
    low: Ints = np.arange(len(keys))
    if count < len(keys):
        low = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
    return low[np.argsort(keys[low], kind="stable")[:count]]
